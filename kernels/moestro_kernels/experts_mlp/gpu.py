"""The grouped expert MLP on a GPU: launches the Triton kernels as two `torch.library` operators.

`moestro::experts_mlp` (forward) and `moestro::experts_mlp_backward` have fake implementations and a registered
autograd formula, so that they pass through `torch.compile`, `torch.export` and FakeTensor. Buffer sizes depend on
shapes alone, never on the routing: no launch waits for the device.

With TRITON_INTERPRET=1 set before the first import of Triton the same operators run on CPU tensors, slowly: that is
how the kernels are tested where there is no GPU.

Shapes: T tokens, D hidden, E experts, K choices a token, F intermediate, P rows of the padded expert-sorted buffer.
"""

from typing import Any

import torch
import triton

from moestro_kernels.experts_mlp import triton as kernels
from moestro_kernels.experts_mlp.plan import DispatchPlan, most_rows, plan_dispatch

# Not tuned on hardware: square tiles of a size that compiles without a spill for every target `compile.py` lists.
BLOCK = 64
BLOCK_K = 32


def experts_mlp_gpu(
    x_TD: torch.Tensor,
    index_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    gate_up_E2FD: torch.Tensor,
    down_EDF: torch.Tensor,
) -> torch.Tensor:
    """The same mapping as `experts_mlp_reference`, in fp32, fp16 or bf16, accumulated in fp32.

    Under autocast the matmuls run in the autocast dtype. Expert ids must lie in 0 .. E - 1 (not checked: that would
    wait for the device).
    """
    device = x_TD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else gate_up_E2FD.dtype
    if dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        raise ValueError("Triton's interpreter multiplies bf16 bit patterns as integers in tl.dot: use fp16 or fp32.")
    y_TD: torch.Tensor = _forward(x_TD.to(dtype), index_TK, weights_TK, gate_up_E2FD.to(dtype), down_EDF.to(dtype))[0]
    return y_TD.to(x_TD.dtype)


def num_warps(dtype: torch.dtype) -> int:
    """Warps a block: fp32 products keep their operands in registers, and four warps of them spill on sm_80."""
    return 8 if dtype == torch.float32 else 4


def _tile_expert(starts_E1: torch.Tensor, num_rows: int) -> torch.Tensor:
    """The expert of each tile of BLOCK rows; E for tiles past the used rows."""
    tile_start = torch.arange(0, num_rows, BLOCK, device=starts_E1.device)
    return torch.searchsorted(starts_E1[1:], tile_start, right=True)


