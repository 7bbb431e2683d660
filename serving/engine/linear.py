"""Products with fixed weights, laid out for the machine that multiplies.

On an x86 CPU in float32 the weights are reordered once into oneDNN's blocked layout: a plain row-major matrix of
a few hundred columns is read at half the memory's bandwidth for one row, and repacked at every call for a few.
Everywhere else they stay as they are. A packed matrix is a copy, so the caller drops the original.

A few rows are multiplied by a loop of our own where the layout turns out to be the one that it knows (see `kernels`):
oneDNN takes longer for one row than reading the weights takes, and keeps code for every number of rows.

Smaller weights are read faster, which is what a step of few rows takes its time for. Residuals, biases and results stay
float32 beside them; what is multiplied is rounded to bf16, and so is the product.
"""

import ctypes
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from serving.engine import kernels

_MIN_ROWS = 4
"""A product of oneDNN of fewer rows takes longer than one of four, so callers pad."""
_FEW_ROWS = 32
_ROWS_STEP = 16

_MAX_LOOP_ROWS = 32
"""Up to here our own loop takes no longer than oneDNN."""
_MAX_BF16_LOOP_ROWS = 4
"""The same for bf16, for which oneDNN has instructions."""

_PACKED_FOR_ROWS = 64
"""Rows that the layout is chosen for; it serves all others as well."""

Weights = Literal["float32", "bf16", "int4"]
"""How weights are kept. float32: as they were loaded, which is another dtype where the model has another."""

INT4_GROUP = 32
"""Neighbouring weights of a row that share a scale and a zero."""
INT4_LEVELS = 16
_INT4_ROWS = 16
"""Rows that the packed layout takes together."""

_VIEWED_HEAD_ROWS = 16
"""Up to here, weights @ rows is faster than rows @ weights for a matrix much taller than wide."""


class Linear(Protocol):
    """`x` is `(n, in)`, rows may be strided; the result is `(n, out)` and new."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The product plus `residual`, `(n, out)`."""
        ...

    @property
    def num_bytes(self) -> int:
        """Memory that the weights take."""
        ...

    def padded_rows(self, num_rows: int) -> int:
        """Rows that the caller fills up to, at least `num_rows`: fewer would take longer."""
        ...

    @property
    def max_loop_rows(self) -> int:
        """Up to so many rows, a loop of our own multiplies; 0 if there is none."""
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

    def padded_rows(self, num_rows: int) -> int:
        return num_rows

    @property
    def max_loop_rows(self) -> int:
        return 0

    @property
    def num_bytes(self) -> int:
        return _num_bytes(self.weight, self.bias)


class PackedLinear:
    """Weights in oneDNN's layout; the residual is added while the product is still in registers."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Needs `can_pack(weight)`."""
        self._weight = _packed(weight)
        self._size_out = weight.shape[0]
        self.panels = panels_of(self._weight, weight) if kernels.available() else None
        """The packed weights as `kernels` reads them, if it can."""
        self.bias = bias
        self._multiply: Any = torch.ops.mkldnn._linear_pointwise

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor
        if self.panels is not None and x.shape[0] <= _MAX_LOOP_ROWS:
            product = _multiply_rows(self.panels, x, self._size_out)
            return product if self.bias is None else product.add_(self.bias)
        product = self._multiply.default(x, self._weight, self.bias, "none", [], "")
        return product

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] <= self.max_loop_rows:
            return self(x).add_(residual)
        total: torch.Tensor = self._multiply.binary(x, residual, self._weight, self.bias, "add")
        return total

    def take_rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Some of the weights' rows, `(n, in)` for `indices` `(n,)`. Needs `panels`."""
        assert self.panels is not None
        rows = torch.empty(len(indices), self.panels.shape[1])
        kernels.take_rows(self.panels, indices.numpy(), rows.numpy())
        return rows

    def padded_rows(self, num_rows: int) -> int:
        return num_rows if num_rows <= self.max_loop_rows else packed_rows(num_rows)

    @property
    def max_loop_rows(self) -> int:
        return _MAX_LOOP_ROWS if self.panels is not None else 0

    @property
    def num_bytes(self) -> int:
        return _num_bytes(self._weight, self.bias)


class _RoundedLinear(ABC):
    """What multiplies in bf16: the product comes back in float32, with bias or residual beside it."""

    bias: torch.Tensor | None

    @abstractmethod
    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        """`x`, rounded, times the weights, `(n, out)`, rounded too. Or neither: that is but more exact."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        product = self._multiply(x).float()
        return product if self.bias is None else product.add_(self.bias)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        total = residual + self._multiply(x)
        return total if self.bias is None else total.add_(self.bias)


class Bf16Linear(_RoundedLinear):
    """Weights of half the size, in oneDNN's layout where the machine multiplies bf16, else as they are."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.bias = bias
        self._is_packed: bool = can_pack(weight) and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        rounded = weight.bfloat16()
        self._weight = _packed(rounded) if self._is_packed else rounded
        self._size_out = len(weight)
        self.panels = panels_of(self._weight, rounded) if self._is_packed and kernels.available() else None
        """The packed weights as `kernels` reads them, if it can."""

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        if self.panels is not None and x.shape[0] <= _MAX_BF16_LOOP_ROWS:
            return _multiply_rows(self.panels, x, self._size_out)
        rows = x.bfloat16()
        if not self._is_packed:
            return functional.linear(rows, self._weight)
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(rows, self._weight, None, "none", [], "")
        return product

    def padded_rows(self, num_rows: int) -> int:
        return packed_rows(num_rows) if self._is_packed and num_rows > self.max_loop_rows else num_rows

    @property
    def max_loop_rows(self) -> int:
        return _MAX_BF16_LOOP_ROWS if self.panels is not None else 0

    @property
    def num_bytes(self) -> int:
        return _num_bytes(self._weight, self.bias)


