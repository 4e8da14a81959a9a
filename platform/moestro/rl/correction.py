"""Importance weights between the engine that sampled and the trainer that learns.

w = pi_old / pi_engine per token, or its product over a sequence; truncated (TIS, Yao et al. 2025) or masked (IcePop,
Ling Team 2025). Shapes: B sequences, S positions.
"""

import torch
from torch import Tensor

from moestro.config import Correction


def importance_weights(config: Correction, old_BS: Tensor, engine_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """Weights [B, S], detached, 1 outside the mask; `old_BS` and `engine_BS` are log-probabilities in nats."""
    log_BS = torch.where(mask_BS, old_BS - engine_BS, 0.0).detach()
    if config.level == "sequence":
        log_BS = log_BS.sum(dim=1, keepdim=True).expand(mask_BS.shape)
    weights_BS = torch.exp(log_BS)
    if config.type == "truncate":
        weights_BS = weights_BS.clamp(max=config.high)
    else:
        kept_BS = (weights_BS >= config.low) & (weights_BS <= config.high)
        weights_BS = torch.where(kept_BS, weights_BS, 0.0)
    return torch.where(mask_BS, weights_BS, 1.0)
