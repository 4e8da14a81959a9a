"""How far apart two policies are at sampled tokens: penalties, and the figures of rollout engine against trainer."""

from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]
EXTREME_RATIO = 2.0
LARGEST_DIFFERENCE = 20.0
"""Nats, either way."""


def penalty(logprobs: Tensor, reference: Tensor, estimator: Estimator) -> Tensor:
    """Estimates of KL(policy || reference) per token in nats (Schulman 2020), attached to `logprobs`.

    With d = log p - log p_reference: k1 = d, k2 = d^2 / 2, k3 = exp(-d) + d - 1. For k3 a d beyond 20 nats counts as
    20 and has no gradient, as in verl (`kl_penalty`, `low_var_kl`): exp(-d) would be infinite.
    """
    difference = logprobs - reference
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    held = difference.clamp(-LARGEST_DIFFERENCE, LARGEST_DIFFERENCE)
    return torch.exp(-held) + held - 1


def k3_divergence(train_logprobs: Tensor, engine_logprobs: Tensor) -> float:
    """Mean of r - 1 - log r with r = pi_train / pi_engine over tokens sampled from the engine.

    An unbiased estimate, never negative, of KL(engine || trainer) in nats (Schulman 2020; metric of arXiv 2510.11370).
    """
    difference = (train_logprobs - engine_logprobs).double()
    return float((torch.expm1(difference) - difference).mean())


def extreme_fraction(train_logprobs: Tensor, engine_logprobs: Tensor, threshold: float = EXTREME_RATIO) -> float:
    """F(threshold): share of tokens with max(r, 1 / r) above `threshold`, r = pi_train / pi_engine
    (arXiv 2510.11370, section 2.3)."""
    difference = (train_logprobs - engine_logprobs).double().abs()
    return float((difference.exp() > threshold).double().mean())
