"""Chunks of prompts over the paged pool, their own keys among them: flash attention, turned on its side.

    queries        64 rows at a time, (token, head of the group) pairs that share a KV head, as columns: (D, 64)
    scores         keys x queries: a key's floats are read one by one where they lie, times the row of all queries
    weights        down the columns: highest score and sum are vectors over queries, nothing is summed across lanes
    values         queries x D: weights are read one by one, the rows of values where they lie

So keys and values are neither copied nor turned, and the two products keep tiles of their results in registers
(see `tiles`). Running maxima and sums as in "Online normalizer calculation for softmax" (arXiv 1805.02867) and
FlashAttention (arXiv 2205.14135).
"""

import numpy as np
from numba import prange

from serving.engine.kernels.compiling import Floats, Ints, compiled
from serving.engine.kernels.llvm_builder import FLOAT_BYTES, LINE_BYTES
from serving.engine.kernels.tiles import set_products_64
from serving.engine.kernels.token_attention import LEAST, LOG2_E, add_weighted
from serving.engine.kernels.vectors import address, exp2, prefetch_rows

QUERIES = 64
"""Rows of queries taken together."""
_KEYS = 64
"""Keys taken together: scores, queries, sums, keys and values are 16 KB each."""
_TILE_ROWS = 4
"""Rows of a tile: as fast as more, and they divide both sides."""


