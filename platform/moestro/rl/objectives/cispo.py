"""CISPO (MiniMax-M1, arXiv 2506.13585, eq. 4): the importance weight is clipped and detached, the gradient never is.

L = 1/sum_i |o_i| sum_i sum_t -sg(min(r_it, max_ratio)) A_i log p_it. There is no lower bound, as in ScaleRL
(arXiv 2510.13786).
"""

import torch
from torch import Tensor

from moestro.config import Cispo
from moestro.rl.objectives.surrogate import Surrogate, Tokens, token_mean


def surrogate(config: Cispo, tokens: Tokens) -> Surrogate:
    """Weighted log-likelihood per token."""
    ratio_BS = torch.exp(tokens.log_ratio).detach()
    logprobs_BS = torch.where(tokens.mask_BS, tokens.logprobs_BS, 0.0)
    high_BS = ratio_BS > config.max_ratio
    loss_BS = -ratio_BS.clamp(max=config.max_ratio) * tokens.advantages_B[:, None] * logprobs_BS
    return Surrogate(loss_BS, torch.zeros_like(high_BS), high_BS)


def weights(mask_BS: Tensor, max_tokens: int) -> Tensor:  # noqa: ARG001  (all objectives are asked alike)
    """Mean over all tokens."""
    return token_mean(mask_BS)
