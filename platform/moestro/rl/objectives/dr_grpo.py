"""Dr. GRPO (arXiv 2503.20783, section 3.2): GRPO without the weights that favour short right and long wrong answers.

L = 1/(B max_tokens) sum_i sum_t -min(r_it A_i, clip(r_it, 1 - low, 1 + high) A_i), A_i = reward less the group's mean,
not divided by its standard deviation (`rl.scale_rewards` is `none` where nothing else is said).
"""

from torch import Tensor

from moestro.config import DrGrpo
from moestro.rl.objectives.surrogate import Surrogate, Tokens, clipped


def surrogate(config: DrGrpo, tokens: Tokens) -> Surrogate:
    """Clipped per token."""
    return clipped(tokens.log_ratio, tokens.advantages_B, low=config.clip, high=config.clip_high)


def weights(mask_BS: Tensor, max_tokens: int) -> Tensor:
    """A constant for all tokens, however long their sequence."""
    return mask_BS / (len(mask_BS) * max_tokens)
