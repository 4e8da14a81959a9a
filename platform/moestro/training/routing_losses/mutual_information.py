"""Dense training, sparse inference (DS-MoE, arXiv 2404.05567).

While it trains, every token passes all experts. Their gates are what the router itself gives when all of them are
chosen: the softmax over all logits; where scores are sigmoids s, scaling * s_i / sum_j s_j, or scaling * s_i if the
config does not renormalise. Gradients reach every expert and every logit in every step, at E / K times the experts'
compute. The checkpoint is served as it always is, by the top K. Where gates are renormalised the layer's output keeps
its scale; otherwise a served token lacks the gate mass of the experts beyond K.

So that the top K stand for all, the loss is, per layer, minus the mutual information of token and expert
    L = -H(mean over tokens of p) + mean over tokens of H(p),    H(p) = -sum_i p_i log p_i,
with p = softmax(logits), or s / sum_j s_j. It is -log E where every token is sure of one expert and experts are taken
alike, and 0 where all tokens are routed alike. The mean is taken over a micro-batch, that of all workers.

T tokens, E experts, K chosen per token.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moestro.config import MutualInformationLoss
from moestro.models.gating import Gating, Routed
from moestro.models.rerouting import all_experts, reroute
from moestro.training.parallel import mean as mean_over_workers
from moestro.training.parallel import mean_tensor
from moestro.training.routing_losses.entropy import entropy
from moestro.training.routing_losses.loss import Routing, RoutingLoss


def mutual_information(probabilities_TE: Tensor) -> Tensor:
    """H(mean p) - mean H(p), nats; scalar, in [0, log E] once it is averaged over workers.

    The first mean is over the tokens of all workers, of which each has as many; the second over this worker's.
    """
    return entropy(mean_tensor(probabilities_TE.mean(dim=0))) - entropy(probabilities_TE).mean()


class DenseTraining(RoutingLoss):
    """All experts for every token, and the loss of every sparse layer."""

    reroutes = True

    def __init__(self, config: MutualInformationLoss, model: PreTrainedModel) -> None:
        self.coefficient = config.coefficient
        self.model = model
        self.values: list[float] = []

    def attached(self) -> AbstractContextManager[None]:
        """Every router chooses all experts."""
        return reroute(self.model, _everyone)

    def begin(self, step: int, total: int) -> None:  # noqa: ARG002
        """Forget the step before."""
        self.values = []

    def loss(self, routing: Routing) -> Tensor:
        """Mean over layers, weighted."""
        layers = range(len(routing.record.logits))
        value = torch.stack([mutual_information(routing.probabilities(layer)) for layer in layers]).mean()
        self.values.append(float(value.detach()))
        return -self.coefficient * value

    def end(self, loads: list[Tensor]) -> None:  # noqa: ARG002
        """Average the figure over workers."""
        self.values = [mean_over_workers(sum(self.values) / len(self.values))]

    def metrics(self) -> dict[str, float]:
        """`mutual_information`: nats, mean over layers and micro-batches."""
        return {"mutual_information": sum(self.values) / len(self.values)}


def _everyone(_layer: int, router: Any, gating: Gating, routed: Routed) -> Routed:
    ids_TE = all_experts(routed)
    return Routed(routed.logits, gating.gates(router, routed, ids_TE), ids_TE)
