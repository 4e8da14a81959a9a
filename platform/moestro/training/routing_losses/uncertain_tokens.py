"""Tokens whose routing is undecided train all experts (GW-MoE, arXiv 2406.12375).

A token is undecided in a layer where the entropy of its routing is at least `threshold` of the largest possible:
    H(p) >= threshold * log E,    p = softmax(logits), or s / sum_j s_j for sigmoid scores s.
(The paper's threshold is an absolute entropy for one model; as a share it means the same for any number of experts.)
In training such a token passes all experts, with the gates that the router itself gives when all are chosen; all of
them thus learn it, and it no longer matters which of them it gets. Other tokens, and every token at inference, take
the top K as ever.

T tokens, E experts, K chosen per token.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from moestro.config import UncertainTokens
from moestro.models.gating import Gating, Routed
from moestro.models.rerouting import all_experts, reroute, skip_absent_experts
from moestro.training.parallel import total as total_over_workers
from moestro.training.routing_losses.entropy import entropy
from moestro.training.routing_losses.loss import Routing, RoutingLoss


def undecided(probabilities_TE: Tensor, threshold: float) -> Tensor:
    """Which tokens' entropy is at least `threshold` of log E, booleans [T]."""
    return entropy(probabilities_TE) >= threshold * math.log(probabilities_TE.shape[-1])


class UncertainTokenBroadcast(RoutingLoss):
    """All experts for undecided tokens; adds no loss."""

    reroutes = True

    def __init__(self, config: UncertainTokens, model: PreTrainedModel) -> None:
        self.threshold = config.threshold
        self.model = model
        self.counts = torch.zeros(2, dtype=torch.float64)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Undecided tokens choose all experts; the others are not computed beyond their K."""
        with skip_absent_experts(self.model), reroute(self.model, self._decide):
            yield

    def begin(self, step: int, total: int) -> None:  # noqa: ARG002
        """Forget the step before."""
        self.counts = torch.zeros(2, dtype=torch.float64)

    def loss(self, routing: Routing) -> Tensor:
        """Counts; the loss is 0."""
        for layer in range(len(routing.record.logits)):
            undecided_T = undecided(routing.probabilities(layer).detach(), self.threshold)
            self.counts += torch.tensor([int(undecided_T.sum()), len(undecided_T)])
        return torch.zeros(())

    def end(self, loads: list[Tensor]) -> None:  # noqa: ARG002
        """Add up the workers' counts."""
        self.counts = total_over_workers(self.counts)

    def metrics(self) -> dict[str, float]:
        """`uncertain_tokens`: their share, over all layers."""
        return {"uncertain_tokens": float(self.counts[0] / self.counts[1])}

    def _decide(self, _layer: int, router: Any, gating: Gating, routed: Routed) -> Routed:
        undecided_T1 = undecided(gating.probabilities(routed.logits.detach()), self.threshold).unsqueeze(1)
        if not undecided_T1.any():
            return routed
        ids_TE = all_experts(routed)
        gates_TE = gating.gates(router, routed, ids_TE).to(routed.weights.dtype)
        absent = ids_TE.shape[-1] - routed.ids.shape[-1]
        chosen_TE = functional.pad(routed.weights, (0, absent))
        return Routed(routed.logits, torch.where(undecided_T1, gates_TE, chosen_TE), ids_TE)