@compiled(parallel=True)
def attend_chunks(
    query: Floats, chunks: Ints, runs: Ints, kv: Floats, layer: int, scale: float, out: Floats, num_hands: int
) -> None:
    """Causal attention of consecutive tokens, each chunk over the slots of its runs.

    `query` and `out` are `(T, H, D)`, `chunks` and `runs` as in a `ChunkPlan`, `kv` is the pool, which holds the
    chunks' own keys and values already. Rows are the tokens' heads that share a KV head: t0h0 t0h1 t1h0 t1h1 ...
    `num_hands` is the number of threads.
    """
    keys, values = kv[layer, 0], kv[layer, 1]
    items = _items(chunks, query.shape[1] // kv.shape[3], kv.shape[3])
    per_hand = (items.shape[0] + num_hands - 1) // num_hands
    # Threads take consecutive numbers. The later rows of a chunk cost more, so items are dealt like cards.
    for number in prange(num_hands * per_hand):
        at = number % per_hand * num_hands + number // per_hand
        if at < items.shape[0]:
            chunk, first_row, kv_head = items[at]
            _attend_rows(query, chunks[chunk], first_row, kv_head, runs, keys, values, np.float32(scale * LOG2_E), out)


@compiled()
def _items(chunks: Ints, groups: int, num_kv_heads: int) -> Ints:
    """`(I, 3)`: chunk, first row, KV head; each item is up to QUERIES rows, the last ones of a chunk first."""
    num_items = 0
    for chunk in range(chunks.shape[0]):
        num_items += (chunks[chunk, 1] * groups + QUERIES - 1) // QUERIES * num_kv_heads
    items = np.empty((num_items, 3), np.int64)
    at = 0
    for chunk in range(chunks.shape[0]):
        for block in range((chunks[chunk, 1] * groups - 1) // QUERIES, -1, -1):
            for head in range(num_kv_heads):
                items[at, 0], items[at, 1], items[at, 2] = chunk, block * QUERIES, head
                at += 1
    return items


@compiled()
def _attend_rows(
    query: Floats,
    chunk: Ints,
    first_row: int,
    kv_head: int,
    runs: Ints,
    keys: Floats,
    values: Floats,
    scale: np.float32,
    out: Floats,
) -> None:
    """One KV head's share of up to QUERIES rows of a chunk."""
    first_token, num_tokens, position, first_run, last_run = chunk
    head_dim = query.shape[2]
    groups = query.shape[1] // keys.shape[1]
    num_rows = min(QUERIES, num_tokens * groups - first_row)
    turned = np.empty((head_dim, QUERIES), np.float32)
    _turn(query, first_token, first_row, num_rows, kv_head * groups, groups, scale, turned)
    total = np.zeros((QUERIES, head_dim), np.float32)
    scores = np.empty((_KEYS, QUERIES), np.float32)
    top, weight, fading = (
        np.full(QUERIES, LEAST, np.float32),
        np.zeros(QUERIES, np.float32),
        np.empty(QUERIES, np.float32),
    )
    sees = np.empty(QUERIES, np.int64)  # how many keys each of the rows may attend to
    for row in range(QUERIES):
        sees[row] = position + (first_row + min(row, num_rows - 1)) // groups + 1
    num_seen = 0
    for run in range(first_run, last_run):
        first_slot = runs[run, 0]
        num_slots = min(runs[run, 1], sees[QUERIES - 1] - num_seen)
        for at in range(0, num_slots, _KEYS):
            count = min(_KEYS, num_slots - at)
            _score(keys, first_slot + at, count, kv_head, turned, scores)
            if num_seen + count > sees[0]:
                _hide(scores, count, num_seen, sees)
            _weigh(scores, count, top, weight, fading)
            _add_values(values, first_slot + at, count, kv_head, scores, fading, total)
            num_seen += count
    for row in range(num_rows):
        token, head = (first_row + row) // groups, kv_head * groups + (first_row + row) % groups
        share = np.float32(1) / weight[row]
        for at in range(head_dim):
            out[first_token + token, head, at] = total[row, at] * share


@compiled()
def _turn(
    query: Floats,
    first_token: int,
    first_row: int,
    num_rows: int,
    first_head: int,
    groups: int,
    scale: np.float32,
    turned: Floats,
) -> None:
    """Queries as columns, scaled; what is left over repeats the last one."""
    for column in range(QUERIES):
        row = first_row + min(column, num_rows - 1)
        for at in range(turned.shape[0]):
            turned[at, column] = query[first_token + row // groups, first_head + row % groups, at] * scale


@compiled()
def _score(keys: Floats, first_slot: int, count: int, kv_head: int, turned: Floats, scores: Floats) -> None:
    head_dim = turned.shape[0]
    stride = keys.shape[1] * head_dim
    key = address(keys) + (first_slot * stride + kv_head * head_dim) * FLOAT_BYTES
    for at in range(0, count, _TILE_ROWS):
        prefetch_rows(
            key + (at + _KEYS) * stride * FLOAT_BYTES, stride, _TILE_ROWS, head_dim * FLOAT_BYTES // LINE_BYTES
        )
        set_products_64(
            min(_TILE_ROWS, count - at),
            key + at * stride * FLOAT_BYTES,
            stride,
            1,
            address(turned),
            QUERIES,
            address(scores) + at * QUERIES * FLOAT_BYTES,
            QUERIES,
            head_dim,
        )


@compiled()
def _hide(scores: Floats, count: int, num_before: int, sees: Ints) -> None:
    """Keys that come after a query's token."""
    for at in range(count):
        for column in range(QUERIES):
            if num_before + at >= sees[column]:
                scores[at, column] = LEAST


@compiled()
def _weigh(scores: Floats, count: int, top: Floats, weight: Floats, fading: Floats) -> None:
    """Turn scores into weights; `fading` is what everything before counts from here on."""
    for column in range(QUERIES):
        fading[column] = top[column]
    for at in range(count):
        for column in range(QUERIES):
            top[column] = max(top[column], scores[at, column])
    for column in range(QUERIES):
        fading[column] = exp2(fading[column] - top[column])
        weight[column] *= fading[column]
    for at in range(count):
        for column in range(QUERIES):
            share = exp2(scores[at, column] - top[column])
            scores[at, column] = share
            weight[column] += share


@compiled()
def _add_values(
    values: Floats, first_slot: int, count: int, kv_head: int, weights: Floats, fading: Floats, total: Floats
) -> None:
    head_dim = total.shape[1]
    for row in range(QUERIES):
        for at in range(head_dim):
            total[row, at] *= fading[row]
    stride = values.shape[1] * head_dim
    value = address(values) + (first_slot * stride + kv_head * head_dim) * FLOAT_BYTES
    for row in range(0, QUERIES, _TILE_ROWS):
        prefetch_rows(
            value + (row + _KEYS) * stride * FLOAT_BYTES, stride, _TILE_ROWS, head_dim * FLOAT_BYTES // LINE_BYTES
        )
        add_weighted(
            _TILE_ROWS,
            address(weights) + row * FLOAT_BYTES,
            1,
            QUERIES,
            value,
            stride,
            address(total) + row * head_dim * FLOAT_BYTES,
            head_dim,
            count,
        )
