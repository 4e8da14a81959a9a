"""Tokens of a domain are drawn to the domain's own expert (NeKo, arXiv 2411.05945).

NeKo gives each data set an expert and, while training, sends its tokens there and to one more of the router's choice.
Here the assignment is learnt instead of imposed, so that it holds when a token is served without its domain's name:
for a token of domain d, with O_d the experts of the layer whose origin is d, the loss is the cross entropy
    L = -(1 / |O_d|) sum_{i in O_d} log p_i,    p = softmax(logits), or s / sum_j s_j for sigmoid scores s,
mean over the tokens of a step that have such an expert, then over layers. Several experts of one origin share the
target. Tokens of a domain that no expert comes from are left to the router. Its weight goes linearly from `coefficient`
at the first step to `final_coefficient` at the last.

Each micro-batch and worker divides its sum by the step's mean of such tokens per micro-batch and worker: however the
batch is split, every token counts alike.

T tokens of a micro-batch, N sequences of a step, E experts, K chosen per token, C domains, L sparse layers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moestro.config import DomainSupervision
from moestro.errors import ConfigError
from moestro.models.routing import own_choices
from moestro.training.auxiliary import MicroBatch
from moestro.training.parallel import mean as mean_over_workers
from moestro.training.parallel import num_workers
from moestro.training.parallel import total as total_over_workers
from moestro.training.routing_losses.loss import Routing, RoutingLoss
from moestro.training.routing_losses.schedule import linear


def own_experts(origins: Sequence[Sequence[str]], domains: Sequence[str]) -> list[Tensor]:
    """By layer: whether an expert comes from a domain, [C, E], booleans."""
    return [torch.tensor([[origin == domain for origin in layer] for domain in domains]) for layer in origins]


def supervision_loss(probabilities_TE: Tensor, own_TE: Tensor, supervised: float) -> Tensor:
    """Cross entropy towards each token's own experts, nats (scalar), summed over the tokens that have one and divided
    by `supervised`, their number; 0 if none has.

    `own_TE`: which experts are a token's own, booleans.
    """
    count_T = own_TE.sum(dim=-1)
    if not count_T.any():
        return torch.zeros(())
    log_TE = probabilities_TE.clamp_min(torch.finfo(probabilities_TE.dtype).tiny).log()
    loss_T = -(log_TE * own_TE).sum(dim=-1) / count_T.clamp_min(1)
    return loss_T.sum() / supervised


class DomainRouting(RoutingLoss):
    """The cross entropy of every sparse layer."""

    def __init__(
        self,
        config: DomainSupervision,
        model: PreTrainedModel,
        origins: Sequence[Sequence[str]],
        domains: Sequence[str],
    ) -> None:
        """Raises `ConfigError` if no expert comes from any of the domains."""
        self.config = config
        self.model = model
        self.domains = domains
        self.own_LCE = own_experts(origins, domains)
        if not any(own_CE.any() for own_CE in self.own_LCE):
            there = sorted({origin for layer in origins for origin in layer})
            raise ConfigError(
                f"tune.losses: domain_supervision has no expert to draw tokens to: none comes from "
                f"{', '.join(domains)}.",
                hint=f"Experts come from {', '.join(there)}. Leave it out, or mix branches of these domains.",
            )
        self.begin(0, 1)

    def begin(self, step: int, total: int) -> None:
        """Forget the step before and take up this one's weight."""
        self.coefficient = linear(self.config.coefficient, self.config.final_coefficient, step, total)
        self.values: list[float] = []
        self.hits_C2 = torch.zeros(len(self.domains), 2, dtype=torch.float64)

    def loss(self, routing: Routing) -> Tensor:
        """Mean over layers, weighted."""
        micro = routing.micro
        domains_T = micro.domains_B.repeat_interleave(micro.tokens_BS.shape[1] - 1)
        self._count(routing, domains_T)
        usual_C = self._usual_tokens(micro)
        layers = [
            supervision_loss(routing.probabilities(layer), own_CE[domains_T], float(usual_C[own_CE.any(dim=1)].sum()))
            for layer, own_CE in enumerate(self.own_LCE)
        ]
        value = torch.stack(layers).mean()
        self.values.append(float(value.detach()))
        return self.coefficient * value

    def end(self, loads: list[Tensor]) -> None:  # noqa: ARG002
        """Average the figure over workers and add up their counts."""
        self.values = [mean_over_workers(sum(self.values) / len(self.values))]
        self.hits_C2 = total_over_workers(self.hits_C2)

    def metrics(self) -> dict[str, float]:
        """`domain_supervision`: unweighted mean over layers and the step's tokens; `own_expert/DOMAIN`: share of its
        tokens that chose an expert of its own, over the layers that have one.
        """
        figures = {"domain_supervision": sum(self.values) / len(self.values)}
        for domain, (hits, tokens) in zip(self.domains, self.hits_C2.tolist(), strict=True):
            if tokens:
                figures[f"own_expert/{domain}"] = hits / tokens
        return figures

    def _usual_tokens(self, micro: MicroBatch) -> Tensor:
        """Each domain's tokens in the step, by its number of micro-batches and workers, [C]."""
        sequences_C = total_over_workers(torch.bincount(micro.step_domains_N, minlength=len(self.domains)).double())
        sequences, positions = len(micro.domains_B), micro.tokens_BS.shape[1] - 1
        parts = num_workers() * len(micro.step_domains_N) / sequences
        return sequences_C * positions / parts

    def _count(self, routing: Routing, domains_T: Tensor) -> None:
        for own_CE, ids_TK in zip(self.own_LCE, own_choices(self.model, routing.record), strict=True):
            hit_T = own_CE[domains_T].gather(1, ids_TK).any(dim=1)
            for domain, has_own in enumerate(own_CE.any(dim=1)):
                if has_own:
                    of_domain_T = domains_T == domain
                    self.hits_C2[domain] += torch.tensor([int(hit_T[of_domain_T].sum()), int(of_domain_T.sum())])
