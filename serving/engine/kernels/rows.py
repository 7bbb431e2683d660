"""What is done to each row by itself, where torch takes several passes: norms, gates, rotary positions.

Each loop is there twice: on all threads, and on the caller's alone, for a few rows that take less time than threads
take to begin.
"""

import math

import numpy as np
from numba import prange

from serving.engine.kernels.compiling import Floats, Ints, compiled
from serving.engine.kernels.vectors import exp2

_LOG2_E = np.float32(math.log2(math.e))


@compiled(reorders=True)
def _norm_row(x: Floats, weight: Floats, eps: float, out: Floats, row: int) -> None:
    size = x.shape[1]
    total = np.float32(0)
    for at in range(size):
        total += x[row, at] * x[row, at]
    factor = np.float32(1 / math.sqrt(total / size + eps))
    for at in range(size):
        out[row, at] = x[row, at] * factor * weight[at]


@compiled(parallel=True)
def norm(x: Floats, weight: Floats, eps: float, out: Floats) -> None:
    """`x * weight / sqrt(mean(x^2) + eps)` of each row (RMSNorm, arXiv 1910.07467); `x` and `out` are `(n, size)`."""
    for row in prange(x.shape[0]):
        _norm_row(x, weight, eps, out, row)


@compiled()
def norm_alone(x: Floats, weight: Floats, eps: float, out: Floats) -> None:
    """`norm` on one thread."""
    for row in range(x.shape[0]):
        _norm_row(x, weight, eps, out, row)


@compiled()
def _gate_row(gate_up: Floats, out: Floats, row: int) -> None:
    size = out.shape[1]
    for at in range(size):
        x = gate_up[row, at]
        out[row, at] = x / (np.float32(1) + exp2(-x * _LOG2_E)) * gate_up[row, size + at]


@compiled(parallel=True)
def gate(gate_up: Floats, out: Floats) -> None:
    """SiLU of the first half of each row times the second: `gate_up` is `(n, 2 size)`, `out` `(n, size)`."""
    for row in prange(out.shape[0]):
        _gate_row(gate_up, out, row)


@compiled()
def gate_alone(gate_up: Floats, out: Floats) -> None:
    """`gate` on one thread."""
    for row in range(out.shape[0]):
        _gate_row(gate_up, out, row)


@compiled()
def _store_rotated_row(
    qkv: Floats, num_heads: int, cos: Floats, sin: Floats, slots: Ints, kv: Floats, layer: int, row: int
) -> None:
    num_kv_heads, half = kv.shape[3], kv.shape[4] // 2
    for head in range(num_heads + num_kv_heads):
        for at in range(half):
            low, high = qkv[row, head, at], qkv[row, head, at + half]
            qkv[row, head, at] = low * cos[row, at] - high * sin[row, at]
            qkv[row, head, at + half] = high * cos[row, at] + low * sin[row, at]
    for head in range(num_kv_heads):
        for at in range(2 * half):
            kv[layer, 0, slots[row], head, at] = qkv[row, num_heads + head, at]
            kv[layer, 1, slots[row], head, at] = qkv[row, num_heads + num_kv_heads + head, at]


@compiled(parallel=True)
def store_rotated(qkv: Floats, num_heads: int, cos: Floats, sin: Floats, slots: Ints, kv: Floats, layer: int) -> None:
    """Turn queries and keys (RoFormer, arXiv 2104.09864; halves paired), then write keys and values to their slots.

    `qkv` is `(T, H + 2 Hkv, D)` and changed in place, `cos` and `sin` are `(T, D / 2)`, `slots` `(T,)` and `kv` the
    pool `(layers, 2, num_slots, Hkv, D)`.
    """
    for row in prange(qkv.shape[0]):
        _store_rotated_row(qkv, num_heads, cos, sin, slots, kv, layer, row)


@compiled()
def store_rotated_alone(
    qkv: Floats, num_heads: int, cos: Floats, sin: Floats, slots: Ints, kv: Floats, layer: int
) -> None:
    """`store_rotated` on one thread."""
    for row in range(qkv.shape[0]):
        _store_rotated_row(qkv, num_heads, cos, sin, slots, kv, layer, row)
