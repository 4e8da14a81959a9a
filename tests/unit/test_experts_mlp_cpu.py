"""The CPU path of the grouped expert MLP against the naive loop over experts: values and every gradient.

Shapes: T tokens, D hidden, E experts, K choices a token, F intermediate.
"""

import pytest
import torch

from moestro_kernels.experts_mlp import experts_mlp, experts_mlp_reference
from moestro_kernels.experts_mlp.cpu import padding_unit
from moestro_kernels.experts_mlp.plan import most_rows, plan_dispatch

# (T, K, E, D, F): one token, top-1, more experts than choices (empty experts), odd sizes, padded and blocked rows.
SHAPES = [(1, 1, 4, 8, 16), (5, 1, 3, 7, 9), (7, 3, 16, 33, 17), (33, 2, 8, 24, 40), (1500, 2, 4, 20, 12)]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _inputs(shape, dtype, seed=0):
    num_tokens, top_k, num_experts, hidden, intermediate = shape
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(num_tokens, hidden, generator=generator, dtype=torch.float64)
    weights_TK = torch.randn(num_tokens, top_k, generator=generator, dtype=torch.float64).softmax(-1)
    gate_up = torch.randn(num_experts, 2 * intermediate, hidden, generator=generator, dtype=torch.float64) / hidden**0.5
    down = torch.randn(num_experts, hidden, intermediate, generator=generator, dtype=torch.float64) / intermediate**0.5
    index_TK = torch.rand(num_tokens, num_experts, generator=generator).topk(top_k).indices
    return index_TK, [tensor.to(dtype).requires_grad_() for tensor in (x_TD, weights_TK, gate_up, down)]


def _run(function, index_TK, tensors):
    x_TD, weights_TK, gate_up, down = leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    y_TD = function(x_TD, index_TK, weights_TK, gate_up, down)
    dy_TD = torch.randn(y_TD.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y_TD.backward(dy_TD.to(y_TD.dtype))
    return [y_TD.detach(), *(leaf.grad for leaf in leaves)]


def _worst(actual, expected):
    """The largest error of each tensor, relative to the largest value of the expected one."""
    return [
        ((a.double() - e.double()).abs().max() / e.abs().max().clamp_min(1e-30)).item()
        for a, e in zip(actual, expected, strict=True)
    ]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 5e-6), (torch.bfloat16, 3e-2)]
)
def test_values_and_all_gradients_match_the_naive_loop(shape, dtype, tolerance):
    index_TK, tensors = _inputs(shape, dtype)
    exact = _run(experts_mlp_reference, index_TK, [tensor.double() for tensor in tensors])
    actual = _run(experts_mlp, index_TK, tensors)
    assert [tensor.dtype for tensor in actual] == [dtype] * 5
    assert max(_worst(actual, exact)) < tolerance


def test_gradcheck_in_double_precision():
    index_TK, tensors = _inputs((5, 2, 4, 3, 4), torch.float64)
    assert torch.autograd.gradcheck(lambda x, w, g, d: experts_mlp(x, index_TK, w, g, d), tensors)


def test_experts_without_tokens_get_zero_gradients():
    index_TK, tensors = _inputs((600, 2, 6, 8, 8), torch.float32)
    index_TK = torch.where(index_TK == 2, 4, index_TK)
    _, _, _, dgate_up, ddown = _run(experts_mlp, index_TK, tensors)
    assert not dgate_up[2].any()
    assert not ddown[2].any()
    assert dgate_up[4].any()


