"""Router z-loss (ST-MoE, arXiv 2202.08906, eq. 5): mean over tokens of logsumexp(logits)^2.

It is about the normaliser of a softmax, which sigmoid scores have not. T tokens, E experts.
"""

import torch
from torch import Tensor

from moestro.config import ZLoss
from moestro.training.routing_losses.loss import Routing, RoutingLoss


def z_loss(logits_TE: Tensor) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2; scalar."""
    return logits_TE.float().logsumexp(dim=-1).square().mean()


class RouterZLoss(RoutingLoss):
    """The z-loss of every sparse layer."""

    def __init__(self, config: ZLoss) -> None:
        self.coefficient = config.coefficient
        self.values: list[float] = []

    def begin(self, step: int, total: int) -> None:  # noqa: ARG002
        """Forget the step before."""
        self.values = []

    def loss(self, routing: Routing) -> Tensor:
        """Mean over layers, weighted."""
        value = torch.stack([z_loss(logits_TE) for logits_TE in routing.record.logits]).mean()
        self.values.append(float(value.detach()))
        return self.coefficient * value

    def metrics(self) -> dict[str, float]:
        """`z_loss`: unweighted mean over layers and micro-batches."""
        return {"z_loss": sum(self.values) / len(self.values)}
