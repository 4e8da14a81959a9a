"""The grouped expert MLP on a CPU: rows sorted by expert, contiguous matmuls, a backward written by hand.

Where its speed comes from, next to a loop over experts:
- The stacked weights are one input of one autograd node: their gradients are written into one buffer each, expert by
  expert, instead of an E-sized gradient per expert.
- fp32 products go through oneDNN (`products.py`), which PyTorch itself uses only for bf16.
- The activation runs on each block of rows while the matmul's result is still in the cache.
- The weighted sum over a token's choices is one `embedding_bag` over the sorted outputs: no scatter, no atomic, the
  same order of additions in every run.
- Row counts are padded to a few multiples, so that oneDNN finds its compiled primitive again in the next step.

Shapes: T tokens, D hidden, E experts, K choices a token, F intermediate, P rows of the padded expert-sorted buffer,
G rows of one block (one or several whole experts), M rows of one expert.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from moestro_kernels.experts_mlp.plan import DispatchPlan, plan_dispatch
from moestro_kernels.products import product, product_into

# A block of this many gate and up values amortises PyTorch's cost per call and stays in a core's second-level cache.
BLOCK_VALUES = 1 << 19
# One padding unit per this many rows of an average expert: under 1 % more rows, a few dozen distinct shapes.
ROWS_PER_PADDING_UNIT = 64


@dataclass(frozen=True)
class _Block:
    """Consecutive experts and their rows: `experts` holds (expert, first row, end row), rows relative to `start`."""

    start: int
    end: int
    experts: list[tuple[int, int, int]]


def experts_mlp_cpu(
    x_TD: torch.Tensor,
    index_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    gate_up_E2FD: torch.Tensor,
    down_EDF: torch.Tensor,
) -> torch.Tensor:
    """The same mapping as `experts_mlp_reference`, returned in `x_TD`'s dtype.

    Under `torch.autocast("cpu")` the matmuls run in the autocast dtype and each gradient has its argument's dtype.
    Bit for bit the same from run to run at a fixed thread count. Raises ValueError for an expert id out of range.
    """
    num_experts = gate_up_E2FD.shape[0]
    if index_TK.numel() and (int(index_TK.min()) < 0 or int(index_TK.max()) >= num_experts):
        raise ValueError(f"Expert ids must lie in 0..{num_experts - 1}, got {index_TK.min()}..{index_TK.max()}.")
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else gate_up_E2FD.dtype
    result: torch.Tensor = _ExpertsMLP.apply(x_TD, index_TK, weights_TK, gate_up_E2FD, down_EDF, dtype)
    return result


def padding_unit(num_choices: int, num_experts: int) -> int:
    """The power of two each expert's row count is rounded up to, for `num_choices` = T * K."""
    units = num_choices // num_experts // ROWS_PER_PADDING_UNIT
    return 1 << (units.bit_length() - 1) if units else 1


def _blocks(starts: list[int], block_rows: int) -> Iterator[_Block]:
    experts: list[tuple[int, int, int]] = []
    start = 0
    for expert, (first, end) in enumerate(pairwise(starts)):
        if end > first:
            experts.append((expert, first - start, end - start))
        if experts and (end - start >= block_rows or end == starts[-1]):
            yield _Block(start, end, experts)
            experts, start = [], end


def _grouped_product(rows: torch.Tensor, weights: torch.Tensor, block: _Block, *, transpose: bool) -> torch.Tensor:
    """Each expert's `rows` of the block times its matrix of `weights` [E, ...], or times that matrix's transpose."""
    if len(block.experts) == 1:
        weight = weights[block.experts[0][0]]
        return product(rows, weight.t() if transpose else weight)
    out = rows.new_empty(rows.shape[0], weights.shape[1 if transpose else 2])
    for expert, first, end in block.experts:
        weight = weights[expert]
        product_into(out[first:end], rows[first:end], weight.t() if transpose else weight)
    return out


def _gather(x_TD: torch.Tensor, plan: DispatchPlan, dtype: torch.dtype) -> torch.Tensor:
    padding = (plan.token_P == x_TD.shape[0]).nonzero().squeeze(1)
    token_P = plan.token_P.index_fill(0, padding, 0)
    return x_TD.to(dtype).index_select(0, token_P).index_fill_(0, padding, 0)


def _combine(rows_PD: torch.Tensor, plan: DispatchPlan, weights_TK: torch.Tensor | None) -> torch.Tensor:
    """y_t = sum_k weights[t, k] * rows[row[t, k]], accumulated in fp32 at least."""
    if weights_TK is None:
        return functional.embedding_bag(plan.row_TK, rows_PD, mode="sum")
    # Weights rounded to bf16 would no longer sum to one.
    wide = torch.promote_types(rows_PD.dtype, torch.float32)
    return functional.embedding_bag(plan.row_TK, rows_PD.to(wide), mode="sum", per_sample_weights=weights_TK.to(wide))


