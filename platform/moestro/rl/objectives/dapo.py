"""DAPO (arXiv 2503.14476, eq. 8 and section 3.1): every token of the batch alike, clipped higher above than below.

L = 1/sum_i |o_i| sum_i sum_t -min(r_it A_i, clip(r_it, 1 - low, 1 + high) A_i).
"""

from torch import Tensor

from moestro.config import Dapo
from moestro.rl.objectives.surrogate import Surrogate, Tokens, clipped, token_mean


def surrogate(config: Dapo, tokens: Tokens) -> Surrogate:
    """Clipped per token."""
    return clipped(tokens.log_ratio, tokens.advantages_B, low=config.clip, high=config.clip_high)


def weights(mask_BS: Tensor, max_tokens: int) -> Tensor:  # noqa: ARG001  (all objectives are asked alike)
    """Mean over all tokens."""
    return token_mean(mask_BS)
