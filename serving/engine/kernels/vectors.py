"""Small things that loops are made of, written in LLVM's terms: powers of two, dot products, what brings memory nearer.

Addresses are integers, strides count floats, nothing is checked.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from serving.engine.kernels.llvm_builder import (
    FLOAT,
    FLOAT_BYTES,
    I32,
    I64,
    INTS,
    LINE_BYTES,
    VECTOR,
    WIDTH,
    Loop,
    constant,
    declared,
    load,
    multiply_add,
    num_bytes_of,
    store,
)

_intrinsic: Any = intrinsic  # its types take the context for an argument


@_intrinsic  # type: ignore[untyped-decorator]
def address(typing_context: Any, array: Any) -> Any:
    """Where an array's first element is."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        taken = context.make_array(signature.args[0])(context, builder, arguments[0])
        return builder.ptrtoint(taken.data, I64)

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
            return ir.Constant(FLOAT, value)

        (y,) = arguments
        y = builder.select(builder.fcmp_ordered(">", y, real(-_LARGEST_POWER)), y, real(-_LARGEST_POWER))
        y = builder.select(builder.fcmp_ordered("<", y, real(_LARGEST_POWER)), y, real(_LARGEST_POWER))
        shifted = builder.fadd(y, real(_ROUNDING))
        f = builder.fsub(y, builder.fsub(shifted, real(_ROUNDING)))
        power = real(_POWERS[0])
        for coefficient in _POWERS[1:]:
            power = multiply_add(builder, power, f, real(coefficient))
        exponent = builder.shl(builder.bitcast(shifted, I32), ir.Constant(I32, _EXPONENT_SHIFT))
        return builder.bitcast(builder.add(builder.bitcast(power, I32), exponent), FLOAT)

    return types.float32(types.float32), generate


_READ, _NEAR, _DATA = (ir.Constant(I32, value) for value in (0, 2, 1))


@_intrinsic  # type: ignore[untyped-decorator]
def prefetch_rows(typing_context: Any, start: Any, row_stride: Any, num_rows: Any, num_lines: Any) -> Any:
    """Ask for rows of memory, `num_lines` lines of 64 bytes each, without waiting for them; any address will do."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start, row_stride, num_rows, num_lines = arguments
        row_bytes = num_bytes_of(builder, row_stride)
        pointer = ir.IntType(8).as_pointer()
        ask = declared(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, I32, I32, I32)
        with Loop(builder, num_rows) as rows:
            row = rows.carry(start)
            with Loop(builder, num_lines) as lines:
                at = lines.carry(row)
                builder.call(ask, [builder.inttoptr(at, pointer), _READ, _NEAR, _DATA])
                lines.pass_on(at, builder.add(at, constant(LINE_BYTES)))
            rows.pass_on(row, builder.add(row, row_bytes))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


_LINES_AT_ONCE = 8
TOUCHED_BYTES = LINE_BYTES * _LINES_AT_ONCE
"""What `touch` reads at a time."""


@_intrinsic  # type: ignore[untyped-decorator]
def touch(typing_context: Any, start: Any, num_bytes: Any, out: Any) -> Any:
    """Read memory into the nearest caches, as fast as it comes; `num_bytes` are a multiple of TOUCHED_BYTES, not 0.

    A loop that computes with what it reads waits longer for it: fewer reads are under way at a time. Their sum is
    written to the vector at `out`, or the compiler would leave them out.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start, num_bytes, out = arguments
        zero = ir.Constant(VECTOR, [0.0] * WIDTH)
        with Loop(builder, builder.sdiv(num_bytes, constant(TOUCHED_BYTES))) as loop:
            at = loop.carry(start)
            carried = [loop.carry(zero) for _ in range(_LINES_AT_ONCE)]
            for line, before in enumerate(carried):
                value = load(builder, builder.add(at, constant(line * LINE_BYTES)), VECTOR)
                loop.pass_on(before, builder.fadd(before, value))
            loop.pass_on(at, builder.add(at, constant(TOUCHED_BYTES)))
        total = zero
        for value in loop.results(carried):
            total = builder.fadd(total, value)
        store(builder, total, out)
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
        row_bytes = num_bytes_of(builder, row_stride)

        def row_at(index: int) -> Any:
            wanted = constant(index)
            is_there = builder.icmp_signed("<=", wanted, last_row)
            return builder.add(rows, builder.mul(builder.select(is_there, wanted, last_row), row_bytes))

        starts = [row_at(index) for index in range(WIDTH)]
        zero = ir.Constant(VECTOR, [0.0] * WIDTH)
        with Loop(builder, num_vectors) as loop:
            offset = loop.carry(constant(0))
            carried = [loop.carry(zero) for _ in starts]
            factors = load(builder, builder.add(x, offset), VECTOR)
            for start, before in zip(starts, carried, strict=True):
                row = load(builder, builder.add(start, offset), VECTOR)
                loop.pass_on(before, multiply_add(builder, row, factors, before))
            loop.pass_on(offset, builder.add(offset, constant(WIDTH * FLOAT_BYTES)))
        store(builder, _sums_of_lanes(builder, loop.results(carried)), out)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), generate


def _sums_of_lanes(builder: ir.IRBuilder, vectors: list[Any]) -> Any:
    """One vector with the sum of each of the 16: neighbours are added, in pairs of vectors, until one is left."""
    even, odd = (ir.Constant(INTS, list(range(first, 2 * WIDTH, 2))) for first in (0, 1))
    while len(vectors) > 1:
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [
            builder.fadd(builder.shuffle_vector(x, y, even), builder.shuffle_vector(x, y, odd)) for x, y in pairs
        ]
    return vectors[0]
