"""The grouped expert MLP as one differentiable function, whatever the device.

CPU tensors take the path of `cpu.py`; everything else takes the Triton kernels of `gpu.py`.

Shapes: T tokens, D hidden, E experts, K choices a token, F intermediate.
"""

import torch

from moestro_kernels.experts_mlp.cpu import experts_mlp_cpu


def experts_mlp(
    x_TD: torch.Tensor,
    index_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    gate_up_E2FD: torch.Tensor,
    down_EDF: torch.Tensor,
) -> torch.Tensor:
    """y_t = sum_k weights[t, k] * down[e] @ (silu(gate[e] @ x_t) * (up[e] @ x_t)), e = index[t, k]; see `reference.py`.

    `gate_up_E2FD` holds the gate projection's rows first, then the up projection's. Differentiable once in x, weights,
    gate_up and down. Respects autocast; the result has `x_TD`'s dtype. Raises ValueError where shapes or dtypes do not
    fit together and, on a CPU, for an expert id out of range.
    """
    _check(x_TD, index_TK, weights_TK, gate_up_E2FD, down_EDF)
    if x_TD.device.type == "cpu":
        return experts_mlp_cpu(x_TD, index_TK, weights_TK, gate_up_E2FD, down_EDF)
    from moestro_kernels.experts_mlp.gpu import experts_mlp_gpu

    return experts_mlp_gpu(x_TD, index_TK, weights_TK, gate_up_E2FD, down_EDF)


def _check(
    x_TD: torch.Tensor,
    index_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    gate_up_E2FD: torch.Tensor,
    down_EDF: torch.Tensor,
) -> None:
    num_experts, hidden, intermediate = down_EDF.shape
    fits = (
        gate_up_E2FD.shape == (num_experts, 2 * intermediate, hidden)
        and x_TD.ndim == 2
        and x_TD.shape[1] == hidden
        and index_TK.ndim == 2
        and index_TK.shape == weights_TK.shape
        and index_TK.shape[0] == x_TD.shape[0]
    )
    if not fits:
        raise ValueError(
            "Expected x [T, D], index and weights [T, K], gate_up [E, 2F, D] and down [E, D, F], got "
            f"{[list(t.shape) for t in (x_TD, index_TK, weights_TK, gate_up_E2FD, down_EDF)]}."
        )
    if gate_up_E2FD.dtype != down_EDF.dtype:
        raise ValueError(f"gate_up is {gate_up_E2FD.dtype}, down is {down_EDF.dtype}: both need one dtype.")
