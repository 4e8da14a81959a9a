"""Random partition and Experts Weights Averaging (EWA, arXiv 2308.06093).

While it trains, no router decides: in every layer and micro-batch the tokens are dealt to the experts at random, in
equal parts (their numbers differ by one at most), one expert per token. After each optimiser step every expert is
drawn towards the mean of the others,
    W_i <- (1 - beta) W_i + beta / (E - 1) sum_{j != i} W_j,
with beta rising linearly over the run from 0 to `share`. The mean of the experts stays what it was and their distances
from it shrink by 1 - beta E / (E - 1) per step. At beta = (E - 1) / E the experts are the same; beyond, they would
swing to the other side of the mean, so a larger `share` is refused.

It is a way to train, not to specialise: the experts see the same data and end close together, so that it matters
little which of them a token gets when it is served by the top K. (The paper goes on to average them into one dense
FFN.) A token's gate is the sum of the gates its router would have given, without gradient: the layer keeps its scale
and cross entropy teaches the routers nothing.

The partition is a function of seed, step, micro-batch and layer alone, and of the whole micro-batch, of which each
worker takes its part: a resumed run deals as an undisturbed one, and any number of workers as one does.

T tokens, E experts, K chosen per token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moestro.config import RandomPartition
from moestro.errors import ConfigError
from moestro.models.gating import Gating, Routed
from moestro.models.rerouting import reroute
from moestro.models.routers import experts, num_experts
from moestro.training.parallel import num_workers, rank
from moestro.training.routing_losses.loss import RoutingLoss
from moestro.training.routing_losses.schedule import linear


def random_partition(num_tokens: int, num_experts: int, *key: int) -> Tensor:
    """An expert for each token [T], in parts as equal as can be; a function of the integers of `key`."""
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint32)[0]))
    order_T = torch.randperm(num_tokens, generator=generator)
    first = torch.randperm(num_experts, generator=generator)  # who gets what does not divide evenly
    return first[order_T % num_experts]


@torch.no_grad()
def draw_together(weights_E: Tensor, beta: float) -> None:
    """Draw each of E experts' weights [E, ...] by `beta` towards the mean of the others, in place.

    Their distances from the mean are multiplied by 1 - beta E / (E - 1), below zero for beta > (E - 1) / E.
    """
    others = weights_E.shape[0] - 1
    sum_1 = weights_E.sum(dim=0, keepdim=True)
    weights_E.mul_(1 - beta - beta / others).add_(sum_1, alpha=beta / others)


class RandomPartitionAveraging(RoutingLoss):
    """Random experts while training and averaging after each step; adds no loss."""

    reroutes = True

    def __init__(self, config: RandomPartition, model: PreTrainedModel) -> None:
        """Raises `ConfigError` for layers of one expert, and for a share that draws experts beyond their mean."""
        count = num_experts(model)
        if count < 2:
            raise ConfigError(
                "tune.losses: random_partition averages experts, and the model has one per layer.", hint="Leave it out."
            )
        if config.share * count > count - 1:
            raise ConfigError(
                f"tune.losses: random_partition's share of {config.share:g} draws {count} experts beyond their mean, "
                f"where a share of {count - 1}/{count} makes them the same.",
                hint="Lower it; 0.1 is the default.",
            )
        self.share = config.share
        self.seed = config.seed
        self.model = model
        self.step, self.micro, self.beta = 0, -1, 0.0

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Tokens go where the partition says."""
        counting = self.model.base_model.register_forward_pre_hook(self._count)
        try:
            with reroute(self.model, self._decide):
                yield
        finally:
            counting.remove()

    def begin(self, step: int, total: int) -> None:
        """Take up the step's partition and beta."""
        self.step, self.micro, self.beta = step, -1, linear(0.0, self.share, step, total)

    def end(self, loads: list[Tensor]) -> None:  # noqa: ARG002
        """Draw the experts together, those that train."""
        for parameter in self._weights():
            draw_together(parameter, self.beta)

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """`expert_distance`: the experts' distance from their mean by its norm, root mean square over all weights;
        `averaging_share`: beta.
        """
        distance, norm = 0.0, 0.0
        for parameter in self._weights():
            mean = parameter.mean(dim=0, keepdim=True)
            distance += float((parameter - mean).square().sum())
            norm += float(mean.square().sum()) * len(parameter)
        return {"expert_distance": (distance / norm) ** 0.5, "averaging_share": self.beta}

    def _weights(self) -> list[nn.Parameter]:
        return [weights for module in experts(self.model) for weights in module.parameters() if weights.requires_grad]

    def _count(self, body: nn.Module, _args: Any) -> None:
        self.micro += body.training

    def _decide(self, layer: int, _router: Any, _gating: Gating, routed: Routed) -> Routed:
        tokens, count = routed.logits.shape
        dealt = random_partition(tokens * num_workers(), count, self.seed, self.step, self.micro, layer)
        ids_T = dealt.chunk(num_workers())[rank()]
        gates_T1 = routed.weights.detach().sum(dim=-1, keepdim=True)
        return Routed(routed.logits, gates_T1, ids_T.to(routed.ids.device).unsqueeze(1))
