"""Products and linear layers of float32 training: PyTorch's values and gradients, and nothing left behind.

Shapes: N rows, I inputs, O outputs.
"""

import pytest
import torch
from torch import nn

from moestro.training import linear as module
from moestro.training.linear import linear, training_linear
from moestro_kernels.products import product, product_into


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 1, 1), (3, 5, 2), (64, 300, 8), (8, 300, 64)])
def test_products_of_any_strides_are_those_of_torch(dtype: torch.dtype, rows: int, inner: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a = (torch.randn(rows, inner, generator=generator) / inner**0.5).to(dtype)
    b = torch.randn(inner, columns, generator=generator).to(dtype)
    expected = (a.double() @ b.double()).to(dtype)
    for left in (a, a.t().contiguous().t()):
        for right in (b, b.t().contiguous().t()):
            torch.testing.assert_close(product(left, right), expected)
            out = torch.empty(rows, columns, dtype=dtype)
            product_into(out, left, right)
            torch.testing.assert_close(out, expected)


def test_a_product_may_be_written_in_a_wider_type() -> None:
    a, b = torch.randn(2, 9, 9, generator=torch.Generator().manual_seed(0)).bfloat16().unbind()
    out = torch.empty(9, 9)
    product_into(out, a, b)
    torch.testing.assert_close(out, (a @ b).float())


@pytest.mark.parametrize("shape", [(30, 6), (2, 15, 6), (6,), (500, 6)], ids=str)
def test_a_linear_layer_and_its_gradients_are_those_of_torch(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, requires_grad=True)
    weight_OI = torch.randn(40, 6, generator=generator, requires_grad=True)
    mine, expected = linear(x, weight_OI), nn.functional.linear(x, weight_OI)
    torch.testing.assert_close(mine, expected)
    dy = torch.randn(expected.shape, generator=generator)
    gradients = torch.autograd.grad(mine, (x, weight_OI), dy)
    for actual, wanted in zip(gradients, torch.autograd.grad(expected, (x, weight_OI), dy), strict=True):
        torch.testing.assert_close(actual, wanted)
        assert actual.is_contiguous()


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_gets_no_gradient(frozen: int) -> None:
    leaves = [torch.ones(4, 3, requires_grad=frozen != place) for place in range(2)]
    linear(*leaves).sum().backward()
    assert [leaf.grad is None for leaf in leaves] == [frozen == 0, frozen == 1]


def test_layers_take_it_in_float32_while_in_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[torch.Size] = []
    monkeypatch.setattr(module, "linear", lambda x, weight: (taken.append(x.shape), linear(x, weight))[1])
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2, bias=False))
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    expected = model(x)
    with training_linear(model, dtype=torch.bfloat16):
        model(x)
    assert not taken
    with training_linear(model, dtype=torch.float32):
        torch.testing.assert_close(model(x), expected)
        assert len(taken) == 2
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).dtype == torch.bfloat16
        assert model(x[:0]).shape == (0, 2)
        assert len(taken) == 2
    assert torch.equal(model(x), expected)
    assert all("forward" not in vars(layer) for layer in model)
