"""Single tokens over the paged pool: every key and value is read once, where it lies.

A long sequence is cut into pieces, which threads share; the pieces' sums are merged at the end (flash-decoding).
"""

import math

import numpy as np
from numba import prange

from serving.engine.kernels.compiling import Floats, Ints, compiled
from serving.engine.kernels.llvm_builder import FLOAT_BYTES, WIDTH
from serving.engine.kernels.tiles import MAX_TILE_ROWS, add_products_16, add_products_64
from serving.engine.kernels.vectors import TOUCHED_BYTES, address, exp2, take_dots, touch

_KEYS_AT_ONCE = 64
"""Keys whose scores are taken before their values are added up; they are in the nearest cache then."""
LEAST = np.float32(-1e30)
"""Below every score; minus infinity has no difference to itself."""
LOG2_E = math.log2(math.e)


@compiled()
def add_weighted(
    num_rows: int, weights: int, row: int, at: int, values: int, stride: int, out: int, dim: int, n: int
) -> None:
    """Add `n` rows of values, `dim` floats each and `stride` apart, to each of some rows of sums at `out`.

    `weights` are `row` apart for the next sum and `at` for the next value; all as in `tiles`.
    """
    for first in range(0, num_rows, MAX_TILE_ROWS):
        count = min(MAX_TILE_ROWS, num_rows - first)
        a, c = weights + first * row * FLOAT_BYTES, out + first * dim * FLOAT_BYTES
        done = 0
        while dim - done >= 4 * WIDTH:
            offset = done * FLOAT_BYTES
            add_products_64(count, a, row, at, values + offset, stride, c + offset, dim, n)
            done += 4 * WIDTH
        while done < dim:
            offset = done * FLOAT_BYTES
            add_products_16(count, a, row, at, values + offset, stride, c + offset, dim, n)
            done += WIDTH


@compiled()
def _attend_piece(
    keys: Floats, values: Floats, query: Floats, first: int, num_slots: int, total: Floats, top: Floats, weight: Floats
) -> None:
    """Sums over consecutive slots, for each head.

    `weight` `(H,)` is that of the scores' powers of two, less their `top` `(H,)`, `total` `(H, D)` that of the values
    times these.
    """
    num_heads, head_dim = query.shape
    num_kv_heads = keys.shape[1]
    groups, stride = num_heads // num_kv_heads, num_kv_heads * head_dim
    scores = np.empty((num_heads, _KEYS_AT_ONCE), np.float32)
    scratch = np.empty(WIDTH, np.float32)
    total[:] = 0
    top[:] = LEAST
    weight[:] = 0
    for start in range(first, first + num_slots, _KEYS_AT_ONCE):
        count = min(_KEYS_AT_ONCE, first + num_slots - start)
        key = address(keys) + start * stride * FLOAT_BYTES
        value = address(values) + start * stride * FLOAT_BYTES
        _touch(key, count * stride, scratch)
        for at in range(0, count, WIDTH):
            for head in range(num_heads):
                take_dots(
                    address(query) + head * head_dim * FLOAT_BYTES,
                    key + (at * stride + head // groups * head_dim) * FLOAT_BYTES,
                    stride,
                    count - at - 1,
                    head_dim // WIDTH,
                    address(scores) + (head * _KEYS_AT_ONCE + at) * FLOAT_BYTES,
                )
        for head in range(num_heads):
            _take_weights(scores, head, count, total, top, weight)
        _touch(value, count * stride, scratch)
        for kv_head in range(num_kv_heads):
            add_weighted(
                groups,
                address(scores) + kv_head * groups * _KEYS_AT_ONCE * FLOAT_BYTES,
                _KEYS_AT_ONCE,
                1,
                value + kv_head * head_dim * FLOAT_BYTES,
                stride,
                address(total) + kv_head * groups * head_dim * FLOAT_BYTES,
                head_dim,
                count,
            )


@compiled()
def _touch(start: int, num_floats: int, scratch: Floats) -> None:
    num_bytes = num_floats * FLOAT_BYTES // TOUCHED_BYTES * TOUCHED_BYTES
    if num_bytes:
        touch(start, num_bytes, address(scratch))


@compiled()
def _take_weights(scores: Floats, head: int, count: int, total: Floats, top: Floats, weight: Floats) -> None:
    """Turn scores of one head into weights, and let what there is of it fade if they are higher."""
    highest = _highest(scores, head, count, top[head])
    fading = exp2(top[head] - highest)
    for i in range(total.shape[1]):
        total[head, i] *= fading
    for at in range(count):
        scores[head, at] = exp2(scores[head, at] - highest)
    top[head] = highest
    weight[head] = weight[head] * fading + _sum(scores, head, count)


@compiled(reorders=True)
def _highest(scores: Floats, head: int, count: int, highest: np.float32) -> np.float32:
    for at in range(count):
        highest = max(highest, scores[head, at])
    return highest


@compiled(reorders=True)
def _sum(weights: Floats, head: int, count: int) -> np.float32:
    total = np.float32(0)
    for at in range(count):
        total += weights[head, at]
    return total


@compiled(parallel=True)
def attend_tokens(query: Floats, pieces: Ints, kv: Floats, layer: int, scale: float, out: Floats) -> None:
    """Attention of single tokens, each over the slots of its pieces.

    `query` and `out` are `(B, H, D)`, `pieces` `(P, 3)` as in a `DecodePlan`, none of them empty, `kv` is the pool.
    """
    keys, values = kv[layer, 0], kv[layer, 1]
    num_tokens, num_heads, head_dim = query.shape
    num_pieces = pieces.shape[0]
    totals = np.empty((num_pieces, num_heads, head_dim), np.float32)
    tops = np.empty((num_pieces, num_heads), np.float32)
    weights = np.empty((num_pieces, num_heads), np.float32)
    for piece in prange(num_pieces):
        scaled = query[pieces[piece, 0]] * np.float32(scale * LOG2_E)
        _attend_piece(
            keys, values, scaled, pieces[piece, 1], pieces[piece, 2], totals[piece], tops[piece], weights[piece]
        )
    end = 0
    for token in range(num_tokens):
        begin = end
        while end < num_pieces and pieces[end, 0] == token:
            end += 1
        for head in range(num_heads):
            highest = LEAST
            for piece in range(begin, end):
                highest = max(highest, tops[piece, head])
            sum_of_weights = np.float32(0)
            for piece in range(begin, end):
                tops[piece, head] = exp2(tops[piece, head] - highest)  # from here on what the piece's sums count
                sum_of_weights += weights[piece, head] * tops[piece, head]
            for i in range(head_dim):
                attended = np.float32(0)
                for piece in range(begin, end):
                    attended += totals[piece, head, i] * tops[piece, head]
                out[token, head, i] = attended / sum_of_weights
