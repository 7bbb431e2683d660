"""LLVM's instructions, as the loops need them: vectors of 16 floats, addresses as integers, loops with carried values.

A vector is one register with AVX-512, and two with AVX2. Strides count floats. Nothing is checked.
"""

from typing import Any

from llvmlite import ir
from numba.core import cgutils

WIDTH = 16
"""Floats of a vector."""
FLOAT_BYTES = 4
LINE_BYTES = 64
"""Of a cache."""

I32, I64 = ir.IntType(32), ir.IntType(64)
FLOAT = ir.FloatType()
VECTOR = ir.VectorType(FLOAT, WIDTH)
INTS = ir.VectorType(I32, WIDTH)


def constant(value: int) -> ir.Constant:
    return ir.Constant(I64, value)


def declared(builder: ir.IRBuilder, name: str, result: ir.Type, *arguments: ir.Type) -> Any:
    declare: Any = cgutils.get_or_insert_function
    return declare(builder.module, ir.FunctionType(result, arguments), name)


def load(builder: ir.IRBuilder, address: Any, kind: ir.Type) -> Any:
    value = builder.load(builder.inttoptr(address, kind.as_pointer()))
    value.align = FLOAT_BYTES
    return value


def store(builder: ir.IRBuilder, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = FLOAT_BYTES


def splat(builder: ir.IRBuilder, scalar: Any) -> Any:
    undefined = ir.Constant(VECTOR, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(INTS, [0] * WIDTH))


def multiply_add(builder: ir.IRBuilder, x: Any, y: Any, z: Any) -> Any:
    name = "llvm.fma.v16f32" if x.type == VECTOR else "llvm.fma.f32"
    return builder.call(declared(builder, name, x.type, *[x.type] * 3), [x, y, z])


def num_bytes_of(builder: ir.IRBuilder, num_floats: Any) -> Any:
    return builder.mul(num_floats, constant(FLOAT_BYTES))


class Loop:
    """`for _ in range(count)` around what is built in the block; runs at least once."""

    def __init__(self, builder: ir.IRBuilder, count: Any) -> None:
        self._builder = builder
        self._count = count
        self._carried: list[tuple[Any, Any]] = []
        self._before = builder.block
        self._block = builder.append_basic_block("loop")

    def __enter__(self) -> "Loop":
        self._builder.branch(self._block)
        self._builder.position_at_end(self._block)
        self._index = self.carry(constant(0))
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
        following = builder.add(self._index, constant(1))
        self.pass_on(self._index, following)
        end = builder.block
        for value, after in self._carried:
            value.add_incoming(after, end)
        done = builder.append_basic_block("done")
        builder.cbranch(builder.icmp_signed("<", following, self._count), self._block, done)
        builder.position_at_end(done)