class _ExpertsMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        index_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        gate_up_E2FD: torch.Tensor,
        down_EDF: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        num_experts = gate_up_E2FD.shape[0]
        with torch.autocast("cpu", enabled=False):
            plan = plan_dispatch(index_TK, num_experts, row_multiple=padding_unit(index_TK.numel(), num_experts))
            blocks = list(_blocks(plan.starts_E1.tolist(), BLOCK_VALUES // gate_up_E2FD.shape[1]))
            gate_up, down = gate_up_E2FD.to(dtype), down_EDF.to(dtype)
            rows_PD = _gather(x_TD, plan, dtype)
            out_PD = torch.empty_like(rows_PD)
            keep = any(ctx.needs_input_grad)
            kept: list[torch.Tensor] = []
            for block in blocks:
                h_G2F = _grouped_product(rows_PD[block.start : block.end], gate_up, block, transpose=True)
                gate_GF, up_GF = h_G2F.chunk(2, dim=1)
                silu_GF = functional.silu(gate_GF)
                a_GF = silu_GF * up_GF
                out_GD = out_PD[block.start : block.end]
                for expert, first, end in block.experts:
                    product_into(out_GD[first:end], a_GF[first:end], down[expert].t())
                if keep:
                    kept += [h_G2F, silu_GF]
            y_TD = _combine(out_PD, plan, weights_TK).to(x_TD.dtype)
        if keep:
            ctx.plan, ctx.blocks, ctx.dtype = plan, blocks, dtype
            ctx.dtypes = (x_TD.dtype, weights_TK.dtype, gate_up_E2FD.dtype, down_EDF.dtype)
            ctx.save_for_backward(weights_TK, gate_up, down, rows_PD, out_PD, *kept)
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weights_TK, gate_up, down, rows_PD, out_PD, *kept = ctx.saved_tensors
        plan: DispatchPlan = ctx.plan
        x_dtype, weights_dtype, gate_up_dtype, down_dtype = ctx.dtypes
        need_x, _, need_weights, need_gate_up, need_down, _ = ctx.needs_input_grad
        with torch.autocast("cpu", enabled=False):
            dy_PD = _gather(dy_TD, plan, torch.promote_types(ctx.dtype, torch.float32))
            dweights = (dy_PD * out_PD).sum(1)[plan.row_TK].to(weights_dtype) if need_weights else None
            weight_P = dy_PD.new_zeros(dy_PD.shape[0])
            weight_P[plan.row_TK] = weights_TK.to(dy_PD.dtype)
            dout_PD = dy_PD.mul_(weight_P.unsqueeze(1)).to(ctx.dtype)

            dx_PD = torch.empty_like(rows_PD) if need_x else None
            dgate_up = torch.empty_like(gate_up, dtype=gate_up_dtype) if need_gate_up else None
            ddown = torch.empty_like(down, dtype=down_dtype) if need_down else None
            for block, h_G2F, silu_GF in zip(ctx.blocks, kept[::2], kept[1::2], strict=True):
                span = slice(block.start, block.end)
                dh_G2F, a_GF = _block_backward(dout_PD[span], h_G2F, silu_GF, down, block)
                for expert, first, end in block.experts:
                    rows = slice(block.start + first, block.start + end)
                    if ddown is not None:
                        product_into(ddown[expert], dout_PD[rows].t(), a_GF[first:end])
                    if dgate_up is not None:
                        product_into(dgate_up[expert], dh_G2F[first:end].t(), rows_PD[rows])
                    if dx_PD is not None:
                        product_into(dx_PD[rows], dh_G2F[first:end], gate_up[expert])
            used = {expert for block in ctx.blocks for expert, _, _ in block.experts}
            for gradient in (dgate_up, ddown):
                if gradient is not None:
                    for expert in set(range(gradient.shape[0])) - used:
                        gradient[expert].zero_()
            dx = _combine(dx_PD, plan, None).to(x_dtype) if dx_PD is not None else None
        return dx, None, dweights, dgate_up, ddown, None


def _block_backward(
    dout_GD: torch.Tensor, h_G2F: torch.Tensor, silu_GF: torch.Tensor, down: torch.Tensor, block: _Block
) -> tuple[torch.Tensor, torch.Tensor]:
    """Through down projection and SwiGLU: the gradient of the gate and up projections' output, and a = silu(g) * u."""
    gate_GF, up_GF = h_G2F.chunk(2, dim=1)
    da_GF = _grouped_product(dout_GD, down, block, transpose=False)
    dh_G2F = torch.empty_like(h_G2F)
    dgate_GF, dup_GF = dh_G2F.chunk(2, dim=1)
    torch.mul(da_GF, silu_GF, out=dup_GF)
    torch.ops.aten.silu_backward.grad_input(da_GF.mul_(up_GF), gate_GF, grad_input=dgate_GF)
    return dh_G2F, silu_GF * up_GF
