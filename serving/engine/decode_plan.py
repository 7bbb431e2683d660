"""How to attend for many single tokens at once, though each sees keys of its own, of its own length.

    runs of A   [ body, a multiple of 64 slots      ][ tail ]      pieces of bodies go in pairs of equal length:
    runs of B   [ body           ][ tail ]                         (A 0:n, B 0:n), then what is left of A
    tails                                                          gathered and padded, one call for all

Two equal pieces at any two places of the pool are one strided view, so a pair takes one call and no copy, and its
heads divide evenly among two threads. What is left over at last is cut into two halves. The softmax of each
sequence is merged from its pieces and its tail. Planned once per step, used by every layer.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

SlotRun = tuple[int, int]
"""Consecutive slots `[first, last)` of the pool."""

PIECE_UNIT = 64
"""Pieces of runs are multiples of this many slots, so that sequences of about the same length pair up at once."""


@dataclass(frozen=True, slots=True, order=True)
class Piece:
    """Consecutive slots that one sequence attends to."""

    length: int
    first: int
    sequence: int
    """Place among the plan's sequences."""


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """`B` single tokens; a partial result is numbered: the tails `0..B-1`, then the pieces, pair after pair."""

    rows: torch.Tensor
    """`(B,)` int64, the packed tokens."""
    pairs: tuple[tuple[Piece, Piece], ...]
    """Equally long, the one at the lower slot first."""
    piece_sequences: torch.Tensor
    """`(2 * pairs,)` int64, the sequence of each piece."""
    tail_slots: torch.Tensor
    """`(B, L)` int64, the slots that are in no piece; the token's own is among them. Filled up with any of these."""
    tail_mask: torch.Tensor
    """`(B, 1, 1, L)`, 0 or, for filling, minus infinity, in the dtype of the queries."""
    partials: torch.Tensor
    """`(B, P)` int64, the partial results of each sequence, filled up with its tail."""
    partials_mask: torch.Tensor
    """`(B, P, 1, 1)` float32, 0 or, for filling, minus infinity."""


def plan_decode(
    rows: Sequence[int], runs: Sequence[Sequence[SlotRun]], dtype: torch.dtype, device: torch.device
) -> DecodePlan:
    """Plan for the packed tokens `rows`, each attending to all slots of its `runs`; none of them may be empty."""
    pieces: list[Piece] = []
    tails: list[npt.NDArray[np.int64]] = []
    for sequence, own_runs in enumerate(runs):
        own_pieces, tail = _cut(own_runs, sequence)
        pieces += own_pieces
        tails.append(tail)
    pairs = pair_up(pieces)
    tail_slots, tail_mask = _filled(tails)
    numbers = [[sequence] for sequence in range(len(rows))]
    for at, piece in enumerate(piece for pair in pairs for piece in pair):
        numbers[piece.sequence].append(len(rows) + at)
    partials, partials_mask = _filled([np.asarray(own[::-1], dtype=np.int64) for own in numbers])
    return DecodePlan(
        rows=torch.tensor(rows, dtype=torch.int64, device=device),
        pairs=tuple(pairs),
        piece_sequences=torch.tensor([p.sequence for pair in pairs for p in pair], dtype=torch.int64, device=device),
        tail_slots=torch.from_numpy(tail_slots).to(device),
        tail_mask=torch.from_numpy(tail_mask).to(device, dtype)[:, None, None, :],
        partials=torch.from_numpy(partials).to(device),
        partials_mask=torch.from_numpy(partials_mask).to(device)[:, :, None, None],
    )


def pair_up(pieces: Sequence[Piece]) -> list[tuple[Piece, Piece]]:
    """Cut the pieces, of even lengths, into pairs of equal length; long ones first."""
    longest = [(-piece.length, piece) for piece in pieces]
    heapq.heapify(longest)
    pairs: list[tuple[Piece, Piece]] = []
    while longest:
        _, piece = heapq.heappop(longest)
        if longest:
            _, other = heapq.heappop(longest)
            rest = Piece(piece.length - other.length, piece.first + other.length, piece.sequence)
            if rest.length:
                heapq.heappush(longest, (-rest.length, rest))
        else:
            other = Piece(piece.length // 2, piece.first + piece.length // 2, piece.sequence)
        head = Piece(other.length, piece.first, piece.sequence)
        pairs.append((head, other) if head.first < other.first else (other, head))
    return pairs


def _cut(runs: Sequence[SlotRun], sequence: int) -> tuple[list[Piece], npt.NDArray[np.int64]]:
    pieces: list[Piece] = []
    rests: list[npt.NDArray[np.int64]] = []
    for at, (first, last) in enumerate(runs):
        # At least the very last slot stays: a softmax over no key at all is not a number.
        num_slots = last - first - (at == len(runs) - 1)
        length = num_slots // PIECE_UNIT * PIECE_UNIT
        if length:
            pieces.append(Piece(length, first, sequence))
        rests.append(np.arange(first + length, last, dtype=np.int64))
    return pieces, np.concatenate(rests)


def _filled(rows: Sequence[npt.NDArray[np.int64]]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """The rows as one matrix, filled up with their last values, and a mask that hides the filling."""
    width = max(map(len, rows))
    matrix = np.stack([np.pad(row, (0, width - len(row)), mode="edge") for row in rows])
    lengths = np.asarray([len(row) for row in rows])
    is_filling = np.arange(width) >= lengths[:, None]
    return matrix, np.where(is_filling, np.float32("-inf"), np.float32(0))
