"""Every layout gives the product that the plain weights give."""

import pytest
import torch
from torch.nn import functional

from serving.engine.linear import Linear, PackedLinear, PlainLinear, TiedHead, can_pack, make_linear

SIZE_IN, SIZE_OUT = 48, 72


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def both_kinds(weight: torch.Tensor, bias: torch.Tensor | None) -> list[Linear]:
    kinds: list[Linear] = [PlainLinear(weight, bias)]
    if can_pack(weight):
        kinds.append(PackedLinear(weight, bias))
    return kinds


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_rows", [1, 2, 4, 7, 64, 300])
def test_products_and_residuals(num_rows: int, has_bias: bool) -> None:
    weight, bias = draw(SIZE_OUT, SIZE_IN), draw(SIZE_OUT, seed=1) if has_bias else None
    # Rows of a wider matrix, as the gate's half of a joined product is.
    x, residual = draw(num_rows, 2 * SIZE_IN, seed=2)[:, :SIZE_IN], draw(num_rows, SIZE_OUT, seed=3)
    before = residual.clone()
    expected = functional.linear(x.double(), weight.double(), bias.double() if bias is not None else None)
    for linear in both_kinds(weight, bias):
        torch.testing.assert_close(linear(x).double(), expected, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(linear.add_to(residual, x).double(), expected + residual, atol=1e-4, rtol=1e-5)
        assert torch.equal(residual, before)


def test_packed_weights_do_not_need_the_original() -> None:
    weight, x = draw(SIZE_OUT, SIZE_IN), draw(5, SIZE_IN, seed=1)
    linear = make_linear(weight.clone())
    before = linear(x)
    weight.fill_(float("nan"))
    assert torch.equal(linear(x), before)


@pytest.mark.parametrize("num_rows", [0, 1, 2, 3, 16, 17, 40])
def test_tied_head(num_rows: int) -> None:
    weight, x = draw(500, SIZE_IN), draw(num_rows, SIZE_IN, seed=1)
    logits = TiedHead(weight)(x)
    assert logits.shape == (num_rows, 500)
    torch.testing.assert_close(logits, x @ weight.t(), atol=1e-4, rtol=1e-5)


def test_only_float32_on_a_cpu_is_packed() -> None:
    assert not can_pack(draw(4, 4).bfloat16())
    assert not can_pack(torch.empty(4, 4, device="meta"))
    assert isinstance(make_linear(draw(4, 4).bfloat16()), PlainLinear)
