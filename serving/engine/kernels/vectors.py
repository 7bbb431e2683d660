"""What the loops are made of where a compiler left alone would not keep sums in registers: written in LLVM's terms.

A vector here has 16 floats: one register with AVX-512, two with AVX2. Matrices are given by addresses and strides, so
that a loop can walk through the KV pool or through packed weights as they lie:

    c[r, :] += sum over k of a[r, k] * b[k, :]        a tile of c is kept in registers, see `add_products_64`

      b: rows of 16 or 64 neighbouring floats, `b_row` apart; each is read once for all of the tile's rows
      a: single floats, `a_row` and `a_depth` apart, so either way round: a matrix or its transpose

Addresses are integers, strides count floats, nothing is checked.
"""

from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_intrinsic: Any = intrinsic  # its types take the context for an argument

WIDTH = 16
"""Floats of a vector."""
MAX_TILE_ROWS = 6
"""Rows whose sums fit into the registers, with AVX-512 as four vectors each."""
_FLOAT_BYTES = 4
_I32, _I64 = ir.IntType(32), ir.IntType(64)
_FLOAT = ir.FloatType()
_VECTOR = ir.VectorType(_FLOAT, WIDTH)
_INTS = ir.VectorType(_I32, WIDTH)

_HAS_AVX512 = bool(llvm.get_host_cpu_features().get("avx512f", False))
_VECTORS_AT_ONCE = 4 if _HAS_AVX512 else 1
"""Vectors of a tile's row for which there are registers."""

Loads = Callable[[ir.IRBuilder, Any], list[tuple[int, Any]]]


def _constant(value: int) -> ir.Constant:
    return ir.Constant(_I64, value)


def _declared(builder: ir.IRBuilder, name: str, result: ir.Type, *arguments: ir.Type) -> Any:
    declare: Any = cgutils.get_or_insert_function
    return declare(builder.module, ir.FunctionType(result, arguments), name)


def _load(builder: ir.IRBuilder, address: Any, kind: ir.Type) -> Any:
    value = builder.load(builder.inttoptr(address, kind.as_pointer()))
    value.align = _FLOAT_BYTES
    return value


def _store(builder: ir.IRBuilder, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = _FLOAT_BYTES


def _splat(builder: ir.IRBuilder, scalar: Any) -> Any:
    undefined = ir.Constant(_VECTOR, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_INTS, [0] * WIDTH))


def _multiply_add(builder: ir.IRBuilder, x: Any, y: Any, z: Any) -> Any:
    name = "llvm.fma.v16f32" if x.type == _VECTOR else "llvm.fma.f32"
    return builder.call(_declared(builder, name, x.type, *[x.type] * 3), [x, y, z])


def _bytes(builder: ir.IRBuilder, num_floats: Any) -> Any:
    return builder.mul(num_floats, _constant(_FLOAT_BYTES))


class _Loop:
    """`for _ in range(count)` around what is built in the block; runs at least once."""

    def __init__(self, builder: ir.IRBuilder, count: Any) -> None:
        self._builder = builder
        self._count = count
        self._carried: list[tuple[Any, Any]] = []
        self._before = builder.block
        self._block = builder.append_basic_block("loop")

    def __enter__(self) -> "_Loop":
        self._builder.branch(self._block)
        self._builder.position_at_end(self._block)
        self._index = self.carry(_constant(0))
        return self

    def carry(self, start: Any) -> Any:
        """A value that is another one in each round. All of them come before anything else in the block."""
        value = self._builder.phi(start.type)
        value.add_incoming(start, self._before)
        return value

    def pass_on(self, value: Any, following: Any) -> None:
        """What a carried value is in the next round."""
        self._carried.append((value, following))

    def results(self, carried: list[Any]) -> list[Any]:
        """What has been passed on at last, behind the loop."""
        passed = dict(self._carried)
        return [passed[value] for value in carried]

    def __exit__(self, *error: object) -> None:
        builder = self._builder
        following = builder.add(self._index, _constant(1))
        self.pass_on(self._index, following)
        end = builder.block
        for value, after in self._carried:
            value.add_incoming(after, end)
        done = builder.append_basic_block("done")
        builder.cbranch(builder.icmp_signed("<", following, self._count), self._block, done)
        builder.position_at_end(done)


