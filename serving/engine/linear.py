"""Products with fixed weights, laid out for the machine that multiplies.

On an x86 CPU in float32 the weights are reordered once into oneDNN's blocked layout: a plain row-major matrix of
a few hundred columns is read at half the memory's bandwidth for one row, and repacked at every call for a few.
Everywhere else they stay as they are. A packed matrix is a copy, so the caller drops the original.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn import functional

PACKED_MIN_ROWS = 4
"""A packed product of fewer rows takes longer than one of four, so callers pad."""

_PACKED_FOR_ROWS = 64
"""Rows that the layout is chosen for; it serves all others as well."""

_VIEWED_HEAD_ROWS = 16
"""Up to here, weights @ rows is faster than rows @ weights for a matrix much taller than wide."""


class Linear(Protocol):
    """`x` is `(n, in)`, rows may be strided; the result is `(n, out)` and new."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The product plus `residual`, `(n, out)`."""
        ...


@dataclass(frozen=True, slots=True)
class PlainLinear:
    """Weights `(out, in)` as they are, on any device and in any dtype."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight, self.bias)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        total = torch.addmm(residual, x, self.weight.t())
        return total if self.bias is None else total.add_(self.bias)


class PackedLinear:
    """Weights in oneDNN's layout; the residual is added while the product is still in registers."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Needs `can_pack(weight)`."""
        self._weight: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACKED_FOR_ROWS)
        self._bias = bias
        self._multiply: Any = torch.ops.mkldnn._linear_pointwise

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = self._multiply.default(x, self._weight, self._bias, "none", [], "")
        return product

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        total: torch.Tensor = self._multiply.binary(x, residual, self._weight, self._bias, "add")
        return total


class TiedHead:
    """An output head that shares the embedding's rows, which have to stay as they are."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        num_rows = x.shape[0]
        if x.device.type != "cpu" or not 0 < num_rows <= _VIEWED_HEAD_ROWS:
            return functional.linear(x, self._weight)
        # One column is a matrix-vector product, which takes longer than two columns do.
        rows = x if num_rows > 1 else torch.cat((x, x))
        return torch.mm(self._weight, rows.t())[:, :num_rows].t()


def can_pack(weight: torch.Tensor) -> bool:
    """Whether `PackedLinear` takes these weights."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch.backends.cpu.get_cpu_capability().startswith("AVX")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


def make_linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
    """The fastest product with these weights."""
    return PackedLinear(weight, bias) if can_pack(weight) else PlainLinear(weight, bias)
