"""What every gate is: made for a deployment, it asks the running server, then judges with transformers' model at hand.

N windows of S tokens.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor
from transformers import PreTrainedModel

from moestro.artifacts import Artifact
from moestro.config import Config, DeployConfig
from moestro.data.packed import PackedTokens
from moestro.inference.client import Endpoint
from moestro.inference.routes import RoutingShape
from moestro.models.windows import spread_windows

DIGITS = 6
GIB = 1024**3


@dataclass(frozen=True)
class Subject:
    """What is to be deployed, and the text it is measured on."""

    config: DeployConfig
    model: Artifact
    tokens: Mapping[str, Artifact]
    """By domain."""
    shape: RoutingShape | None
    """The routing that vLLM returns for the model; None if it returns none."""

    def spread_windows(self, domain: str, *, length: int, max_tokens: int) -> Tensor:
        """Windows [N, S] spread over the domain's held-out text; raises `InputError` if it has no tokens."""
        ids = PackedTokens.open(self.tokens[domain].path, "held_out").ids
        return spread_windows(ids, length=length, max_tokens=max_tokens)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a gate found."""

    refused: tuple[str, ...]
    """Why it refuses, each with figure and threshold; empty if it lets pass."""
    thresholds: Config
    """The gate's config."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    """The same whenever they are measured."""
    times: Mapping[str, Any] = field(default_factory=dict)
    """Figures of the machine and the moment: they stand in the artifact's record alone."""
    evidence: Mapping[str, Any] = field(default_factory=dict)
    """What the figures were measured on, which those of another deployment must share to be compared."""
    note: str = ""
    """What could not be measured, and why."""


class Gate(Protocol):
    """One gate before traffic. Constructed with a `Subject`, which raises `InputError` if that cannot be measured."""

    timed: ClassVar[bool]
    """Whether it judges by figures of the machine and the moment."""

    def __init__(self, subject: Subject) -> None: ...

    def ask(self, endpoint: Endpoint, port: int) -> None:
        """Measure the server, which listens on `port` of this machine and answers nobody else."""

    def judge(self, network: PreTrainedModel) -> Verdict:
        """The verdict, after `ask`; the server has ended, `network` is the same checkpoint under transformers."""


def finite(value: float | None) -> float | None:
    """A figure as JSON has it: rounded to a millionth, None for one that is not a finite number."""
    return round(value, DIGITS) if value is not None and math.isfinite(value) else None


def digest(content: bytes) -> str:
    """Identity of what was measured on."""
    return hashlib.sha256(content).hexdigest()[:32]


def above(name: str, figure: float, bound: float | None, unit: str = "") -> list[str]:
    """The refusal of a figure above its bound, if it has one, and of a figure that is not a finite number."""
    if not math.isfinite(figure):
        return [f"{name} is {figure} (it must be a finite number)"]
    if bound is None or figure <= bound:
        return []
    return [f"{name} is {figure:.4g}{unit} (at most {bound:g}{unit} is allowed)"]