def test_a_token_may_choose_one_expert_twice():
    index_TK, tensors = _inputs((9, 2, 3, 8, 8), torch.float64)
    index_TK[:, 1] = index_TK[:, 0]
    assert max(_worst(_run(experts_mlp, index_TK, tensors), _run(experts_mlp_reference, index_TK, tensors))) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_non_contiguous_arguments_give_the_same_bits(dtype):
    index_TK, tensors = _inputs((40, 2, 4, 12, 10), dtype)
    strided = [tensor.detach().transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_() for tensor in tensors]
    assert not strided[0].is_contiguous()
    plain = experts_mlp(tensors[0], index_TK, *tensors[1:])
    other = experts_mlp(strided[0], index_TK.t().contiguous().t(), *strided[1:])
    dy_TD = torch.ones(12, 40, dtype=dtype).t()
    plain.backward(dy_TD)
    other.backward(dy_TD)
    torch.testing.assert_close(other, plain)
    for ours, theirs in zip(strided, tensors, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_repeats_bit_for_bit():
    index_TK, tensors = _inputs((700, 4, 16, 48, 32), torch.float32)
    first, second = _run(experts_mlp, index_TK, tensors), _run(experts_mlp, index_TK, tensors)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast_computes_in_bf16_with_gradients_in_the_weights_dtype():
    index_TK, tensors = _inputs((64, 2, 4, 32, 24), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        actual = _run(experts_mlp, index_TK, tensors)
    rounded = [tensors[0].bfloat16(), tensors[1], tensors[2].bfloat16(), tensors[3].bfloat16()]
    in_bf16 = experts_mlp(rounded[0], index_TK, *rounded[1:])
    assert [tensor.dtype for tensor in actual] == [torch.float32] * 5
    assert torch.equal(actual[0].bfloat16(), in_bf16)
    exact = _run(experts_mlp_reference, index_TK, [tensor.double() for tensor in tensors])
    assert 1e-4 < max(_worst(actual, exact)) < 3e-2


def test_identical_experts_with_weights_that_sum_to_one_equal_one_expert_in_bf16():
    index_TK, (x_TD, _, gate_up, down) = _inputs((64, 2, 4, 32, 24), torch.bfloat16)
    weights_TK = torch.rand(64, 1).mul(0.9).repeat(1, 2)
    weights_TK[:, 1] = 1 - weights_TK[:, 0]
    gate_up, down = gate_up[:1].expand(4, -1, -1), down[:1].expand(4, -1, -1)
    mixed = experts_mlp(x_TD, index_TK, weights_TK, gate_up, down)
    alone = experts_mlp(x_TD, index_TK[:, :1], torch.ones(64, 1), gate_up, down)
    assert torch.equal(mixed, alone)


def test_frozen_arguments_get_no_gradient_and_change_no_other():
    index_TK, tensors = _inputs((50, 2, 4, 16, 8), torch.float32)
    whole = _run(experts_mlp, index_TK, tensors)
    for trainable in range(4):
        leaves = [t.detach().clone().requires_grad_(i == trainable) for i, t in enumerate(tensors)]
        y_TD = experts_mlp(leaves[0], index_TK, *leaves[1:])
        y_TD.backward(torch.randn(50, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float())
        assert [leaf.grad is not None for leaf in leaves] == [i == trainable for i in range(4)]
        assert torch.equal(leaves[trainable].grad, whole[1 + trainable])


@pytest.mark.parametrize("wrong", [-1, 4])
def test_an_expert_id_out_of_range_is_refused(wrong):
    index_TK, tensors = _inputs((5, 2, 4, 8, 8), torch.float32)
    index_TK[3, 1] = wrong
    with pytest.raises(ValueError, match=r"0\.\.3"):
        experts_mlp(tensors[0], index_TK, *tensors[1:])


def test_shapes_and_dtypes_that_do_not_fit_are_refused():
    index_TK, (x_TD, weights_TK, gate_up, down) = _inputs((5, 2, 4, 8, 8), torch.float32)
    with pytest.raises(ValueError, match="Expected x"):
        experts_mlp(x_TD[:, :7], index_TK, weights_TK, gate_up, down)
    with pytest.raises(ValueError, match="one dtype"):
        experts_mlp(x_TD, index_TK, weights_TK, gate_up, down.bfloat16())


def test_no_tokens_at_all():
    _, (x_TD, weights_TK, gate_up, down) = _inputs((1, 2, 4, 8, 8), torch.float32)
    y_TD = experts_mlp(x_TD[:0], torch.empty(0, 2, dtype=torch.int64), weights_TK[:0], gate_up, down)
    y_TD.sum().backward()
    assert y_TD.shape == (0, 8)
    assert not gate_up.grad.any()


@pytest.mark.parametrize("row_multiple", [1, 4, 16])
def test_plan_gives_every_choice_a_row_of_its_own_in_its_experts_tile(row_multiple):
    index_TK, _ = _inputs((37, 3, 9, 4, 4), torch.float32)
    plan = plan_dispatch(index_TK, 9, row_multiple=row_multiple)
    num_rows = plan.token_P.numel()
    assert plan.row_TK.unique().numel() == 37 * 3
    assert torch.equal(plan.token_P[plan.row_TK], torch.arange(37)[:, None].expand(-1, 3))
    assert torch.equal(torch.searchsorted(plan.starts_E1[1:], plan.row_TK, right=True), index_TK)
    assert not (plan.starts_E1 % row_multiple).any()
    assert (plan.token_P == 37).sum() == num_rows - 37 * 3
    assert num_rows <= most_rows(37 * 3, 9, row_multiple)


def test_padding_unit_is_a_power_of_two_and_at_most_a_64th_of_an_average_expert():
    assert [padding_unit(choices, 8) for choices in (8, 511, 512, 4096, 100_000)] == [1, 1, 1, 8, 128]
