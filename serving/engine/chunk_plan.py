"""Which slots the chunks of a step attend to, where the kernels compute that.

Planned once per step, used by every layer. Elsewhere torch attends for `Segment`s (see `step_batch`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from serving.engine import kernels
from serving.engine.decode_plan import SlotRun


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one sequence."""

    start: int
    """Its first packed token."""
    length: int
    position: int
    """Position of the first token in its sequence."""
    runs: tuple[SlotRun, ...]
    """Slots of all the sequence's tokens up to the chunk's last, in order."""


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """What `kernels.attend_chunks` reads."""

    chunks: kernels.Ints
    """`(C, 5)`: first packed token, number of tokens, position of the first; where its runs begin and end."""
    runs: kernels.Ints
    """`(R, 2)`: first slot and number of slots."""


def plan_chunks(chunks: Sequence[Chunk]) -> ChunkPlan:
    """Plan for at least one chunk."""
    ends = np.cumsum([len(chunk.runs) for chunk in chunks]).tolist()
    rows = [
        (chunk.start, chunk.length, chunk.position, end - len(chunk.runs), end)
        for chunk, end in zip(chunks, ends, strict=True)
    ]
    runs = [(first, last - first) for chunk in chunks for first, last in chunk.runs]
    return ChunkPlan(np.asarray(rows, np.int64), np.asarray(runs, np.int64))
