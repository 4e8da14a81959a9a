"""The grouped expert MLP's Triton kernels, forward and backward.

All of them work on buffers of P rows sorted by expert, in which every tile of BLOCK_P rows belongs to one expert
(`plan.py` pads each expert to a multiple of BLOCK_P). A tile past the last used row has expert E and returns at once;
a padding row has token T and counts as zeros. No kernel uses atomics, so that results repeat bit for bit.

Forward: `gate_up_swiglu_kernel` (gathers tokens, both projections, SwiGLU), `grouped_matmul_kernel` (down projection),
`combine_kernel` (weighted sum over a token's choices).
Backward: `scale_rows_kernel` (gradient of each row and of each weight), `swiglu_backward_kernel` (through the down
projection and SwiGLU), `grouped_matmul_kernel` and `combine_kernel` again for x, `weight_gradient_kernel` twice.

Matmuls accumulate in fp32; fp32 inputs are multiplied as fp32, never as TF32.

Shapes: T tokens, D hidden, E experts, K choices a token, F intermediate, P rows of the padded expert-sorted buffer.
"""

# Triton gives arguments their types at launch.
# mypy: disallow_untyped_defs=False, disallow_incomplete_defs=False
import triton
import triton.language as tl


@triton.jit
def gate_up_swiglu_kernel(
    x_TD, token_P, tile_expert, gate_up_E2FD, h_P2F, a_PF, T, D, F, E,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """h = [gate; up] @ x of each row's token, a = silu(h's gate half) * h's up half."""
    expert = tl.load(tile_expert + tl.program_id(0)).to(tl.int64)
    if expert >= E:
        return
    rows = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    tokens = tl.load(token_P + rows).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    weight = gate_up_E2FD + expert * 2 * F * D
    gate = tl.zeros((BLOCK_P, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((BLOCK_P, BLOCK_N), dtype=tl.float32)
    for start in range(0, D, BLOCK_K):
        k = start + depth
        x = tl.load(x_TD + tokens[:, None] * D + k[None, :], mask=(tokens < T)[:, None] & (k < D)[None, :], other=0.0)
        inside = (k < D)[:, None] & (columns < F)[None, :]
        gate_weight = tl.load(weight + columns[None, :] * D + k[:, None], mask=inside, other=0.0)
        up_weight = tl.load(weight + (F + columns)[None, :] * D + k[:, None], mask=inside, other=0.0)
        gate = tl.dot(x, gate_weight, gate, input_precision="ieee")
        up = tl.dot(x, up_weight, up, input_precision="ieee")
    inside = (columns < F)[None, :]
    h = h_P2F + rows[:, None] * (2 * F) + columns[None, :]
    tl.store(h, gate.to(h_P2F.dtype.element_ty), mask=inside)
    tl.store(h + F, up.to(h_P2F.dtype.element_ty), mask=inside)
    a = gate * tl.sigmoid(gate) * up
    tl.store(a_PF + rows[:, None] * F + columns[None, :], a.to(a_PF.dtype.element_ty), mask=inside)


@triton.jit
def grouped_matmul_kernel(
    in_PK, tile_expert, weight_E, out_PN, K, N, E, stride_E, stride_K, stride_N,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[p] = in[p] @ W[expert of p], W[e] being K by N with any strides."""
    expert = tl.load(tile_expert + tl.program_id(0)).to(tl.int64)
    if expert >= E:
        return
    rows = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    weight = weight_E + expert * stride_E
    total = tl.zeros((BLOCK_P, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + depth
        left = tl.load(in_PK + rows[:, None] * K + k[None, :], mask=(k < K)[None, :], other=0.0)
        inside = (k < K)[:, None] & (columns < N)[None, :]
        right = tl.load(weight + k[:, None] * stride_K + columns[None, :] * stride_N, mask=inside, other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
    out = out_PN + rows[:, None] * N + columns[None, :]
    tl.store(out, total.to(out_PN.dtype.element_ty), mask=(columns < N)[None, :])


@triton.jit
def combine_kernel(
    rows_PD, row_TK, weights_TK, y_TD, D, K, WEIGHTED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y_t = sum_k weights[t, k] * rows[row[t, k]], or the plain sum; one program a token and block of columns."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for k in range(K):
        row = tl.load(row_TK + token * K + k).to(tl.int64)
        values = tl.load(rows_PD + row * D + columns, mask=columns < D, other=0.0).to(tl.float32)
        if WEIGHTED:
            values *= tl.load(weights_TK + token * K + k).to(tl.float32)
        total += values
    tl.store(y_TD + token * D + columns, total.to(y_TD.dtype.element_ty), mask=columns < D)


@triton.jit
def scale_rows_kernel(
    dy_TD, out_PD, row_TK, weights_TK, dout_PD, dweights_TK, D, K, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program a choice (t, k) at row p: dout[p] = weights[t, k] * dy[t], dweights[t, k] = dy[t] . out[p]."""
    choice = tl.program_id(0).to(tl.int64)
    token = choice // K
    row = tl.load(row_TK + choice).to(tl.int64)
    weight = tl.load(weights_TK + choice).to(tl.float32)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for start in range(0, D, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        dy = tl.load(dy_TD + token * D + columns, mask=columns < D, other=0.0).to(tl.float32)
        out = tl.load(out_PD + row * D + columns, mask=columns < D, other=0.0).to(tl.float32)
        total += dy * out
        tl.store(dout_PD + row * D + columns, (weight * dy).to(dout_PD.dtype.element_ty), mask=columns < D)
    tl.store(dweights_TK + choice, tl.sum(total).to(dweights_TK.dtype.element_ty))


@triton.jit
def swiglu_backward_kernel(
    dout_PD, tile_expert, down_EDF, h_P2F, dh_P2F, a_PF, D, F, E,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """da = dout @ down, then dh = [da * up * silu'(gate); da * silu(gate)] and again a = silu(gate) * up."""
    expert = tl.load(tile_expert + tl.program_id(0)).to(tl.int64)
    if expert >= E:
        return
    rows = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    weight = down_EDF + expert * D * F
    da = tl.zeros((BLOCK_P, BLOCK_N), dtype=tl.float32)
    for start in range(0, D, BLOCK_K):
        k = start + depth
        dout = tl.load(dout_PD + rows[:, None] * D + k[None, :], mask=(k < D)[None, :], other=0.0)
        inside = (k < D)[:, None] & (columns < F)[None, :]
        down = tl.load(weight + k[:, None] * F + columns[None, :], mask=inside, other=0.0)
        da = tl.dot(dout, down, da, input_precision="ieee")
    inside = (columns < F)[None, :]
    half = rows[:, None] * (2 * F) + columns[None, :]
    gate = tl.load(h_P2F + half, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(h_P2F + half + F, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    dgate = da * up * (sigmoid + silu * (1.0 - sigmoid))
    tl.store(dh_P2F + half, dgate.to(dh_P2F.dtype.element_ty), mask=inside)
    tl.store(dh_P2F + half + F, (da * silu).to(dh_P2F.dtype.element_ty), mask=inside)
    tl.store(a_PF + rows[:, None] * F + columns[None, :], (silu * up).to(a_PF.dtype.element_ty), mask=inside)


@triton.jit
def weight_gradient_kernel(
    left_PI, right_J, token_P, starts_E1, out_EIJ, T, I, J,
    GATHER: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[e] = sum over expert e's rows p of left[p] outer right[p]; right is read at token[p] where GATHER says so."""
    expert = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.load(starts_E1 + expert)
    end = tl.load(starts_E1 + expert + 1)
    total = tl.zeros((BLOCK_N, BLOCK_N), dtype=tl.float32)
    for start in range(first, end, BLOCK_P):
        rows = start + tl.arange(0, BLOCK_P).to(tl.int64)
        tokens = tl.load(token_P + rows).to(tl.int64)
        used = tokens < T
        source = tokens if GATHER else rows
        left = tl.load(left_PI + rows[None, :] * I + i[:, None], mask=used[None, :] & (i < I)[:, None], other=0.0)
        right = tl.load(right_J + source[:, None] * J + j[None, :], mask=used[:, None] & (j < J)[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
    out = out_EIJ + expert * I * J + i[:, None].to(tl.int64) * J + j[None, :]
    tl.store(out, total.to(out_EIJ.dtype.element_ty), mask=(i < I)[:, None] & (j < J)[None, :])
