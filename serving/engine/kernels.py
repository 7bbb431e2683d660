"""Loops of a step on a CPU, compiled by numba, where torch's operations are far from what the memory gives.

    store_rotated    rotary positions, in place, and the new rows' way into the pool
    attend_tokens    single tokens over the paged pool: every key and value is read once, where it lies
    multiply_few     a few rows times packed weights: as fast as the weights can be read
    norm, gate       what torch does in several passes
    decode_layer     all of it: a whole layer for a few single tokens in one call

All arrays are C-contiguous float32 unless said otherwise, and nothing is checked: callers know the shapes. The loops
run on the threads that torch's own operations use, as both are OpenMP's of one library; where numba has none of
these (see `available`), callers take torch's operations. Compiled code is kept beside this file or in the user's
cache folder, so only the first process after an installation compiles.
"""

import importlib
import math
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic, overload

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Panels = npt.NDArray[np.float32] | npt.NDArray[np.int32]

_settings: Any = numba.config  # its types know no settings
_intrinsic: Any = intrinsic  # its types take the context for an argument
_overload: Any = overload  # and know no options

LANES = 64
"""Neighbouring outputs that packed weights keep together."""

_KEYS_AT_ONCE = 128
"""Keys whose scores are taken before their values are added up: what is read is still the memory's to stream."""
_LEAST = np.float32(-1e30)
"""Below every score; minus infinity has no difference to itself."""

F = TypeVar("F", bound=Callable[..., Any])


def _compiled(**options: Any) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        dispatcher: Any = njit(fastmath=True, error_model="numpy", nogil=True, **options)(function)
        with suppress(RuntimeError):  # no folder for it that this user may write to: then each process compiles
            dispatcher.enable_caching()
        return cast("F", dispatcher)

    return decorate


@cache
def available() -> bool:
    """Whether numba shares OpenMP's threads with torch here, which it does on Linux."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        importlib.import_module("numba.np.ufunc.omppool")  # looks for OpenMP's library, which torch has loaded
    except ImportError:
        return False
    _settings.THREADING_LAYER = "omp"
    num_threads = torch.get_num_threads()
    numba.get_num_threads()  # starts its side of OpenMP, which sets this number for the calling thread
    torch.set_num_threads(num_threads)
    return True


def set_num_threads(num_threads: int) -> None:
    """Threads of the calling thread's loops."""
    if available():
        numba.set_num_threads(min(num_threads, _settings.NUMBA_NUM_THREADS))


