"""Whose expert choices the trainer replays: `rl.routing`, with `auto` resolved.

Replay does two things: it takes the engine's rounding out of the importance ratios (R3, arXiv 2510.11370), and it
keeps the experts of a batch fixed while several optimiser steps change the router (R2; the routing replay of GSPO's
authors, arXiv 2507.18071, section 5.3). How far off-policy a run is decides which matters more (arXiv 2512.01374): with
one optimiser step per fresh batch nothing but rounding stands between sampling and learning; with a few, the trainer's
own routes suffice; with many, or with stale rollouts, the engine's do better.
"""

from dataclasses import dataclass
from typing import Literal

Mode = Literal["off", "r2", "r3"]
MANY_STEPS = 4
"""Optimiser steps from sampling to learning from which `auto` replays the engine's routes."""


@dataclass(frozen=True)
class RoutingChoice:
    """What is replayed, and why."""

    mode: Mode
    reason: str


def choose(*, mini_steps: int, max_staleness: int, moe: bool, returned: bool, router_mismatch: float) -> RoutingChoice:
    """The mode for `auto`.

    `moe`: whether the model routes at all; `returned`: whether the engine says which experts it chose;
    `router_mismatch`: share of (token, layer) pairs in which engine and trainer, on the same weights, chose
    differently.
    """
    if not moe:
        return RoutingChoice("off", "the model is dense")
    distance = mini_steps * (1 + max_staleness)
    steps = f"{distance} optimiser step{'s' if distance > 1 else ''} from sampling to learning"
    if distance == 1 and not router_mismatch:
        return RoutingChoice("off", f"{steps}, and engine and trainer route alike: there is nothing to replay")
    if not returned:
        mode: Mode = "off" if distance == 1 else "r2"
        return RoutingChoice(mode, f"{steps}; vLLM does not return this model's routing, so r3 is out of question")
    if distance == 1:
        return RoutingChoice("r3", f"{steps}, but engine and trainer route {router_mismatch:.2%} of tokens differently")
    if distance < MANY_STEPS:
        return RoutingChoice("r2", f"{steps}: few enough for the trainer's own routes")
    return RoutingChoice("r3", f"{steps}: too many for routes that the engine did not take")
