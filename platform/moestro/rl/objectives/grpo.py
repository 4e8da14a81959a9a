"""GRPO (DeepSeekMath, arXiv 2402.03300, eq. 3): PPO's surrogate per token, each sequence of equal weight.

L = 1/B sum_i 1/|o_i| sum_t -min(r_it A_i, clip(r_it, 1 - low, 1 + high) A_i). The KL term is `rl.kl`.
"""

from torch import Tensor

from moestro.config import Grpo
from moestro.rl.objectives.surrogate import Surrogate, Tokens, clipped, sequence_mean


def surrogate(config: Grpo, tokens: Tokens) -> Surrogate:
    """Clipped per token."""
    return clipped(tokens.log_ratio, tokens.advantages_B, low=config.clip, high=config.clip_high)


def weights(mask_BS: Tensor, max_tokens: int) -> Tensor:  # noqa: ARG001  (all objectives are asked alike)
    """Mean over a sequence's tokens, then over sequences."""
    return sequence_mean(mask_BS)
