"""Advantages from rewards: how much better a completion is than its siblings.

Shapes: N prompts, G completions per prompt. NaN stands for a completion that no reward function judged.
"""

from typing import Literal

import torch
from torch import Tensor

EPS = 1e-4


def advantages(rewards_NG: Tensor, scale: Literal["group", "batch", "none"]) -> Tensor:
    """(reward - group's mean) / (standard deviation + 1e-4), [N, G]; 0 where the reward is NaN.

    The standard deviation is the sample's (divisor one less than the number of rewards), as in TRL and verl: the
    group's (DeepSeekMath, arXiv 2402.03300), the batch's (REINFORCE++, arXiv 2501.03262), or none is divided by
    (Dr. GRPO, arXiv 2503.20783). A group of equal rewards gives zeros, and so does one with a single reward.
    """
    judged_NG = ~rewards_NG.isnan()
    centred_NG = rewards_NG - rewards_NG.nanmean(dim=1, keepdim=True)
    if scale == "group":
        centred_NG = centred_NG / (_std(rewards_NG, dim=1) + EPS)
    elif scale == "batch":
        centred_NG = centred_NG / (_std(rewards_NG.reshape(1, -1), dim=1) + EPS)
    return torch.where(judged_NG, centred_NG, 0.0)


def group_std(rewards_NG: Tensor) -> Tensor:
    """Standard deviation of each group's rewards, [N]; 0 for fewer than two."""
    return _std(rewards_NG, dim=1).squeeze(1)


def _std(rewards: Tensor, *, dim: int) -> Tensor:
    judged = ~rewards.isnan()
    count = judged.sum(dim=dim, keepdim=True)
    centred = torch.where(judged, rewards - rewards.nanmean(dim=dim, keepdim=True), 0.0)
    return (centred.square().sum(dim=dim, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
