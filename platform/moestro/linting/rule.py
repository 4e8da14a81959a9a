"""`Rule`, what is checked, and `Finding`, what a rule found: where, what each engine makes of it, and what to do."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from moestro.linting.checkpoint import Checkpoint
from moestro.linting.draft import Draft

Severity = Literal["error", "warning"]
Engine = Literal["transformers", "vllm"]
ENGINES: tuple[Engine, ...] = ("transformers", "vllm")
SHOWN = 4
"""How many names a finding lists."""


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """One thing that is wrong with a checkpoint."""

    where: tuple[str, ...]
    """Files, fields of config.json, tensors."""
    what: str
    """What is there, in one sentence."""
    transformers: str
    """What transformers makes of it."""
    vllm: str
    """What vLLM makes of it."""
    remedy: str
    """What to do about it."""
    affects: tuple[Engine, ...] = ENGINES
    """The engines that fail or compute something else than was meant."""
    fixable: bool = False
    """Whether a repaired copy can be written."""


@dataclass(frozen=True, kw_only=True)
class Finding(Trouble):
    """A trouble with the rule that found it."""

    rule: str
    severity: Severity
    """`error`: an engine fails or computes something wrong; `warning`: likely a mistake."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One thing that is checked."""

    name: str
    severity: Severity
    about: str
    """What it finds, for the documentation."""
    check: Callable[[Checkpoint], Iterator[Trouble]]
    mend: Callable[[Checkpoint, Draft], None] | None = None
    """Mends in a draft whatever the rule found and called fixable."""
    mends: str = ""
    """What the repaired copy holds instead, for the documentation."""
    costly: bool = False
    """Whether it reads more than config and headers: weights, or the tokenizer."""
    any_architecture: bool = False
    """Whether it needs no layout."""
    of_quantised: bool = False
    """Whether it holds for quantised weights too, because it looks at none of their names, shapes and numbers."""
    structural: bool = False
    """Whether its errors say that the tensors are not those of the config: then experts can neither join nor leave."""
    final: bool = False
    """Whether no other rule can be run once it found something."""

    def findings(self, checkpoint: Checkpoint) -> list[Finding]:
        """What it finds."""
        unknown = checkpoint.layout is None and not self.any_architecture
        if unknown or (checkpoint.quantised and not self.of_quantised):
            return []
        return [Finding(rule=self.name, severity=self.severity, **vars(trouble)) for trouble in self.check(checkpoint)]


def counted(number: int, one: str, many: str) -> str:
    """How many there are, with the words for one or for several."""
    return f"{number} {one if number == 1 else many}"


def some(names: Iterable[str]) -> tuple[str, ...]:
    """The first few of many names, and how many more there are."""
    listed = sorted(names)
    more = (f"and {len(listed) - SHOWN} more",) if len(listed) > SHOWN else ()
    return (*listed[:SHOWN], *more)
