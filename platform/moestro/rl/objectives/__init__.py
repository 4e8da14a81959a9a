"""Objectives of policy optimisation, one file each, by the name that `rl.algorithm.type` gives them.

All see the same `Tokens` and answer with a `Surrogate` per token; `weights` says how tokens add up to a loss.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moestro.rl.objectives import cispo, dapo, dr_grpo, grpo, gspo
from moestro.rl.objectives.surrogate import Surrogate, Tokens

__all__ = ["OBJECTIVES", "Objective", "Surrogate", "Tokens"]


@dataclass(frozen=True)
class Objective:
    """One algorithm."""

    surrogate: Callable[[Any, Tokens], Surrogate]
    """(config, micro-batch) -> what each of its tokens adds to the loss, before weights."""
    weights: Callable[[Tensor, int], Tensor]
    """(completion mask [B, S] of an optimiser step, `max_tokens`) -> weights [B, S], 0 outside the mask."""


OBJECTIVES: Mapping[str, Objective] = {
    name: Objective(module.surrogate, module.weights)
    for name, module in {"grpo": grpo, "dr_grpo": dr_grpo, "dapo": dapo, "gspo": gspo, "cispo": cispo}.items()
}
