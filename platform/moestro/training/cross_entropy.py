"""Cross entropy of an output head without the logits of the whole batch in memory.

The head's gradients are made in the forward pass, one block of rows at a time, while the block's logits are in the
cache, as in Cut Cross-Entropy (arXiv 2411.09009) and Liger Kernel. Logits exist in float32 only for one block.

Shapes: T tokens, D hidden, V vocabulary, R rows of a block.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moestro_kernels.products import product, product_into

BLOCK_LOGITS = 1 << 20
"""Logits of a block while the vocabulary is small; 4 MB of float32 stay in the cache."""


def head_cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> Tensor:
    """Mean over tokens of -log softmax(hidden_TD weight_VD^T)[labels_T], in nats (scalar, float32); 0 for no token.

    Under `torch.autocast("cpu")` the products run in the autocast type; softmax and sums are float32 always.
    """
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else weight_VD.dtype
    loss: Tensor = _HeadCrossEntropy.apply(hidden_TD, weight_VD, labels_T, dtype)
    return loss


class _HeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, dtype: torch.dtype) -> Tensor:
        need_hidden, need_weight, *_ = ctx.needs_input_grad
        total = torch.zeros((), dtype=torch.float32)
        with torch.autocast("cpu", enabled=False):
            cast_TD, cast_VD = hidden_TD.to(dtype), weight_VD.to(dtype)
            grad_TD = torch.empty_like(cast_TD) if need_hidden else None
            grad_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if need_weight else None
            # Each block adds to the whole of grad_VD: with fewer rows than D that costs more than the logits do.
            rows = max(hidden_TD.shape[1], BLOCK_LOGITS // len(weight_VD))
            for start in range(0, len(labels_T), rows):
                block = slice(start, start + rows)
                loss, delta_RV = _block(product(cast_TD[block], cast_VD.t()), labels_T[block], len(labels_T))
                total += loss
                delta_RV = delta_RV.to(dtype)
                if grad_TD is not None:
                    product_into(grad_TD[block], delta_RV, cast_VD)
                if grad_VD is not None:
                    grad_VD += product(delta_RV.t(), cast_TD[block])
        ctx.save_for_backward(grad_TD, grad_VD)
        ctx.dtypes = (hidden_TD.dtype, weight_VD.dtype)
        return total / max(1, len(labels_T))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (
            None if saved is None else (saved * grad).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *gradients, None, None


def _block(logits_RV: Tensor, labels_R: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """The block's summed loss, and (softmax - one-hot) / total, the gradient of the mean by the logits."""
    logits_RV = logits_RV.float()
    labels_R1 = labels_R.unsqueeze(1)
    normaliser_R1 = logits_RV.logsumexp(dim=1, keepdim=True)
    loss = (normaliser_R1 - logits_RV.gather(1, labels_R1)).sum()
    delta_RV = logits_RV.sub_(normaliser_R1).exp_()
    delta_RV.scatter_(1, labels_R1, delta_RV.gather(1, labels_R1) - 1)
    return loss, delta_RV.mul_(1 / total)
