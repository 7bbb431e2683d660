"""One forward pass over tokens of several sequences, packed one after the other without padding.

    parts      A: 3 tokens at position 40      B: 1 token at 7           C: 2 tokens at 0
    packed     a40 a41 a42                     b7                        c0 c1
    kernels    chunk (0, 3, runs of A[0:43])   single (3, runs of B[0:8])    chunk (4, 2, runs of C[0:2])
    torch      segment (0, 3, runs of A[0:40])                               segment (4, 2, no runs)

A step batch is only a description: it holds the tensors that the forward pass needs and never changes a block.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from serving.engine import kernels
from serving.engine.chunk_plan import Chunk, ChunkPlan, plan_chunks
from serving.engine.decode_plan import DecodePlan, SlotRun, plan_decode
from serving.engine.flash import FlashPlan, Mode, Span, plan_flash
from serving.engine.kv_pool import KVPool

MAX_VIEWED_RUNS = 8
"""A segment's sequence in more runs than this is gathered instead: each run costs a call and a merge per layer."""


@dataclass(frozen=True, slots=True)
class SequencePart:
    """Tokens of one sequence to be computed in a step."""

    token_ids: Sequence[int] | npt.NDArray[np.int32]
    position: int
    """Position of the first of them; the KV of all tokens before it is in the pool."""
    block_table: Sequence[int]
    """Block ids of the sequence, enough for `position + len(token_ids)` tokens."""
    wants_logits: bool = True
    """Whether the logits after the last of the tokens are wanted."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A chunk's place in the packed batch, and what it attends to besides itself, where torch computes that."""

    start: int
    length: int
    runs: tuple[SlotRun, ...]
    """Slots of the tokens before the chunk: attended to without a mask."""
    gathered: torch.Tensor | None = None
    """The slots of `runs` one by one, int64, if they are too many to be viewed."""


@dataclass(frozen=True, slots=True)
class StepBatch:
    """`T` packed tokens and where their KV goes."""

    input_ids: torch.Tensor
    """`(T,)` int64."""
    position_ids: torch.Tensor
    """`(T,)` int64."""
    slots: torch.Tensor
    """`(T,)` int64, the slot that takes each token's KV."""
    chunk_plan: ChunkPlan | None
    """Chunks of two tokens or more, where the kernels attend for them."""
    segments: tuple[Segment, ...]
    """The same elsewhere."""
    flash_plan: FlashPlan | None
    """All parts, chunks and single tokens, where FlashAttention attends for them; then there is nothing of the rest."""
    decode_plan: DecodePlan | None
    """All the rest: single tokens."""
    kv: torch.Tensor
    """The pool's tensor."""
    logits_indices: torch.Tensor
    """`(num_logits,)` int64, the packed tokens whose logits are wanted, in the order of the parts."""

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]


def slot_runs(block_table: Sequence[int], block_size: int, num_tokens: int) -> tuple[SlotRun, ...]:
    """The slots of a sequence's first `num_tokens` tokens, as the fewest runs in the order of the tokens."""
    if num_tokens == 0:
        return ()
    num_blocks = -(-num_tokens // block_size)
    table = np.asarray(block_table[:num_blocks], dtype=np.int64)
    if len(table) < num_blocks:
        raise ValueError(f"{num_tokens} tokens need {num_blocks} blocks of {block_size}, the table has {len(table)}")
    starts = np.concatenate([[0], np.flatnonzero(np.diff(table) != 1) + 1])
    ends = np.append(starts[1:], num_blocks)
    firsts = table[starts] * block_size
    lasts = firsts + (ends - starts) * block_size
    lasts[-1] -= num_blocks * block_size - num_tokens
    return tuple(zip(firsts.tolist(), lasts.tolist(), strict=True))


def build_step_batch(pool: KVPool, parts: Sequence[SequencePart], flash: Mode | None = None) -> StepBatch:
    """Pack `parts` for one forward pass. ValueError for a part without tokens or with too short a block table.

    `flash` is what `flash.choose_mode` has found.
    """
    device = pool.device
    block_size = pool.layout.block_size
    is_native = kernels.can_attend(pool.kv)
    chunks: list[Chunk] = []
    segments: list[Segment] = []
    spans: list[Span] = []
    singles: dict[int, tuple[SlotRun, ...]] = {}
    positions: list[npt.NDArray[np.int64]] = []
    slots: list[npt.NDArray[np.int64]] = []
    logits_indices: list[int] = []
    start = 0
    for part in parts:
        length = len(part.token_ids)
        if length == 0:
            raise ValueError(f"a part at position {part.position} has no tokens")
        if flash is not None:
            spans.append(Span(length, part.position + length, part.block_table))
        elif length == 1:
            singles[start] = slot_runs(part.block_table, block_size, part.position + 1)
        elif is_native:
            runs = slot_runs(part.block_table, block_size, part.position + length)
            chunks.append(Chunk(start, length, part.position, runs))
        else:
            segments.append(_segment(part, start, block_size, device))
        position = np.arange(part.position, part.position + length, dtype=np.int64)
        positions.append(position)
        slots.append(_slots(part.block_table, position, block_size))
        start += length
        if part.wants_logits:
            logits_indices.append(start - 1)
    token_ids = [np.asarray(part.token_ids, dtype=np.int64) for part in parts]
    return StepBatch(
        input_ids=_to_device(token_ids, device),
        position_ids=_to_device(positions, device),
        slots=_to_device(slots, device),
        chunk_plan=plan_chunks(chunks) if chunks else None,
        segments=tuple(segments),
        flash_plan=plan_flash(spans, block_size, flash, device) if flash is not None else None,
        decode_plan=plan_decode(list(singles), list(singles.values()), start, pool.kv) if singles else None,
        kv=pool.kv,
        logits_indices=torch.tensor(logits_indices, dtype=torch.int64, device=device),
    )


def _segment(part: SequencePart, start: int, block_size: int, device: torch.device) -> Segment:
    length = len(part.token_ids)
    runs = slot_runs(part.block_table, block_size, part.position)
    if len(runs) <= MAX_VIEWED_RUNS:
        return Segment(start, length, runs)
    gathered = _to_device([np.arange(first, last, dtype=np.int64) for first, last in runs], device)
    return Segment(start, length, runs, gathered)


def _slots(block_table: Sequence[int], positions: npt.NDArray[np.int64], block_size: int) -> npt.NDArray[np.int64]:
    last = int(positions[-1])
    if last // block_size >= len(block_table):
        raise ValueError(f"position {last} needs {last // block_size + 1} blocks, the table has {len(block_table)}")
    first_block = int(positions[0]) // block_size
    table = np.asarray(block_table[first_block : last // block_size + 1], dtype=np.int64)
    return table[positions // block_size - first_block] * block_size + positions % block_size


def _to_device(pieces: Sequence[npt.NDArray[np.int64]], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(pieces)).to(device)
