"""`RoutingLoss`: what every loss or rule on routing offers, and `Routing`, what it is given.

Shapes: T tokens of a micro-batch, E experts, K chosen per token, L sparse layers.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moestro.models.routing import RoutingRecord
from moestro.training.auxiliary import MicroBatch


@dataclass(frozen=True)
class Routing:
    """What the forward pass of a micro-batch decided."""

    record: RoutingRecord
    """Logits, ids and gates by layer, attached to the graph."""
    micro: MicroBatch
    """The micro-batch."""
    micro_loads: list[Tensor]
    """By layer: how often each expert was chosen in this micro-batch, all workers included, [E] float64."""
    loads: list[Tensor]
    """The same over the step's micro-batches so far."""

    def probabilities(self, layer: int) -> Tensor:
        """Scores that add up to one per token, [T, E], attached."""
        return self.record.gating.probabilities(self.record.logits[layer])


class RoutingLoss:
    """One term of the objective. A subclass overrides what it needs."""

    reroutes = False
    """Whether it decides which experts a token takes; the loads then are of what the routers would have chosen."""

    def attached(self) -> AbstractContextManager[None]:
        """What has to be in place on the model while it trains."""
        return nullcontext()

    def begin(self, step: int, total: int) -> None:
        """Optimiser step `step` (from 0) of `total` begins."""

    def loss(self, routing: Routing) -> Tensor:  # noqa: ARG002
        """The weighted loss of a micro-batch, mean over layers (scalar).

        Gradients are averaged over workers: where each returns its part such that their mean is the loss of the whole
        micro-batch, the trained model does not depend on their number.
        """
        return torch.zeros(())

    def end(self, loads: list[Tensor]) -> None:
        """The optimiser has stepped; `loads` are the whole step's, by layer."""

    def metrics(self) -> dict[str, float]:
        """Figures of the step that has just ended."""
        return {}

    def state(self) -> dict[str, Any]:
        """What a resumed run needs besides the model (JSON values and tensors)."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what `state` returned."""