def _grouped_matmul(rows: torch.Tensor, weights: torch.Tensor, starts_E1: torch.Tensor) -> torch.Tensor:
    """rows[p] @ weights[expert of p], `weights` [E, K, N] with any strides."""
    num_experts, depth, columns = weights.shape
    out = rows.new_empty(rows.shape[0], columns)
    kernels.grouped_matmul_kernel[(rows.shape[0] // BLOCK, triton.cdiv(columns, BLOCK))](
        rows, _tile_expert(starts_E1, rows.shape[0]), weights, out, depth, columns, num_experts, *weights.stride(),
        BLOCK, BLOCK, BLOCK_K, num_warps=num_warps(rows.dtype),
    )  # fmt: skip
    return out


def _combine(rows_PD: torch.Tensor, row_TK: torch.Tensor, weights_TK: torch.Tensor | None) -> torch.Tensor:
    num_tokens, top_k = row_TK.shape
    hidden = rows_PD.shape[1]
    y_TD = rows_PD.new_empty(num_tokens, hidden)
    weighted = weights_TK is not None
    kernels.combine_kernel[(num_tokens, triton.cdiv(hidden, BLOCK))](
        rows_PD, row_TK, weights_TK if weighted else rows_PD, y_TD, hidden, top_k, weighted, BLOCK
    )
    return y_TD


def _weight_gradient(
    left: torch.Tensor, right: torch.Tensor, plan: DispatchPlan, num_tokens: int, *, gather: bool
) -> torch.Tensor:
    """The [E, I, J] gradient of E matrices; with `gather`, `right` holds tokens [T, J] instead of rows [P, J]."""
    num_experts = plan.starts_E1.shape[0] - 1
    out = left.new_empty(num_experts, left.shape[1], right.shape[1])
    grid = (num_experts, triton.cdiv(out.shape[1], BLOCK), triton.cdiv(out.shape[2], BLOCK))
    kernels.weight_gradient_kernel[grid](
        left, right, plan.token_P, plan.starts_E1, out, num_tokens, out.shape[1], out.shape[2],
        gather, BLOCK, BLOCK, num_warps=num_warps(left.dtype),
    )  # fmt: skip
    return out


@torch.library.custom_op("moestro::experts_mlp", mutates_args=())
def _forward(
    x_TD: torch.Tensor,
    index_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    gate_up_E2FD: torch.Tensor,
    down_EDF: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, and what the backward needs: gate and up projections, the experts' outputs, and the dispatch plan."""
    num_tokens, hidden = x_TD.shape
    num_experts, _, intermediate = down_EDF.shape
    num_rows = most_rows(index_TK.numel(), num_experts, BLOCK)
    plan = plan_dispatch(index_TK, num_experts, row_multiple=BLOCK, num_rows=num_rows)
    h_P2F = x_TD.new_empty(num_rows, 2 * intermediate)
    a_PF = x_TD.new_empty(num_rows, intermediate)
    kernels.gate_up_swiglu_kernel[(num_rows // BLOCK, triton.cdiv(intermediate, BLOCK))](
        x_TD.contiguous(), plan.token_P, _tile_expert(plan.starts_E1, num_rows), gate_up_E2FD.contiguous(), h_P2F, a_PF,
        num_tokens, hidden, intermediate, num_experts, BLOCK, BLOCK, BLOCK_K, num_warps=num_warps(x_TD.dtype),
    )  # fmt: skip
    out_PD = _grouped_matmul(a_PF, down_EDF.transpose(1, 2), plan.starts_E1)
    y_TD = _combine(out_PD, plan.row_TK, weights_TK.contiguous())
    return y_TD, h_P2F, out_PD, plan.token_P, plan.row_TK, plan.starts_E1


@_forward.register_fake
def _(
    x_TD: torch.Tensor,
    index_TK: torch.Tensor,
    _weights_TK: torch.Tensor,
    _gate_up_E2FD: torch.Tensor,
    down_EDF: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    num_experts, hidden, intermediate = down_EDF.shape
    num_rows = most_rows(index_TK.numel(), num_experts, BLOCK)
    return (
        torch.empty_like(x_TD, memory_format=torch.contiguous_format),
        x_TD.new_empty(num_rows, 2 * intermediate),
        x_TD.new_empty(num_rows, hidden),
        index_TK.new_empty(num_rows, dtype=torch.int64),
        index_TK.new_empty(*index_TK.shape, dtype=torch.int64),
        index_TK.new_empty(num_experts + 1, dtype=torch.int64),
    )


@torch.library.custom_op("moestro::experts_mlp_backward", mutates_args=())
def _backward(  # noqa: PLR0917 (an operator's schema is flat)
    dy_TD: torch.Tensor,
    x_TD: torch.Tensor,
    weights_TK: torch.Tensor,
    gate_up_E2FD: torch.Tensor,
    down_EDF: torch.Tensor,
    h_P2F: torch.Tensor,
    out_PD: torch.Tensor,
    token_P: torch.Tensor,
    row_TK: torch.Tensor,
    starts_E1: torch.Tensor,
    need_gate_up: bool,
    need_down: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, weights, gate_up and down; the last two empty where they are not needed (frozen experts)."""
    plan = DispatchPlan(token_P, row_TK, starts_E1)
    num_tokens, hidden = x_TD.shape
    num_rows, (num_experts, _, intermediate) = h_P2F.shape[0], down_EDF.shape
    weights_TK, down_EDF = weights_TK.contiguous(), down_EDF.contiguous()
    # Padding rows are read by the next kernel: they must hold zeros, not whatever the memory held.
    dout_PD, dweights_TK = torch.zeros_like(out_PD), torch.empty_like(weights_TK)
    kernels.scale_rows_kernel[(row_TK.numel(),)](
        dy_TD.contiguous(), out_PD, row_TK, weights_TK, dout_PD, dweights_TK, hidden, row_TK.shape[1], BLOCK
    )
    dh_P2F, a_PF = torch.empty_like(h_P2F), h_P2F.new_empty(num_rows, intermediate)
    kernels.swiglu_backward_kernel[(num_rows // BLOCK, triton.cdiv(intermediate, BLOCK))](
        dout_PD, _tile_expert(starts_E1, num_rows), down_EDF, h_P2F, dh_P2F, a_PF,
        hidden, intermediate, num_experts, BLOCK, BLOCK, BLOCK_K, num_warps=num_warps(x_TD.dtype),
    )  # fmt: skip
    dx_TD = _combine(_grouped_matmul(dh_P2F, gate_up_E2FD, starts_E1), row_TK, None)
    none = x_TD.new_empty(0)
    return (
        dx_TD,
        dweights_TK,
        _weight_gradient(dh_P2F, x_TD.contiguous(), plan, num_tokens, gather=True) if need_gate_up else none,
        _weight_gradient(dout_PD, a_PF, plan, num_tokens, gather=False) if need_down else none.clone(),
    )


@_backward.register_fake
def _(
    _dy_TD: torch.Tensor,
    x_TD: torch.Tensor,
    weights_TK: torch.Tensor,
    gate_up_E2FD: torch.Tensor,
    down_EDF: torch.Tensor,
    *rest: torch.Tensor | bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    need_gate_up, need_down = rest[-2:]
    return (
        torch.empty_like(x_TD, memory_format=torch.contiguous_format),
        torch.empty_like(weights_TK, memory_format=torch.contiguous_format),
        x_TD.new_empty(gate_up_E2FD.shape if need_gate_up else 0),
        x_TD.new_empty(down_EDF.shape if need_down else 0),
    )


def _save(ctx: Any, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, ...]) -> None:
    x_TD, _, weights_TK, gate_up_E2FD, down_EDF = inputs
    ctx.save_for_backward(x_TD, weights_TK, gate_up_E2FD, down_EDF, *output[1:])


def _gradients(ctx: Any, dy_TD: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    _, _, _, need_gate_up, need_down = ctx.needs_input_grad
    dx, dweights, dgate_up, ddown = _backward(dy_TD, *ctx.saved_tensors, need_gate_up, need_down)
    return dx, None, dweights, dgate_up if need_gate_up else None, ddown if need_down else None


_forward.register_autograd(_gradients, setup_context=_save)
