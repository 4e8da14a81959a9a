"""GSPO (arXiv 2507.18071, eq. 5 and 7): one importance ratio per sequence, s_i = exp(1/|o_i| sum_t log r_it).

L = 1/B sum_i -min(s_i A_i, clip(s_i, 1 - low, 1 + high) A_i). A sequence's loss stands at each of its tokens, so that
their mean is the sequence's. A ratio above exp(10) counts as that and has no gradient, as in verl
(`compute_policy_loss_gspo`).
"""

from torch import Tensor

from moestro.config import Gspo
from moestro.rl.objectives.surrogate import Surrogate, Tokens, clipped, sequence_mean

LARGEST_LOG_RATIO = 10.0
"""Nats per token."""


def surrogate(config: Gspo, tokens: Tokens) -> Surrogate:
    """Clipped per sequence."""
    count_B1 = tokens.mask_BS.sum(dim=1, keepdim=True).clamp(min=1)
    log_ratio_B1 = tokens.log_ratio.sum(dim=1, keepdim=True) / count_B1
    log_ratio_B1 = log_ratio_B1.clamp(max=LARGEST_LOG_RATIO)
    found = clipped(log_ratio_B1, tokens.advantages_B, low=config.clip, high=config.clip_high)
    shape = tokens.mask_BS.shape
    return Surrogate(found.loss_BS.expand(shape), found.low_BS.expand(shape), found.high_BS.expand(shape))


def weights(mask_BS: Tensor, max_tokens: int) -> Tensor:  # noqa: ARG001  (all objectives are asked alike)
    """Mean over a sequence's tokens, then over sequences."""
    return sequence_mean(mask_BS)
