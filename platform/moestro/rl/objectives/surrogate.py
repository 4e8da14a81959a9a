"""What all objectives share: the tokens they see, what they answer with, and PPO's clipped surrogate.

Shapes: B sequences, S positions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST_LOG_RATIO = 20.0
"""Nats, either way."""


@dataclass(frozen=True)
class Tokens:
    """A micro-batch of completions; what lies outside the mask counts for nothing."""

    logprobs_BS: Tensor
    """Of the policy that learns, attached to the graph, nats."""
    old_logprobs_BS: Tensor
    """Of the policy before the batch, recomputed by the trainer, nats."""
    advantages_B: Tensor
    mask_BS: Tensor
    """True at completion tokens."""

    @property
    def log_ratio(self) -> Tensor:
        """log of new by old probability, [B, S], 0 outside the mask."""
        return torch.where(self.mask_BS, self.logprobs_BS - self.old_logprobs_BS, 0.0)


@dataclass(frozen=True)
class Surrogate:
    """What each token adds to the loss."""

    loss_BS: Tensor
    """Attached to the graph."""
    low_BS: Tensor
    """Tokens whose ratio was held at the lower bound: they have no gradient."""
    high_BS: Tensor
    """Tokens whose ratio was held at the upper bound."""


def clipped(log_ratio_BS: Tensor, advantages_B: Tensor, *, low: float, high: float | None) -> Surrogate:
    """-min(r A, clip(r, 1 - low, 1 + high) A) with r = exp(log_ratio) (PPO, arXiv 1707.06347, eq. 7).

    `high` None is as far above as below; log_ratio is [B, S], or [B, 1] for one ratio per sequence. Beyond 20 nats it
    counts as 20 and has no gradient, as in verl (`compute_policy_loss_vanilla`): an infinite ratio without an advantage
    would be NaN.
    """
    log_ratio_BS = log_ratio_BS.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    ratio_BS, advantages_B1 = torch.exp(log_ratio_BS), advantages_B[:, None]
    upper = 1 + (low if high is None else high)
    free_BS = ratio_BS * advantages_B1
    bound_BS = ratio_BS.clamp(1 - low, upper) * advantages_B1
    decided_BS = bound_BS < free_BS
    return Surrogate(
        -torch.minimum(free_BS, bound_BS), decided_BS & (ratio_BS < 1 - low), decided_BS & (ratio_BS > upper)
    )


def token_mean(mask_BS: Tensor) -> Tensor:
    """Every completion token alike: 1 / tokens."""
    return mask_BS / mask_BS.sum().clamp(min=1)


def sequence_mean(mask_BS: Tensor) -> Tensor:
    """Every sequence alike, and within it every token: 1 / (B tokens of the sequence)."""
    return mask_BS / mask_BS.sum(dim=1, keepdim=True).clamp(min=1) / len(mask_BS)