@_intrinsic  # type: ignore[untyped-decorator]
def address(typing_context: Any, array: Any) -> Any:
    """Where an array's first element is."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        taken = context.make_array(signature.args[0])(context, builder, arguments[0])
        return builder.ptrtoint(taken.data, _I64)

    return types.int64(array), generate


# 2 ** f for f in [-0.5, 0.5], to 1e-7: the polynomial of degree 5 whose relative error is least (Remez).
_POWERS = (1.32764720e-3, 9.67554133e-3, 5.55071327e-2, 2.40221197e-1, 6.93146967e-1, 1.00000007)
_ROUNDING = 1.5 * 2**23
"""Added to a float32, it leaves the nearest integer in the lowest bits."""
_EXPONENT_SHIFT = 23
_LARGEST_POWER = 126.0


@_intrinsic  # type: ignore[untyped-decorator]
def exp2(typing_context: Any, x: Any) -> Any:
    """`2 ** x` to about two units in the last place, for loops over vectors; clamped at both ends of float32.

    2 ** (n + f): a polynomial for f, to whose exponent n is added. Not for loops that are compiled with `reorders`.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def real(value: float) -> Any:
            return ir.Constant(_FLOAT, value)

        (y,) = arguments
        y = builder.select(builder.fcmp_ordered(">", y, real(-_LARGEST_POWER)), y, real(-_LARGEST_POWER))
        y = builder.select(builder.fcmp_ordered("<", y, real(_LARGEST_POWER)), y, real(_LARGEST_POWER))
        shifted = builder.fadd(y, real(_ROUNDING))
        f = builder.fsub(y, builder.fsub(shifted, real(_ROUNDING)))
        power = real(_POWERS[0])
        for coefficient in _POWERS[1:]:
            power = _multiply_add(builder, power, f, real(coefficient))
        exponent = builder.shl(builder.bitcast(shifted, _I32), ir.Constant(_I32, _EXPONENT_SHIFT))
        return builder.bitcast(builder.add(builder.bitcast(power, _I32), exponent), _FLOAT)

    return types.float32(types.float32), generate


def _load_floats(num_vectors: int) -> Loads:
    def load(builder: ir.IRBuilder, at: Any) -> list[tuple[int, Any]]:
        offsets = (_constant(v * WIDTH * _FLOAT_BYTES) for v in range(num_vectors))
        return [(0, _load(builder, builder.add(at, offset), _VECTOR)) for offset in offsets]

    return load


def _load_pairs(num_vectors: int) -> Loads:
    """Two rows of bf16 in one of int32. A bf16 is the upper half of the float32 that it stands for."""

    def load(builder: ir.IRBuilder, at: Any) -> list[tuple[int, Any]]:
        offsets = (_constant(v * WIDTH * _FLOAT_BYTES) for v in range(num_vectors))
        both = [_load(builder, builder.add(at, offset), _INTS) for offset in offsets]
        shift, mask = (ir.Constant(_INTS, [value] * WIDTH) for value in (16, -65536))
        even = [(0, builder.bitcast(builder.shl(x, shift), _VECTOR)) for x in both]
        return even + [(1, builder.bitcast(builder.and_(x, mask), _VECTOR)) for x in both]

    return load


class _Tile:
    """Builds the sums of some rows of `c` over neighbouring columns."""

    def __init__(self, builder: ir.IRBuilder, arguments: Any, num_rows: int, *, adds: bool, loads: Loads) -> None:
        self._builder = builder
        self._num_rows = num_rows
        self._adds = adds
        self._loads = loads
        a, a_row, a_depth, self._b, b_row, self._c, c_row, self._depth = arguments
        self._a_row, self._a_depth, self._b_row, self._c_row = (
            _bytes(builder, stride) for stride in (a_row, a_depth, b_row, c_row)
        )
        self._a_rows = [self._at(a, self._a_row, row) for row in range(num_rows)]

    def _at(self, start: Any, stride: Any, row: int) -> Any:
        return self._builder.add(start, self._builder.mul(stride, _constant(row)))

    def build(self, first_vector: int, num_vectors: int) -> None:
        builder = self._builder
        offset = _constant(first_vector * WIDTH * _FLOAT_BYTES)
        places = [
            builder.add(self._at(self._c, self._c_row, row), _constant((first_vector + v) * WIDTH * _FLOAT_BYTES))
            for row in range(self._num_rows)
            for v in range(num_vectors)
        ]
        zero = ir.Constant(_VECTOR, [0.0] * WIDTH)
        starts = [_load(builder, place, _VECTOR) if self._adds else zero for place in places]
        b = builder.add(self._b, offset)
        with _Loop(builder, self._depth) as loop:
            a_offset, b_at = loop.carry(_constant(0)), loop.carry(b)
            carried = [loop.carry(start) for start in starts]
            sums = list(carried)
            loaded = self._loads(builder, b_at)
            for row in range(self._num_rows):
                a_at = builder.add(self._a_rows[row], a_offset)
                for at, (step, vector) in enumerate(loaded):
                    factor = _load(builder, self._at(a_at, self._a_depth, step), _FLOAT)
                    index = row * num_vectors + at % num_vectors
                    sums[index] = _multiply_add(builder, _splat(builder, factor), vector, sums[index])
            steps = 1 + loaded[-1][0]
            loop.pass_on(a_offset, self._at(a_offset, self._a_depth, steps))
            loop.pass_on(b_at, builder.add(b_at, self._b_row))
            for value, following in zip(carried, sums, strict=True):
                loop.pass_on(value, following)
        for place, total in zip(places, sums, strict=True):
            _store(builder, total, place)