@_intrinsic  # type: ignore[untyped-decorator]
def _as_float(typing_context: Any, bits: Any) -> Any:
    """The float32 whose bits an int32 has."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@_compiled(inline="always")
def exp(x: np.float32) -> np.float32:
    """`e ** x` to about two units in the last place, for loops over vectors; clamped at both ends of float32.

    2 ** (n + f) for f in [-0.5, 0.5]: the exponent's bits times a polynomial through 2 ** f's Chebyshev nodes.
    """
    y = min(max(x * np.float32(1.44269504), np.float32(-126.0)), np.float32(126.0))
    whole = math.floor(y + np.float32(0.5))
    f = y - whole
    power = np.float32(1.54614447e-4)
    power = power * f + np.float32(1.34004282e-3)
    power = power * f + np.float32(9.61805668e-3)
    power = power * f + np.float32(5.55032723e-2)
    power = power * f + np.float32(2.40226509e-1)
    power = power * f + np.float32(6.93147207e-1)
    power = power * f + np.float32(1.0)
    scaled: np.float32 = power * _as_float(np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)))
    return scaled


@_compiled(parallel=True)
def store_rotated(qkv: Floats, num_heads: int, cos: Floats, sin: Floats, slots: Ints, kv: Floats, layer: int) -> None:
    """Turn queries and keys (RoFormer, arXiv 2104.09864; halves paired), then write keys and values to their slots.

    `qkv` is `(T, H + 2 Hkv, D)` and changed in place, `cos` and `sin` are `(T, D / 2)`, `slots` `(T,)` and `kv` the
    pool `(layers, 2, num_slots, Hkv, D)`.
    """
    num_kv_heads, half = kv.shape[3], kv.shape[4] // 2
    for row in prange(qkv.shape[0]):
        for head in range(num_heads + num_kv_heads):
            for at in range(half):
                low, high = qkv[row, head, at], qkv[row, head, at + half]
                qkv[row, head, at] = low * cos[row, at] - high * sin[row, at]
                qkv[row, head, at + half] = high * cos[row, at] + low * sin[row, at]
        for head in range(num_kv_heads):
            for at in range(2 * half):
                kv[layer, 0, slots[row], head, at] = qkv[row, num_heads + head, at]
                kv[layer, 1, slots[row], head, at] = qkv[row, num_heads + num_kv_heads + head, at]


@_compiled()
def _attend_piece(
    keys: Floats, values: Floats, query: Floats, first: int, num_slots: int, total: Floats, top: Floats, weight: Floats
) -> None:
    """Sums over consecutive slots, for each head.

    `weight` `(H,)` is that of the scores' exponentials, less their `top` `(H,)`, `total` `(H, D)` that of the values
    times these.
    """
    scores = np.empty((query.shape[0], _KEYS_AT_ONCE), np.float32)
    total[:] = 0
    top[:] = _LEAST
    weight[:] = 0
    for start in range(first, first + num_slots, _KEYS_AT_ONCE):
        count = min(_KEYS_AT_ONCE, first + num_slots - start)
        _take_scores(keys[start : start + count], query, scores)
        for head in range(query.shape[0]):
            _take_weights(scores[head, :count], total[head], top[head : head + 1], weight[head : head + 1])
        _add_values(values[start : start + count], scores, total)


@_compiled()
def _take_scores(keys: Floats, query: Floats, scores: Floats) -> None:
    num_heads, head_dim = query.shape
    groups = num_heads // keys.shape[1]
    for at in range(keys.shape[0]):
        key = keys[at]
        for head in range(num_heads):
            score = np.float32(0)
            for i in range(head_dim):
                score += query[head, i] * key[head // groups, i]
            scores[head, at] = score


@_compiled()
def _take_weights(scores: Floats, total: Floats, top: Floats, weight: Floats) -> None:
    """Turn scores of one head into weights, and let what there is of it fade if they are higher."""
    highest = top[0]
    for at in range(scores.shape[0]):
        highest = max(highest, scores[at])
    fading = exp(top[0] - highest)
    for i in range(total.shape[0]):
        total[i] *= fading
    sum_of_weights = np.float32(0)
    for at in range(scores.shape[0]):
        scores[at] = exp(scores[at] - highest)
        sum_of_weights += scores[at]
    top[0] = highest
    weight[0] = weight[0] * fading + sum_of_weights


@_compiled()
def _add_values(values: Floats, weights: Floats, total: Floats) -> None:
    num_heads, head_dim = total.shape
    num_kv_heads = values.shape[1]
    groups = num_heads // num_kv_heads
    for at in range(values.shape[0]):
        value = values[at]
        for kv_head in range(num_kv_heads):
            for head in range(kv_head * groups, (kv_head + 1) * groups):
                share = weights[head, at]
                for i in range(head_dim):
                    total[head, i] += share * value[kv_head, i]


@_compiled(parallel=True)
def attend_tokens(query: Floats, pieces: Ints, kv: Floats, layer: int, scale: float, out: Floats) -> None:
    """Attention of single tokens, each over the slots of its pieces: flash-decoding without copies or masks.

    `query` and `out` are `(B, H, D)`, `pieces` `(P, 3)` as in a `DecodePlan`, none of them empty, `kv` is the pool.
    """
    keys, values = kv[layer, 0], kv[layer, 1]
    num_tokens, num_heads, head_dim = query.shape
    num_pieces = pieces.shape[0]
    totals = np.empty((num_pieces, num_heads, head_dim), np.float32)
    tops = np.empty((num_pieces, num_heads), np.float32)
    weights = np.empty((num_pieces, num_heads), np.float32)
    for piece in prange(num_pieces):
        scaled = query[pieces[piece, 0]] * np.float32(scale)
        _attend_piece(
            keys, values, scaled, pieces[piece, 1], pieces[piece, 2], totals[piece], tops[piece], weights[piece]
        )
    end = 0
    for token in range(num_tokens):
        begin = end
        while end < num_pieces and pieces[end, 0] == token:
            end += 1
        for head in range(num_heads):
            highest = _LEAST
            for piece in range(begin, end):
                highest = max(highest, tops[piece, head])
            sum_of_weights = np.float32(0)
            for piece in range(begin, end):
                tops[piece, head] = exp(tops[piece, head] - highest)  # from here on what the piece's sums count
                sum_of_weights += weights[piece, head] * tops[piece, head]
            for i in range(head_dim):
                attended = np.float32(0)
                for piece in range(begin, end):
                    attended += totals[piece, head, i] * tops[piece, head]
                out[token, head, i] = attended / sum_of_weights


def _add_products(panel: Panels, x: Floats, total: Floats) -> None:
    """Add the products of one panel to `total` `(n, LANES)`. What follows is compiled in its place."""
    raise NotImplementedError


def _add_products_of_floats(panel: Panels, x: Floats, total: Floats) -> None:
    for at in range(x.shape[1]):
        for row in range(x.shape[0]):
            factor = x[row, at]
            for lane in range(LANES):
                total[row, lane] += panel[at, lane] * factor


def _add_products_of_bf16(panel: Panels, x: Floats, total: Floats) -> None:
    for pair in range(panel.shape[0]):
        for row in range(x.shape[0]):
            even, odd = x[row, 2 * pair], x[row, 2 * pair + 1]
            for lane in range(LANES):
                # A bf16 is the upper half of the float32 that it stands for.
                both = panel[pair, lane]
                total[row, lane] += (
                    _as_float(np.int32(both << np.int32(16))) * even + _as_float(both & np.int32(-65536)) * odd
                )


@_overload(_add_products, jit_options={"fastmath": True, "error_model": "numpy"})  # type: ignore[untyped-decorator]
def _choose_products(panel: Panels, x: Floats, total: Floats) -> Callable[..., None]:
    # Called with the types of such arguments; numba wants the annotations of what it returns.
    return _add_products_of_floats if panel.dtype == types.float32 else _add_products_of_bf16


@_compiled(parallel=True)
def multiply_few(panels: Panels, x: Floats, out: Floats) -> None:
    """`x` `(n, in)` times weights, into `out` `(n, out)`.

    `panels` are the weights `(out / LANES, in, LANES)`, the last panel filled up. Or int32 `(out / LANES, in / 2,
    LANES)`, each of two weights in bf16 that follow each other, the first in the lower half.
    """
    num_rows, num_out = out.shape
    for panel in prange(panels.shape[0]):
        total = np.zeros((num_rows, LANES), np.float32)
        _add_products(panels[panel], x, total)
        first = panel * LANES
        for row in range(num_rows):
            for lane in range(min(LANES, num_out - first)):
                out[row, first + lane] = total[row, lane]


@_compiled(parallel=True)
def take_rows(panels: Panels, indices: Ints, out: Floats) -> None:
    """Some of the weights' rows, into `out` `(n, in)`; `panels` as in `multiply_few`."""
    for row in prange(out.shape[0]):
        panel, lane = indices[row] // LANES, indices[row] % LANES
        for at in range(out.shape[1]):
            out[row, at] = panels[panel, at, lane]


