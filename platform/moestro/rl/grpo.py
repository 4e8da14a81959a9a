"""The formulas of GRPO (DeepSeekMath, arXiv 2402.03300) with the token-mean loss of DAPO (arXiv 2503.14476, eq. 8).

Shapes: B sequences, N prompts, G completions per prompt, S positions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

ADVANTAGE_EPS = 1e-4


def group_advantages(rewards_NG: Tensor) -> Tensor:
    """How much better a completion is than its siblings: (reward - mean) / (std + 1e-4), [N, G].

    The standard deviation is the sample's (divisor G - 1), as in TRL and verl; a group of equal rewards gives zeros.
    """
    mean_N1 = rewards_NG.mean(dim=1, keepdim=True)
    return (rewards_NG - mean_N1) / (rewards_NG.std(dim=1, keepdim=True) + ADVANTAGE_EPS)


@dataclass(frozen=True)
class PolicyLoss:
    """The loss of some sequences."""

    total: Tensor
    """Sum over their completion tokens, attached to the graph: divide by the tokens of the whole batch."""
    clipped: int
    """Tokens at which the clipped ratio decided."""


def policy_loss(
    logprobs_BS: Tensor, old_logprobs_BS: Tensor, advantages_B: Tensor, mask_BS: Tensor, *, clip: float
) -> PolicyLoss:
    """Clipped surrogate (PPO, arXiv 1707.06347, eq. 7): -min(r A, clip(r, 1 - clip, 1 + clip) A), r = exp(new - old).

    `mask_BS` marks the completion tokens. There is no KL term and no value function.
    """
    ratio_BS = torch.exp(torch.where(mask_BS, logprobs_BS - old_logprobs_BS, 0.0))
    advantages_BS = advantages_B[:, None]
    free_BS = ratio_BS * advantages_BS
    bound_BS = ratio_BS.clamp(1 - clip, 1 + clip) * advantages_BS
    total = -torch.where(mask_BS, torch.minimum(free_BS, bound_BS), 0.0).sum()
    return PolicyLoss(total, int(((bound_BS < free_BS) & mask_BS).sum()))


def k3_divergence(train_logprobs: Tensor, engine_logprobs: Tensor) -> float:
    """Mean of r - 1 - log r with r = pi_train / pi_engine over tokens sampled from the engine.

    An unbiased estimate, never negative, of KL(engine || trainer) in nats (Schulman 2020; metric of arXiv 2510.11370).
    """
    difference = (train_logprobs - engine_logprobs).double()
    return float((torch.expm1(difference) - difference).mean())
