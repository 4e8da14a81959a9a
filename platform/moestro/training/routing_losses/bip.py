"""Balance by solving each batch's assignment before it is routed (BIP-Based Balancing, arXiv 2502.15451).

With s the scores of T tokens, the best balanced assignment is the linear program
    max sum_ij s_ij x_ij,   sum_j x_ij = K for every token i,   sum_i x_ij = C for every expert j,   0 <= x_ij <= 1
with C = K T / E. Its dual has a price p_i per token and q_j per expert, and each half of it has a closed-form minimum,
which `iterations` steps take in turn:
    p_i = between the K-th and (K+1)-th largest of s_ij - q_j over experts j
    q_j = between the C-th and (C+1)-th largest of s_ij - p_i over tokens i
Then token i takes the top K of s_ij - q_j, with the gates of s. q is carried on: the next batch starts from it.

Two choices differ from the paper's text. It asks for sum_j x_ij <= K and sum_i x_ij <= C, whose prices are cut off at
zero: as E C = K T both programs have the same solution, but with the cut the steps can only push crowded experts away,
and take many times as long where loads are skewed. And it takes the lower end of each interval of minima, at which
tokens tie; here it is the middle.

-q is written into the router's correction bias, which makes the balanced choice the router's own: what is trained is
what is served, with the last batch's q. All workers' tokens are one batch. A token's experts depend on the tokens
beside and after it while it trains, as under expert choice, and no longer when q stands.

T tokens, E experts, K chosen per token.
"""

import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moestro.config import BipBalance
from moestro.errors import ConfigError
from moestro.models.gating import Gating, Routed
from moestro.models.rerouting import reroute
from moestro.training.parallel import gathered
from moestro.training.parallel import total as total_over_workers
from moestro.training.routing_losses.correction_bias import biased_routers, spread
from moestro.training.routing_losses.loss import Routing, RoutingLoss


def balancing_prices(scores_TE: Tensor, top_k: int, iterations: int, prices_E: Tensor) -> Tensor:
    """The experts' prices q [E] after `iterations` steps from `prices_E`; the top K of scores - q are balanced.

    Where C is no whole number, some experts get the next smaller one and some the next larger. Needs K < E.
    """
    tokens, experts = scores_TE.shape
    capacity = top_k * tokens / experts
    below, above = math.floor(capacity), math.ceil(capacity) - 1
    scores_ET = scores_TE.T.contiguous()
    for _ in range(iterations):
        best_TK = (scores_TE - prices_E).topk(top_k + 1, dim=1).values
        token_prices_T = (best_TK[:, top_k] + best_TK[:, top_k - 1]) / 2
        best_EC = (scores_ET - token_prices_T).topk(below + 1, dim=1).values
        prices_E = (best_EC[:, below] + best_EC[:, above]) / 2
    return prices_E


class BipBalancing(RoutingLoss):
    """Solves every micro-batch of every layer. Raises `ConfigError` for routers without a correction bias, or that
    choose within groups, which no price per expert can balance."""

    # `reroutes` stays false: the bias is set before the choice, so that the loads of the choice are the router's own.

    def __init__(self, config: BipBalance, model: PreTrainedModel) -> None:
        self.iterations = config.iterations
        self.model = model
        self.routers = biased_routers(model, config.type)
        self.sums = torch.zeros(2, dtype=torch.float64)
        for router in self.routers:
            if router.topk_group < router.num_group:
                raise ConfigError(
                    f"tune.losses: bip balances over all experts, and the model's routers choose from "
                    f"{router.topk_group} of {router.num_group} groups.",
                    hint="Balance by `loss_free`, which heeds groups, or mix with num_groups_per_tok = num_groups.",
                )

    def attached(self) -> AbstractContextManager[None]:
        """Every router's choice waits for the prices."""
        return reroute(self.model, self._decide)

    def begin(self, step: int, total: int) -> None:  # noqa: ARG002
        """Forget the step before."""
        self.sums = torch.zeros(2, dtype=torch.float64)

    def loss(self, routing: Routing) -> Tensor:
        """Adds up what the choice scores and what the unbalanced one would have; the loss is 0."""
        for logits_TE, ids_TK in zip(routing.record.logits, routing.record.ids, strict=True):
            scores_TE = logits_TE.detach().sigmoid().double()
            largest_TK = scores_TE.topk(ids_TK.shape[1], dim=1).values
            self.sums += torch.stack([scores_TE.gather(1, ids_TK).sum(), largest_TK.sum()])
        return torch.zeros(())

    def end(self, loads: list[Tensor]) -> None:  # noqa: ARG002
        """Add up the workers' scores."""
        self.sums = total_over_workers(self.sums)

    def metrics(self) -> dict[str, float]:
        """`balance_score_loss`: share of the scores that balance has cost; `correction_bias_spread`: largest less
        smallest bias of a layer, the most of all layers."""
        chosen, largest = self.sums.tolist()
        return {"balance_score_loss": 1 - chosen / largest, "correction_bias_spread": spread(self.routers)}

    def _decide(self, _layer: int, router: Any, gating: Gating, routed: Routed) -> Routed:
        if router.top_k == router.num_experts:
            return routed
        bias_E = router.e_score_correction_bias
        scores_TE = gathered(routed.logits.detach().sigmoid().to(bias_E.dtype))
        bias_E.copy_(-balancing_prices(scores_TE, router.top_k, self.iterations, -bias_E))
        ids_TK = gating.choose(router, routed.logits)
        return Routed(routed.logits, gating.gates(router, routed, ids_TK), ids_TK)
