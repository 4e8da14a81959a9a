"""Routing manifold alignment: sequences that are alike take like routes (RoMA, arXiv 2511.07419).

With r_i the routing of sequence i, N(i) its nearest neighbours among the sequences that the model does well, and e_i
its embedding, |e_i| = 1,
    L = mean over i of sum_{j in N(i)} W_ij |r_i - r_j|^2,
    W_ij = exp(-|e_i - e_j|^2 / (2 bandwidth^2)), divided by its sum over N(i),
without gradient through W and r_j: a sequence is drawn to its neighbours, not they to it. r is the routing
probabilities (softmax(logits), or s / sum_j s_j for sigmoid scores s) of the last `layers` sparse layers one after the
other, mean over the sequence's tokens. Meant for `trainable: router`.

How this differs from the paper, which post-trains on questions: there N(i) is found among all training samples that
the model answers correctly, in the space of a sentence-embedding model, with routing taken at the last token. Text has
no right answer, so here a sequence is done well if its own mean cross entropy is in the better half of its domain's in
the micro-batch (a domain of harder text has its better half too); and the embedding is the mean of the last hidden
state, so that no second model is needed. Neighbours are found within the micro-batch, that of all workers: it should
hold several sequences of a kind, so prefer large ones over accumulation.

B sequences of a worker, G of all workers, S positions, S' = S + 1, T = B S tokens, D hidden, E experts,
R = layers * E, N neighbours, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from moestro.config import RomaLoss
from moestro.training.auxiliary import MicroBatch
from moestro.training.parallel import gathered, num_workers, rank
from moestro.training.parallel import mean as mean_over_workers
from moestro.training.routing_losses.loss import Routing, RoutingLoss


def predicted_well(losses_G: Tensor, domains_G: Tensor) -> Tensor:
    """Which sequences are in the better half of their domain's by mean cross entropy, the odd one included; [G]."""
    well_G = torch.zeros(len(losses_G), dtype=torch.bool)
    for domain in domains_G.unique():
        (of_domain,) = (domains_G == domain).nonzero(as_tuple=True)
        order = losses_G[of_domain].argsort(stable=True)
        well_G[of_domain[order[: (len(order) + 1) // 2]]] = True
    return well_G


@torch.no_grad()
def neighbour_weights(embedding_GD: Tensor, well_G: Tensor, *, neighbours: int, bandwidth: float) -> Tensor:
    """W [G, G]: rows add up to one over a sequence's neighbours; a row is zero if the sequence has none.

    `embedding_GD`: any length; `well_G`: who can be a neighbour.
    """
    count = len(well_G)
    unit_GD = functional.normalize(embedding_GD, dim=-1)
    squared_GG = (2 - 2 * unit_GD @ unit_GD.T).clamp_min(0)
    eligible_GG = well_G & ~torch.eye(count, dtype=torch.bool)
    nearest = squared_GG.masked_fill(~eligible_GG, float("inf")).topk(min(neighbours, count), largest=False)
    # Relative to the nearest: far neighbours of a narrow Gaussian must not all round to zero.
    exponent_GN = (nearest.values[:, :1] - nearest.values).nan_to_num(nan=float("-inf")) / (2 * bandwidth**2)
    weights_GN = exponent_GN.exp()
    weights_GN = weights_GN / weights_GN.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(weights_GN.dtype).tiny)
    return torch.zeros_like(squared_GG).scatter(1, nearest.indices, weights_GN)


def alignment_loss(routing_BR: Tensor, routing_GR: Tensor, weights_BG: Tensor) -> Tensor:
    """Mean over B sequences of sum_j W_ij |r_i - r_j|^2 with j of G, without gradient through r_j; scalar."""
    difference_BGR = routing_BR.unsqueeze(1) - routing_GR.detach().unsqueeze(0)
    return (weights_BG * difference_BGR.square().sum(dim=-1)).sum(dim=-1).mean()


@torch.no_grad()
def sequence_losses(head: nn.Module, micro: MicroBatch) -> Tensor:
    """Each sequence's mean cross entropy, nats [B]."""
    losses = []
    for tokens_S, hidden_SD in zip(micro.tokens_BS, micro.hidden_BSD, strict=True):
        logits_SV = functional.linear(hidden_SD.to(head.weight.dtype), head.weight)  # type: ignore[arg-type]
        losses.append(functional.cross_entropy(logits_SV.float(), tokens_S[1:]))
    return torch.stack(losses)


class RoutingAlignment(RoutingLoss):
    """The loss on the last sparse layers."""

    def __init__(self, config: RomaLoss, model: PreTrainedModel) -> None:
        self.config = config
        self.model = model
        self.values: list[float] = []

    def begin(self, step: int, total: int) -> None:  # noqa: ARG002
        """Forget the step before."""
        self.values = []

    def loss(self, routing: Routing) -> Tensor:
        """The weighted loss of this worker's sequences; their neighbours are those of all workers."""
        config, micro = self.config, routing.micro
        sequences = len(micro.tokens_BS)
        last = range(len(routing.record.logits))[-config.layers :]
        routing_BR = torch.cat(
            [routing.probabilities(layer).unflatten(0, (sequences, -1)).mean(dim=1) for layer in last], dim=-1
        )
        losses_G = gathered(sequence_losses(self.model.get_output_embeddings(), micro))
        weights_GG = neighbour_weights(
            gathered(micro.hidden_BSD.detach().float().mean(dim=1)),
            predicted_well(losses_G, gathered(micro.domains_B)),
            neighbours=config.neighbours,
            bandwidth=config.bandwidth,
        )
        weights_BG = weights_GG.chunk(num_workers())[rank()]
        value = alignment_loss(routing_BR, gathered(routing_BR.detach()), weights_BG)
        self.values.append(float(value.detach()))
        return config.coefficient * value

    def end(self, loads: list[Tensor]) -> None:  # noqa: ARG002
        """Average the figure over workers."""
        self.values = [mean_over_workers(sum(self.values) / len(self.values))]

    def metrics(self) -> dict[str, float]:
        """`routing_distance`: the unweighted loss, mean over micro-batches."""
        return {"routing_distance": sum(self.values) / len(self.values)}