@_compiled(parallel=True)
def norm(x: Floats, weight: Floats, eps: float, out: Floats) -> None:
    """`x * weight / sqrt(mean(x^2) + eps)` of each row (RMSNorm, arXiv 1910.07467); `x` and `out` are `(n, size)`."""
    num_rows, size = x.shape
    for row in prange(num_rows):
        total = np.float32(0)
        for at in range(size):
            total += x[row, at] * x[row, at]
        factor = np.float32(1 / math.sqrt(total / size + eps))
        for at in range(size):
            out[row, at] = x[row, at] * factor * weight[at]


@_compiled(parallel=True)
def gate(gate_up: Floats, out: Floats) -> None:
    """SiLU of the first half of each row times the second: `gate_up` is `(n, 2 size)`, `out` `(n, size)`."""
    num_rows, size = out.shape
    for row in prange(num_rows):
        for at in range(size):
            x = gate_up[row, at]
            out[row, at] = x / (np.float32(1) + exp(-x)) * gate_up[row, size + at]


@_compiled()
def _project(panels: Panels, bias: Floats, x: Floats, size_out: int) -> Floats:
    """`x` times weights, plus their bias unless that is empty."""
    out = np.empty((x.shape[0], size_out), np.float32)
    multiply_few(panels, x, out)
    if bias.shape[0]:
        out += bias
    return out


@_compiled()
def _normed(x: Floats, weight: Floats, eps: float) -> Floats:
    out = np.empty_like(x)
    norm(x, weight, eps, out)
    return out


@_compiled()
def decode_layer(
    hidden: Floats,
    attention_norm: Floats,
    attention_eps: float,
    qkv: Panels,
    qkv_bias: Floats,
    out: Panels,
    out_bias: Floats,
    mlp_norm: Floats,
    mlp_eps: float,
    gate_up: Panels,
    gate_up_bias: Floats,
    down: Panels,
    down_bias: Floats,
    num_inner: int,
    scale: float,
    num_heads: int,
    cos: Floats,
    sin: Floats,
    slots: Ints,
    pieces: Ints,
    kv: Floats,
    layer: int,
) -> None:
    """One layer of a decoder for `hidden` `(B, size)`, in place.

    Its weights are panels (see `multiply_few`), its biases empty where there are none, `num_inner` is the size between
    `gate_up` and `down`; the rest is as in `store_rotated` and `attend_tokens`.
    """
    num_tokens, size = hidden.shape
    num_kv_heads, head_dim = kv.shape[3], kv.shape[4]
    num_all = num_heads + 2 * num_kv_heads
    projected = _project(qkv, qkv_bias, _normed(hidden, attention_norm, attention_eps), num_all * head_dim)
    heads = projected.reshape(num_tokens, num_all, head_dim)
    store_rotated(heads, num_heads, cos, sin, slots, kv, layer)
    attended = np.empty((num_tokens, num_heads, head_dim), np.float32)
    attend_tokens(np.ascontiguousarray(heads[:, :num_heads]), pieces, kv, layer, scale, attended)
    hidden += _project(out, out_bias, attended.reshape(num_tokens, num_heads * head_dim), size)
    both = _project(gate_up, gate_up_bias, _normed(hidden, mlp_norm, mlp_eps), 2 * num_inner)
    gated = np.empty((num_tokens, num_inner), np.float32)
    gate(both, gated)
    hidden += _project(down, down_bias, gated, size)
