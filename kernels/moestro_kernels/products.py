"""Matrix products on a CPU at the machine's speed.

PyTorch computes float32 products with MKL. On AVX-512 machines that MKL has no fast path for (AMD) oneDNN, which
PyTorch brings along and uses for bfloat16, has about twice its throughput; where MKL has one the two are level.

oneDNN wants the rows of the left matrix one after the other in memory, which they are not in a weight's gradient,
`dy^T x`. There either operand can be transposed first, as `dy^T x = (x^T dy)^T`; the smaller one is.
"""

import torch


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b for two matrices of one dtype and any strides. The result may be the transpose of a contiguous matrix.

    Bit for bit the same from run to run at a fixed thread count.
    """
    if a.dtype != torch.float32 or a.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return torch.mm(a, b)
    if a.stride(1) != 1 and a.numel() > b.numel() + a.shape[0] * b.shape[1]:
        return _one_dnn(b.t(), a.t()).t()
    return _one_dnn(a, b)


def product_into(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """`out` = a @ b, in `out`'s dtype."""
    if out.dtype == a.dtype and a.dtype != torch.float32:
        torch.mm(a, b, out=out)
    else:
        out.copy_(product(a, b))


def _one_dnn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return result
