"""What a router start may look at, and what it returns. L layers, D hidden, N windows of S tokens."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from moestro.data.packed import PackedTokens
from moestro.errors import InputError
from moestro.mixing.plan import MoePlan
from moestro.models.weights import StoredWeights
from moestro.models.windows import spread_windows

WINDOW = 256
"""Tokens per calibration window."""


@dataclass(frozen=True)
class RouterRows:
    """How a router starts."""

    rows: Mapping[str, Tensor]
    """Weights [L, D], float32, by the names of `MoePlan.rows`; a name left out gets zeros."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    """Key figures for the stage's result, as JSON values."""


@dataclass(frozen=True)
class StartContext:
    """The plan, the models by name (`seed` among them), and the domains' tokens by name."""

    plan: MoePlan
    layers: int
    hidden: int
    longest: int
    """Longest sequence the seed reads."""
    unknown_ids: range
    """Token ids of the result that the seed has no row of its own for: branches have added them to its vocabulary."""
    folders: Mapping[str, Path]
    """Checkpoint folders."""
    models: Mapping[str, StoredWeights]
    """Their weights."""
    tokens: Mapping[str, Path]
    """Folders of tokens artifacts by domain."""
    progress: Callable[[int, int, str], None] = lambda _done, _total, _message: None
    """Told units of work done, units in all, and what they are."""

    def domains(self) -> tuple[str, ...]:
        """The models other than the seed that experts are made of."""
        return tuple(name for name in self.plan.members if name != "seed")

    def by_row(self, origins: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of each router row, given those of what its experts are made from."""
        experts = zip(self.plan.rows, self.plan.experts, strict=True)
        return {row: origins[expert.origin] for row, expert in experts if expert.origin in origins}

    def windows(self, calibration_tokens: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Calibration windows [N, S] of every domain that hold no ids which the seed lacks.

        Figures: `windows_left_out`, how many others there were by domain, if there were any.
        Raises `InputError` for a domain without tokens, and for one of which no window is left.
        """
        missing = [name for name in self.domains() if name not in self.tokens]
        if missing:
            raise InputError(
                f"No tokens of {', '.join(missing)} to start the router from.",
                hint="Hand in their tokens, or take a router that needs none: zero, random, prompts or erc.",
            )
        windows, left_out = {}, {}
        for name in self.domains():
            ids = PackedTokens.open(self.tokens[name], "train").ids
            spread_NS = spread_windows(ids, length=min(WINDOW, self.longest), max_tokens=calibration_tokens)
            lacked_NS = (spread_NS >= self.unknown_ids.start) & (spread_NS < self.unknown_ids.stop)
            windows[name] = spread_NS[~lacked_NS.any(dim=1)]
            if not len(windows[name]):
                raise InputError(
                    f"All text of {name} that the router is to start from holds tokens which the seed lacks.",
                    hint="Take a router that reads none (zero, random, prompts or erc), or hand in other tokens.",
                )
            if count := len(spread_NS) - len(windows[name]):
                left_out[name] = count
        return windows, {"windows_left_out": left_out} if left_out else {}
