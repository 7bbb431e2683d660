"""How to attend for single tokens, many at once, though each sees keys of its own, of its own length.

    float32 on a CPU    runs of A [ piece ][ piece ][ rest ]     read where they lie, see `kernels.attend_tokens`
                        runs of B [ piece ][ rest ]
    elsewhere           slots of A, slots of B + filling         gathered and masked, one call for all

Planned once per step, used by every layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from serving.engine import kernels

SlotRun = tuple[int, int]
"""Consecutive slots `[first, last)` of the pool."""

MAX_PIECE_SLOTS = 256
"""Threads share the pieces, so a long sequence is cut; each piece costs a merge."""


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """`B` single tokens, in the order in which they are packed. Either `pieces` or `slots` and `mask` are there."""

    rows: torch.Tensor | None
    """`(B,)` int64, the packed tokens; None if they are all that the step has."""
    pieces: npt.NDArray[np.int64] | None = None
    """`(P, 3)`: whose, first slot, number of slots; those of a token follow each other."""
    slots: torch.Tensor | None = None
    """`(B, L)` int64, every slot of each token, filled up with its last."""
    mask: torch.Tensor | None = None
    """`(B, 1, 1, L)`, 0 or, for filling, minus infinity, in the dtype of the queries."""


def plan_decode(
    rows: Sequence[int], runs: Sequence[Sequence[SlotRun]], num_tokens: int, kv: torch.Tensor
) -> DecodePlan:
    """Plan for the packed tokens `rows` of `num_tokens`, each attending to all slots of its `runs` of the pool `kv`.

    No run may be empty, and no token without one.
    """
    chosen = None if len(rows) == num_tokens else torch.tensor(rows, dtype=torch.int64, device=kv.device)
    if kernels.can_attend(kv):
        return DecodePlan(chosen, pieces=_pieces(runs))
    slots, mask = _filled([np.concatenate([np.arange(*run, dtype=np.int64) for run in own]) for own in runs])
    return DecodePlan(
        chosen,
        slots=torch.from_numpy(slots).to(kv.device),
        mask=torch.from_numpy(mask).to(kv.device, kv.dtype)[:, None, None, :],
    )


def _pieces(runs: Sequence[Sequence[SlotRun]]) -> npt.NDArray[np.int64]:
    pieces = [
        (sequence, at, min(MAX_PIECE_SLOTS, last - at))
        for sequence, own in enumerate(runs)
        for first, last in own
        for at in range(first, last, MAX_PIECE_SLOTS)
    ]
    return np.asarray(pieces, dtype=np.int64)


def _filled(rows: Sequence[npt.NDArray[np.int64]]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """The rows as one matrix, filled up with their last values, and a mask that hides the filling."""
    width = max(map(len, rows))
    matrix = np.stack([np.pad(row, (0, width - len(row)), mode="edge") for row in rows])
    lengths = np.asarray([len(row) for row in rows])
    is_filling = np.arange(width) >= lengths[:, None]
    return matrix, np.where(is_filling, np.float32("-inf"), np.float32(0))
