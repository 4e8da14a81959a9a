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
no right answer, so here a sequence is done well if its own mean cross entropy is in the better half of its
micro-batch; and the embedding is the mean of the last hidden state, so that no second model is needed. Neighbours are
found within the micro-batch: it should hold several sequences of a kind, so prefer large ones over accumulation.

B sequences, S positions, S' = S + 1, T = B S tokens, D hidden, E experts, R = layers * E, N neighbours, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from moestro.config import RomaLoss
from moestro.training.auxiliary import MicroBatch
from moestro.training.parallel import mean as mean_over_workers
from moestro.training.routing_losses.loss import Routing, RoutingLoss


@torch.no_grad()
def neighbour_weights(embedding_BD: Tensor, losses_B: Tensor, *, neighbours: int, bandwidth: float) -> Tensor:
    """W [B, B]: rows add up to one over a sequence's neighbours; a row is zero if the sequence has none.

    `embedding_BD`: any length; `losses_B`: each sequence's mean cross entropy.
    """
    count = len(losses_B)
    unit_BD = functional.normalize(embedding_BD, dim=-1)
    squared_BB = (2 - 2 * unit_BD @ unit_BD.T).clamp_min(0)
    well_B = torch.zeros(count, dtype=torch.bool)
    well_B[losses_B.argsort(stable=True)[: (count + 1) // 2]] = True
    eligible_BB = well_B & ~torch.eye(count, dtype=torch.bool)
    nearest = squared_BB.masked_fill(~eligible_BB, float("inf")).topk(min(neighbours, count), largest=False)
    # Relative to the nearest: far neighbours of a narrow Gaussian must not all round to zero.
    exponent_BN = (nearest.values[:, :1] - nearest.values).nan_to_num(nan=float("-inf")) / (2 * bandwidth**2)
    weights_BN = exponent_BN.exp()
    weights_BN = weights_BN / weights_BN.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(weights_BN.dtype).tiny)
    return torch.zeros_like(squared_BB).scatter(1, nearest.indices, weights_BN)


def alignment_loss(routing_BR: Tensor, weights_BB: Tensor) -> Tensor:
    """Mean over sequences of sum_j W_ij |r_i - r_j|^2, without gradient through r_j; scalar."""
    difference_BBR = routing_BR.unsqueeze(1) - routing_BR.detach().unsqueeze(0)
    return (weights_BB * difference_BBR.square().sum(dim=-1)).sum(dim=-1).mean()


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
        """The weighted loss."""
        config, micro = self.config, routing.micro
        sequences = len(micro.tokens_BS)
        last = range(len(routing.record.logits))[-config.layers :]
        routing_BR = torch.cat(
            [routing.probabilities(layer).unflatten(0, (sequences, -1)).mean(dim=1) for layer in last], dim=-1
        )
        weights_BB = neighbour_weights(
            micro.hidden_BSD.detach().float().mean(dim=1),
            sequence_losses(self.model.get_output_embeddings(), micro),
            neighbours=config.neighbours,
            bandwidth=config.bandwidth,
        )
        value = alignment_loss(routing_BR, weights_BB)
        self.values.append(float(value.detach()))
        return config.coefficient * value

    def end(self, loads: list[Tensor]) -> None:  # noqa: ARG002
        """Average the figure over workers."""
        self.values = [mean_over_workers(sum(self.values) / len(self.values))]

    def metrics(self) -> dict[str, float]:
        """`routing_distance`: the unweighted loss, mean over micro-batches."""
        return {"routing_distance": sum(self.values) / len(self.values)}