class Int4Linear(_RoundedLinear):
    """Weights of four bits, `(level - 8) * scale + zero` with a bf16 scale and zero for each `INT4_GROUP` of a row.

    A level is the nearest to the weight, and the levels of a group reach from its least weight to its greatest.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Needs `weight.shape[1]` to be a multiple of `INT4_GROUP`, on a CPU."""
        self._size_out = weight.shape[0]
        padded = functional.pad(weight.float(), (0, 0, 0, -self._size_out % _INT4_ROWS))
        levels, scales, zeros = quantise(padded.view(len(padded), -1, INT4_GROUP))
        pack: Any = torch._convert_weight_to_int4pack_for_cpu
        self._packed: torch.Tensor = pack(levels.flatten(1), 2)
        self._scales_and_zeros = torch.stack((scales, zeros), -1).transpose(0, 1).contiguous()
        self.bias = bias

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.to(torch.bfloat16, memory_format=torch.contiguous_format)
        multiply: Any = torch._weight_int4pack_mm_for_cpu
        product: torch.Tensor = multiply(rows, self._packed, INT4_GROUP, self._scales_and_zeros)
        return product[:, : self._size_out]

    def padded_rows(self, num_rows: int) -> int:
        return num_rows

    @property
    def max_loop_rows(self) -> int:
        return 0

    @property
    def num_bytes(self) -> int:
        return _num_bytes(self._packed, self._scales_and_zeros, self.bias)


def quantise(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Levels like `groups` `(rows, groups, INT4_GROUP)` in int32, scales and zeros `(rows, groups)` in bf16."""
    low, high = groups.amin(-1), groups.amax(-1)
    scales = ((high - low) / (INT4_LEVELS - 1)).bfloat16()
    # From the scales as they are rounded, so that both ends are off by the same.
    half = INT4_LEVELS // 2
    zeros = ((low + high) / 2 + scales.float() / 2).bfloat16()
    scales[scales == 0] = 1  # all weights of the group are alike: the zero is what they are
    levels = ((groups - zeros.float().unsqueeze(-1)) / scales.float().unsqueeze(-1)).round_().add_(half)
    return levels.clamp_(0, INT4_LEVELS - 1).int(), scales, zeros


def _packed(weight: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACKED_FOR_ROWS)
    return packed


def panels_of(packed: torch.Tensor, weight: torch.Tensor) -> kernels.Panels | None:
    """The memory of packed weights `(out, in)` as `kernels.multiply_rows` reads it, while these live.

    None if oneDNN has laid them out in another way.
    """
    size_out, size_in = weight.shape
    num_panels, num_bytes = -(-size_out // kernels.LANES), torch.ops.mkldnn._nbytes(packed)
    is_bf16 = weight.dtype == torch.bfloat16
    if num_bytes != num_panels * kernels.LANES * size_in * weight.element_size() or (is_bf16 and size_in % 2):
        return None
    address = ctypes.cast(torch.ops.mkldnn.data_ptr(packed), ctypes.POINTER(ctypes.c_uint8))
    memory = np.ctypeslib.as_array(address, (num_bytes,))
    panels: kernels.Panels
    if is_bf16:
        panels = memory.view(np.int32).reshape(num_panels, -1, kernels.LANES)
        pairs = panels.view(np.int16).reshape(num_panels, -1, kernels.LANES, 2)
        rows: npt.NDArray[Any] = pairs.transpose(0, 2, 1, 3)
        expected = weight.view(torch.int16)
    else:
        panels = memory.view(np.float32).reshape(num_panels, -1, kernels.LANES)
        rows, expected = panels.transpose(0, 2, 1), weight
    is_as_known = np.array_equal(rows.reshape(-1, size_in)[:size_out], expected.detach().numpy())
    return panels if is_as_known else None


def _multiply_rows(panels: kernels.Panels, x: torch.Tensor, size_out: int) -> torch.Tensor:
    out = x.new_empty(x.shape[0], size_out)
    kernels.multiply_rows(panels, x.contiguous().numpy(), out.numpy())
    return out


def _num_bytes(*tensors: torch.Tensor | None) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


class TiedHead:
    """An output head that shares the embedding's rows, which have to stay as they are.

    Where packed weights give their rows, one packed matrix serves both.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        num_rows = x.shape[0]
        if x.device.type != "cpu" or not 0 < num_rows <= _VIEWED_HEAD_ROWS:
            return functional.linear(x, self._weight)
        # One column is a matrix-vector product, which takes longer than two columns do.
        rows = x if num_rows > 1 else torch.cat((x, x))
        return torch.mm(self._weight, rows.t())[:, :num_rows].t()

    @property
    def num_bytes(self) -> int:
        return 0  # they are the embedding's


def packed_rows(num_rows: int) -> int:
    """Rows to pad to for packed products.

    oneDNN makes and keeps code for each number of rows, up to 1,024 products: about 250 MB for batches of every size.
    """
    step = _MIN_ROWS if num_rows <= _FEW_ROWS else _ROWS_STEP
    return -(-num_rows // step) * step


def can_pack(weight: torch.Tensor) -> bool:
    """Whether `PackedLinear` takes these weights."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch.backends.cpu.get_cpu_capability().startswith("AVX")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


def make_linear(weight: torch.Tensor, bias: torch.Tensor | None = None, weights: Weights = "float32") -> Linear:
    """The fastest product with these weights, kept as `weights`."""
    if weights == "bf16":
        return Bf16Linear(weight, bias)
    if weights == "int4":
        return Int4Linear(weight, bias)
    return PackedLinear(weight, bias) if can_pack(weight) else PlainLinear(weight, bias)
