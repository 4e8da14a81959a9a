"""Load balance between experts (GShard, arXiv 2006.16668; Switch, 2101.03961), and figures of it.

Per layer
    L = E sum_i f_i P_i,   f_i = (choices of expert i) / (K T),   P_i = mean over tokens of p_i
where p = softmax(logits), or, where the router scores by sigmoids s, p_i = s_i / sum_j s_j (DeepSeek-V3, 2412.19437,
eq. 17 to 20). f counts the experts that were really chosen, a correction bias and groups included: it is their load
that is to be balanced. (DeepSeek's f leaves the bias out; the two differ only where there is one.)
L is 1 where loads or probabilities are uniform and E where everything goes to one expert (K = 1). The gradient flows
through P only.

`SwitchBalance` takes f of the micro-batch. `GlobalBatchBalance` takes it from a buffer of counts over the step (Demons
in the Detail, arXiv 2501.11873): for micro-batch m, f is counted over micro-batches 1 to m, P is of micro-batch m; the
last one thus sees the whole batch, and the sum of their gradients is not quite that of the concatenated batch. Both
count f over all workers; P is of each worker's own tokens, and averaging gradients over workers makes it that of all.

T tokens, E experts, K chosen per token.
"""

import torch
from torch import Tensor

from moestro.config import GlobalBatchLoss, SwitchLoss
from moestro.training.routing_losses.loss import Routing, RoutingLoss


def load_balancing_loss(counts_E: Tensor, probabilities_TE: Tensor) -> Tensor:
    """E sum_i f_i P_i with f_i = counts_E[i] / sum(counts_E); scalar, differentiable in the probabilities."""
    fractions_E = counts_E / counts_E.sum()
    return len(counts_E) * (fractions_E * probabilities_TE.mean(dim=0)).sum()


def expert_counts(ids_TK: Tensor, num_experts: int) -> Tensor:
    """How often each expert was chosen, [E], float64 (exact for any count, fit for dividing)."""
    return torch.bincount(ids_TK.flatten(), minlength=num_experts).double()


def max_violation(counts_E: Tensor) -> float:
    """(max load - mean load) / mean load, MaxVio of arXiv 2408.15664; 0 in balance."""
    return float(counts_E.max() / counts_E.mean() - 1)


def load_variation(counts_E: Tensor) -> float:
    """Standard deviation of the experts' loads by their mean; 0 in balance."""
    return float(counts_E.std(correction=0) / counts_E.mean())


class SwitchBalance(RoutingLoss):
    """The loss within each micro-batch."""

    def __init__(self, config: SwitchLoss | GlobalBatchLoss) -> None:
        self.coefficient = config.coefficient

    def counts(self, routing: Routing) -> list[Tensor]:
        """The counts that f is made of, by layer."""
        return routing.micro_loads

    def loss(self, routing: Routing) -> Tensor:
        """Mean over layers, weighted."""
        layers = [
            load_balancing_loss(counts_E.float(), routing.probabilities(layer))
            for layer, counts_E in enumerate(self.counts(routing))
        ]
        return self.coefficient * torch.stack(layers).mean()


class GlobalBatchBalance(SwitchBalance):
    """The loss over the batch of a step."""

    def counts(self, routing: Routing) -> list[Tensor]:
        """The counts that f is made of, by layer."""
        return routing.loads
