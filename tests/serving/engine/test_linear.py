"""Every layout gives the product that the plain weights give."""

from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch.nn import functional

from serving.engine import kernels
from serving.engine.linear import (
    INT4_GROUP,
    Bf16Linear,
    Int4Linear,
    Linear,
    PackedLinear,
    PlainLinear,
    TiedHead,
    Weights,
    can_pack,
    make_linear,
    packed_rows,
    panels_of,
)

SIZE_IN, SIZE_OUT = 48, 72
INT4_SIZE_IN = 3 * INT4_GROUP
ROUNDOFF = torch.finfo(torch.bfloat16).eps / 2
"""Largest relative error of rounding to bf16."""


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


def rounded_product(x: torch.Tensor, weight: torch.Tensor, off: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The exact product, and how far it may be off with weights that are off by `off` and factors rounded to bf16."""
    exact = x.double() @ weight.double().t()
    size = x.abs().double() @ (weight.abs() + off).double().t()
    # Rounded x, and sums in float32; then the product itself is rounded.
    before = x.abs().double() @ off.double().t() + size * (ROUNDOFF + x.shape[1] * 2**-24)
    return exact, before + ROUNDOFF * (exact.abs() + before)


def plain_bf16(weight: torch.Tensor, bias: torch.Tensor | None) -> Bf16Linear:
    """As on a machine that does not multiply packed bf16: only float32 is packed."""
    return Bf16Linear(weight.double(), bias)


def int4_off(weight: torch.Tensor) -> torch.Tensor:
    """How far each weight may be from its level: half a step, and at the ends what rounding step and zero takes."""
    groups = weight.view(len(weight), -1, INT4_GROUP)
    step = (groups.amax(-1) - groups.amin(-1)) / 15
    most = step / 2 * (1 + ROUNDOFF) + 7.5 * ROUNDOFF * step + ROUNDOFF * (groups.abs().amax(-1) + step)
    return most.repeat_interleave(INT4_GROUP, 1)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_rows", [0, 1, 2, 5, 16, 70])
@pytest.mark.parametrize("kind", [Bf16Linear, plain_bf16, Int4Linear])
def test_smaller_weights_are_off_by_their_rounding_alone(
    kind: Callable[[torch.Tensor, torch.Tensor | None], Linear], num_rows: int, has_bias: bool
) -> None:
    weight, bias = draw(SIZE_OUT, INT4_SIZE_IN), draw(SIZE_OUT, seed=1) if has_bias else None
    x, residual = draw(num_rows, 2 * INT4_SIZE_IN, seed=2)[:, :INT4_SIZE_IN], draw(num_rows, SIZE_OUT, seed=3)
    before = residual.clone()
    exact, most_off = rounded_product(x, weight, int4_off(weight) if kind is Int4Linear else ROUNDOFF * weight.abs())
    linear = kind(weight, bias)
    product, total = linear(x), linear.add_to(residual, x)
    assert product.dtype == total.dtype == torch.float32
    assert product.shape == total.shape == (num_rows, SIZE_OUT)
    added = 0.0 if bias is None else bias.double()
    slack = 1e-5  # bias and residual are added in float32
    assert bool(((product - exact - added).abs() <= most_off + slack).all())
    assert bool(((total - exact - added - residual).abs() <= most_off + slack).all())
    assert torch.equal(residual, before)


def test_int4_keeps_what_is_on_its_levels() -> None:
    """A checkpoint that was made of four-bit groups comes back as it was, but for the rounding of scales."""
    levels = torch.randint(0, 16, (SIZE_OUT, INT4_SIZE_IN), generator=torch.Generator().manual_seed(4))
    levels[:, ::INT4_GROUP], levels[:, 1::INT4_GROUP] = 0, 15  # every group uses both ends
    weight = (levels - 7.5) * 0.25  # steps and zeros that bf16 has
    assert torch.equal(Int4Linear(weight)(torch.eye(INT4_SIZE_IN)).t(), weight)


def test_int4_takes_groups_of_equal_weights() -> None:
    weight = torch.zeros(SIZE_OUT, INT4_SIZE_IN)
    weight[3] = 0.75
    assert torch.equal(Int4Linear(weight)(torch.eye(INT4_SIZE_IN)).t(), weight)


def test_how_much_memory_weights_take() -> None:
    weight, bias = draw(64, INT4_SIZE_IN), draw(64)
    num_weights = weight.numel()
    assert make_linear(weight, bias).num_bytes == 4 * num_weights + 4 * 64
    assert make_linear(weight, None, "bf16").num_bytes == 2 * num_weights
    assert make_linear(weight, None, "int4").num_bytes == num_weights // 2 + 4 * num_weights // INT4_GROUP
    assert TiedHead(weight).num_bytes == 0


def test_batches_of_all_sizes_make_few_products() -> None:
    padded = [packed_rows(num_rows) for num_rows in range(1, 257)]
    assert all(rows <= after for rows, after in enumerate(padded, 1))
    assert max(after - rows for rows, after in enumerate(padded, 1)) < 16
    assert len(set(padded)) <= 24, "each is kept by oneDNN"


def test_what_lies_in_onednns_layout_is_filled_up_to_few_sizes() -> None:
    """bf16 too; but not the few rows that a loop of our own takes."""
    weight = draw(64, 32)
    packed = packed_rows(40)
    is_bf16_packed = can_pack(weight) and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    expected = {"float32": packed if can_pack(weight) else 40, "bf16": packed if is_bf16_packed else 40, "int4": 40}
    assert {kind: make_linear(weight, None, kind).padded_rows(40) for kind in get_args(Weights)} == expected
    if can_pack(weight) and kernels.available():
        assert make_linear(weight).padded_rows(1) == 1


@pytest.mark.skipif(not can_pack(draw(1, 1)) or not kernels.available(), reason="nothing is packed here")
@pytest.mark.parametrize("size_out", [64, 72, 500])
def test_panels_are_the_weights(size_out: int) -> None:
    weight = draw(size_out, SIZE_IN)
    linear = PackedLinear(weight)
    assert linear.panels is not None, "oneDNN has changed its layout: a decode step takes 1.5 times as long"
    indices = torch.tensor([size_out - 1, 0, size_out // 2])
    assert torch.equal(linear.take_rows(indices), weight[indices])


@pytest.mark.skipif(not can_pack(draw(1, 1)), reason="nothing is packed here")
def test_another_layout_is_not_taken_for_panels() -> None:
    weight, other = draw(128, 64), draw(128, 64, seed=1)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 64)
    assert panels_of(packed, other) is None
    assert panels_of(packed, draw(64, 64)) is None
    assert panels_of(packed, weight.view(64, 128)) is None
