"""Entropy of routing, in nats. T tokens, E experts."""

import torch
from torch import Tensor


def entropy(probabilities: Tensor) -> Tensor:
    """-sum_i p_i log p_i over the last dimension; its gradient is finite where p_i = 0."""
    smallest = torch.finfo(probabilities.dtype).tiny
    return -(probabilities * probabilities.clamp_min(smallest).log()).sum(dim=-1)