def _by_rows(builder: ir.IRBuilder, num_rows: Any, build: Callable[[int], None]) -> None:
    """Code for each number of rows up to MAX_TILE_ROWS, of which the right one runs."""
    end = builder.append_basic_block("end")
    choice = builder.switch(num_rows, end)
    for count in range(1, MAX_TILE_ROWS + 1):
        block = builder.append_basic_block(f"rows{count}")
        choice.add_case(_constant(count), block)
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


_READ, _NEAR, _DATA = (ir.Constant(_I32, value) for value in (0, 2, 1))


@_intrinsic  # type: ignore[untyped-decorator]
def prefetch_rows(typing_context: Any, start: Any, row_stride: Any, num_rows: Any, num_lines: Any) -> Any:
    """Ask for rows of memory, `num_lines` lines of 64 bytes each, without waiting for them; any address will do."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start, row_stride, num_rows, num_lines = arguments
        row_bytes = _bytes(builder, row_stride)
        pointer = ir.IntType(8).as_pointer()
        ask = _declared(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, _I32, _I32, _I32)
        with _Loop(builder, num_rows) as rows:
            row = rows.carry(start)
            with _Loop(builder, num_lines) as lines:
                at = lines.carry(row)
                builder.call(ask, [builder.inttoptr(at, pointer), _READ, _NEAR, _DATA])
                lines.pass_on(at, builder.add(at, _constant(64)))
            rows.pass_on(row, builder.add(row, row_bytes))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


_LINE_BYTES = 64
_LINES_AT_ONCE = 8


@_intrinsic  # type: ignore[untyped-decorator]
def touch(typing_context: Any, start: Any, num_bytes: Any, out: Any) -> Any:
    """Read memory into the nearest caches, as fast as it comes; `num_bytes` are at least 512 and a multiple of that.

    A loop that computes with what it reads waits longer for it: fewer reads are under way at a time. Their sum is
    written to the vector at `out`, or the compiler would leave them out.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start, num_bytes, out = arguments
        zero = ir.Constant(_VECTOR, [0.0] * WIDTH)
        with _Loop(builder, builder.sdiv(num_bytes, _constant(_LINE_BYTES * _LINES_AT_ONCE))) as loop:
            at = loop.carry(start)
            carried = [loop.carry(zero) for _ in range(_LINES_AT_ONCE)]
            for line, before in enumerate(carried):
                value = _load(builder, builder.add(at, _constant(line * _LINE_BYTES)), _VECTOR)
                loop.pass_on(before, builder.fadd(before, value))
            loop.pass_on(at, builder.add(at, _constant(_LINE_BYTES * _LINES_AT_ONCE)))
        total = zero
        for value in loop.results(carried):
            total = builder.fadd(total, value)
        _store(builder, total, out)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@_intrinsic  # type: ignore[untyped-decorator]
def take_dots(
    typing_context: Any, x: Any, rows: Any, row_stride: Any, last_row: Any, num_vectors: Any, out: Any
) -> Any:
    """Dot products of `x` and WIDTH rows of `num_vectors` vectors each, to WIDTH floats at `out`.

    Rows behind `last_row` are not read: that one takes their place.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, rows, row_stride, last_row, num_vectors, out = arguments
        row_bytes = _bytes(builder, row_stride)

        def row_at(index: int) -> Any:
            wanted = _constant(index)
            is_there = builder.icmp_signed("<=", wanted, last_row)
            return builder.add(rows, builder.mul(builder.select(is_there, wanted, last_row), row_bytes))

        starts = [row_at(index) for index in range(WIDTH)]
        zero = ir.Constant(_VECTOR, [0.0] * WIDTH)
        with _Loop(builder, num_vectors) as loop:
            offset = loop.carry(_constant(0))
            carried = [loop.carry(zero) for _ in starts]
            factors = _load(builder, builder.add(x, offset), _VECTOR)
            for start, before in zip(starts, carried, strict=True):
                row = _load(builder, builder.add(start, offset), _VECTOR)
                loop.pass_on(before, _multiply_add(builder, row, factors, before))
            loop.pass_on(offset, builder.add(offset, _constant(WIDTH * _FLOAT_BYTES)))
        _store(builder, _sums_of_lanes(builder, loop.results(carried)), out)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), generate


def _sums_of_lanes(builder: ir.IRBuilder, vectors: list[Any]) -> Any:
    """One vector with the sum of each of the 16: neighbours are added, in pairs of vectors, until one is left."""
    even, odd = (ir.Constant(_INTS, list(range(first, 2 * WIDTH, 2))) for first in (0, 1))
    while len(vectors) > 1:
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [
            builder.fadd(builder.shuffle_vector(x, y, even), builder.shuffle_vector(x, y, odd)) for x, y in pairs
        ]
    return vectors[0]
