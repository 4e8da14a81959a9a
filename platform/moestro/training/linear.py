"""Linear layers of float32 training through `moestro_kernels.products`, which on AMD has twice PyTorch's throughput.

Shapes: N rows (all leading dimensions), I inputs, O outputs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moestro_kernels.products import product


@contextmanager
def training_linear(model: nn.Module, *, dtype: torch.dtype) -> Iterator[None]:
    """Give the float32 `nn.Linear` layers of `model` the faster products while in the block.

    In other types nothing changes: PyTorch's own are as fast there. Modules derived from `nn.Linear` are left alone.
    """
    chosen = [
        module
        for module in model.modules()
        if type(module) is nn.Linear and dtype == module.weight.dtype == torch.float32 and module.weight.numel()
    ]
    for module in chosen:
        module.forward = partial(_forward, module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in chosen:
            del module.forward


def linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """x W^T for `x` [..., I]; returns [..., O]. Differentiable once in both."""
    result: Tensor = _Linear.apply(x, weight_OI)
    return result


def _forward(module: nn.Linear, x: Tensor) -> Tensor:
    if torch.is_autocast_enabled("cpu") or x.dtype != torch.float32 or not x.numel():
        return nn.functional.linear(x, module.weight, module.bias)
    y = linear(x, module.weight)
    return y if module.bias is None else y + module.bias


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor) -> Tensor:
        x_NI = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(x_NI if ctx.needs_input_grad[1] else None, weight_OI if ctx.needs_input_grad[0] else None)
        return product(x_NI, weight_OI.t()).view(*x.shape[:-1], len(weight_OI))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_NI, weight_OI = ctx.saved_tensors
        dy_NO = dy.reshape(-1, dy.shape[-1])
        dx = None if weight_OI is None else product(dy_NO, weight_OI).view(*dy.shape[:-1], weight_OI.shape[1])
        dweight = None if x_NI is None else product(dy_NO.t(), x_NI).contiguous()
        return dx, dweight
