"""Products whose results stay in registers, which a compiler left alone would not do.

    c[r, :] += sum over k of a[r, k] * b[k, :]        a tile of c is in registers while k runs

      b: rows of 16 or 64 neighbouring floats, `b_row` apart; each is read once for all of the tile's rows
      a: single floats, `a_row` and `a_depth` apart, so either way round: a matrix or its transpose

Matrices are given by addresses and strides, which count floats, so that a loop can walk through the KV pool or through
packed weights as they lie. Nothing is checked.
"""

from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from serving.engine.kernels.llvm_builder import (
    FLOAT,
    FLOAT_BYTES,
    INTS,
    VECTOR,
    WIDTH,
    Loop,
    constant,
    load,
    multiply_add,
    num_bytes_of,
    splat,
    store,
)

_intrinsic: Any = intrinsic  # its types take the context for an argument

MAX_TILE_ROWS = 6
"""Rows whose sums fit into the registers, with AVX-512 as four vectors each."""

_HAS_AVX512 = bool(llvm.get_host_cpu_features().get("avx512f", False))
_VECTORS_AT_ONCE = 4 if _HAS_AVX512 else 1
"""Vectors of a tile's row for which there are registers."""

Loads = Callable[[ir.IRBuilder, Any], list[tuple[int, Any]]]
"""Loads vectors of `b` at an address, each with the offset of the float of `a` that it belongs to."""


def _load_floats(num_vectors: int) -> Loads:
    def build(builder: ir.IRBuilder, at: Any) -> list[tuple[int, Any]]:
        offsets = (constant(v * WIDTH * FLOAT_BYTES) for v in range(num_vectors))
        return [(0, load(builder, builder.add(at, offset), VECTOR)) for offset in offsets]

    return build


def _load_pairs(num_vectors: int) -> Loads:
    """Two rows of bf16 in one of int32. A bf16 is the upper half of the float32 that it stands for."""

    def build(builder: ir.IRBuilder, at: Any) -> list[tuple[int, Any]]:
        offsets = (constant(v * WIDTH * FLOAT_BYTES) for v in range(num_vectors))
        both = [load(builder, builder.add(at, offset), INTS) for offset in offsets]
        shift, mask = (ir.Constant(INTS, [value] * WIDTH) for value in (16, -65536))
        even = [(0, builder.bitcast(builder.shl(x, shift), VECTOR)) for x in both]
        return even + [(1, builder.bitcast(builder.and_(x, mask), VECTOR)) for x in both]

    return build


class _Tile:
    """Builds the sums of some rows of `c` over neighbouring columns."""

    def __init__(self, builder: ir.IRBuilder, arguments: Any, num_rows: int, *, adds: bool, loads: Loads) -> None:
        self._builder = builder
        self._num_rows = num_rows
        self._adds = adds
        self._loads = loads
        a, a_row, a_depth, self._b, b_row, self._c, c_row, self._depth = arguments
        self._a_row, self._a_depth, self._b_row, self._c_row = (
            num_bytes_of(builder, stride) for stride in (a_row, a_depth, b_row, c_row)
        )
        self._a_rows = [self._at(a, self._a_row, row) for row in range(num_rows)]

    def _at(self, start: Any, stride: Any, row: int) -> Any:
        return self._builder.add(start, self._builder.mul(stride, constant(row)))

    def build(self, first_vector: int, num_vectors: int) -> None:
        builder = self._builder
        offset = constant(first_vector * WIDTH * FLOAT_BYTES)
        places = [
            builder.add(self._at(self._c, self._c_row, row), constant((first_vector + v) * WIDTH * FLOAT_BYTES))
            for row in range(self._num_rows)
            for v in range(num_vectors)
        ]
        zero = ir.Constant(VECTOR, [0.0] * WIDTH)
        starts = [load(builder, place, VECTOR) if self._adds else zero for place in places]
        b = builder.add(self._b, offset)
        with Loop(builder, self._depth) as loop:
            a_offset, b_at = loop.carry(constant(0)), loop.carry(b)
            carried = [loop.carry(start) for start in starts]
            sums = list(carried)
            loaded = self._loads(builder, b_at)
            for row in range(self._num_rows):
                a_at = builder.add(self._a_rows[row], a_offset)
                for at, (step, vector) in enumerate(loaded):
                    factor = load(builder, self._at(a_at, self._a_depth, step), FLOAT)
                    index = row * num_vectors + at % num_vectors
                    sums[index] = multiply_add(builder, splat(builder, factor), vector, sums[index])
            steps = 1 + loaded[-1][0]
            loop.pass_on(a_offset, self._at(a_offset, self._a_depth, steps))
            loop.pass_on(b_at, builder.add(b_at, self._b_row))
            for value, following in zip(carried, sums, strict=True):
                loop.pass_on(value, following)
        for place, total in zip(places, sums, strict=True):
            store(builder, total, place)


def _by_rows(builder: ir.IRBuilder, num_rows: Any, build: Callable[[int], None]) -> None:
    """Code for each number of rows up to MAX_TILE_ROWS, of which the right one runs."""
    end = builder.append_basic_block("end")
    choice = builder.switch(num_rows, end)
    for count in range(1, MAX_TILE_ROWS + 1):
        block = builder.append_basic_block(f"rows{count}")
        choice.add_case(constant(count), block)
        builder.position_at_end(block)
        build(count)
        builder.branch(end)
    builder.position_at_end(end)


def _make_tile(num_vectors: int, *, adds: bool, loads: Callable[[int], Loads] = _load_floats) -> Any:
    at_once = min(num_vectors, _VECTORS_AT_ONCE)

    @_intrinsic  # type: ignore[untyped-decorator]
    def multiply(
        typing_context: Any,
        num_rows: Any,
        a: Any,
        a_row: Any,
        a_depth: Any,
        b: Any,
        b_row: Any,
        c: Any,
        c_row: Any,
        depth: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            def build(count: int) -> None:
                tile = _Tile(builder, arguments[1:], count, adds=adds, loads=loads(at_once))
                for first in range(0, num_vectors, at_once):
                    tile.build(first, at_once)

            _by_rows(builder, arguments[0], build)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), generate

    return multiply


set_products_64 = _make_tile(4, adds=False)
"""`(num_rows, a, a_row, a_depth, b, b_row, c, c_row, depth)`: `c` is the products of 1 to MAX_TILE_ROWS rows.

64 columns; `depth` is at least 1."""
add_products_64 = _make_tile(4, adds=True)
"""The same, added to what `c` is."""
add_products_16 = _make_tile(1, adds=True)
"""The same for 16 columns."""
set_bf16_products_64 = _make_tile(4, adds=False, loads=_load_pairs)
"""As `set_products_64`, with rows of `b` that are int32, each the two bf16 of a column in two rows, the first in the
lower half. `depth` counts such pairs, `a_depth` is between single floats of `a`."""
