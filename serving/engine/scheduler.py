"""Decides which sequences get blocks and which tokens are computed in the next step.

Sequences are admitted in the order of arrival, as soon as the pool can hold their prompt. A step computes one
token of every sequence that decodes and fills the rest of its token budget with chunks of prompts, oldest
first, those of a loading one as far as computing helps its load. When a decoding sequence needs a block and none is
left, the youngest sequence is preempted: its blocks are offloaded to the warehouse where there is one, then given
back; it waits at the front, and is admitted again from what the pool and the warehouse have of it.

Never touches the model, a tensor or a clock. Belongs to the step loop.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from serving.engine.block_pool import BlockPool, PoolMatch
from serving.engine.sequence import Sequence, Status


@dataclass(frozen=True, slots=True)
class ScheduledPart:
    """Tokens of one sequence to compute in a step."""

    sequence: Sequence
    num_tokens: int


class Scheduler:
    """See the module's docstring."""

    def __init__(self, pool: BlockPool, max_running: int, step_tokens: int) -> None:
        self.pool = pool
        self.offload: Callable[[Sequence], bool] = lambda sequence: False
        """Begins to store a preempted sequence's blocks and calls `requeue` at the end; False if it can't."""
        self.loading_share: Callable[[Sequence, int], int] = lambda sequence, budget: 0
        """How many tokens of a loading sequence, up to `budget`, are better computed in this step than waited for."""
        self.num_preemptions = 0
        self._max_running = max_running
        self._step_tokens = step_tokens
        self.waiting: deque[Sequence] = deque()
        self.admitted: list[Sequence] = []
        """Sequences with blocks, loading or running, in the order of arrival."""

    def __repr__(self) -> str:
        return f"<Scheduler {len(self.waiting)} waiting, {len(self.admitted)} admitted, {self.pool!r}>"

    @property
    def num_queued_prefill_tokens(self) -> int:
        """Prompt tokens still to be computed or loaded."""
        admitted = sum(s.num_uncomputed for s in self.admitted if s.num_uncomputed > 1)
        return admitted + sum(s.num_tokens for s in self.waiting)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def admit(self) -> tuple[Sequence, PoolMatch] | None:
        """Give the first waiting sequence its blocks; None if there is none or no room.

        The match's full blocks are already shared and in the block table; the caller copies the partial one.
        """
        if not self.waiting or len(self.admitted) >= self._max_running:
            return None
        sequence = self.waiting[0]
        match = self._match(sequence)
        fresh = self._take(sequence, match)
        if fresh is None and match.partial_block_id is not None:
            # The block to be copied may be the very one that is missing.
            match = PoolMatch(match.block_ids)
            fresh = self._take(sequence, match)
        if fresh is None:
            return None
        self.waiting.popleft()
        sequence.block_table = [*match.block_ids, *fresh]
        sequence.num_registered_blocks = len(match.block_ids)
        sequence.num_computed = len(match.block_ids) * self.pool.block_size + match.partial_tokens
        self.admitted.append(sequence)
        return sequence, match

    def _match(self, sequence: Sequence) -> PoolMatch:
        if not sequence.uses_pool:
            return PoolMatch()
        return self.pool.match(sequence.request.root_hash, sequence.reusable_hashes, sequence.reusable_tokens)

    def _take(self, sequence: Sequence, match: PoolMatch) -> list[int] | None:
        """Share what was matched and allocate the rest; None, and nothing taken, if there are too few blocks."""
        # Pinned before the allocation, which might otherwise evict what was just found.
        partial = [] if match.partial_block_id is None else [match.partial_block_id]
        self.pool.share(match.block_ids)
        self.pool.share(partial)
        fresh = self._allocate_for(sequence, match)
        self.pool.release(partial)
        if fresh is None:
            self.pool.release(match.block_ids)
        return fresh

    def _allocate_for(self, sequence: Sequence, match: PoolMatch) -> list[int] | None:
        num_blocks = -(-sequence.num_tokens // self.pool.block_size) - len(match.block_ids)
        sampling = sequence.request.sampling
        room = -(-sampling.max_tokens // self.pool.block_size) if sampling else 0
        after = match.block_ids[-1] if match.block_ids else None
        return self.pool.allocate(num_blocks, after, room)

    def plan_step(self) -> list[ScheduledPart]:
        """What to compute next. May preempt; preempted sequences are back in `waiting`."""
        parts = self._plan_decodes()
        budget = self._step_tokens - len(parts)
        for sequence in self.admitted:
            if budget <= 0:
                break
            if num_tokens := self._chunk(sequence, budget):
                parts.append(ScheduledPart(sequence, num_tokens))
                budget -= num_tokens
        return parts

    def _chunk(self, sequence: Sequence, budget: int) -> int:
        if sequence.status is Status.LOADING:
            return self.loading_share(sequence, budget)
        if sequence.status is Status.RUNNING and sequence.num_uncomputed > 1:
            # A first token that was sampled early may have no block yet: it is computed as any single one.
            room = len(sequence.block_table) * self.pool.block_size - sequence.num_computed
            return min(budget, sequence.num_uncomputed, room)
        return 0

    def _plan_decodes(self) -> list[ScheduledPart]:
        parts: list[ScheduledPart] = []
        for sequence in list(self.admitted):
            if sequence.status is not Status.RUNNING or sequence.num_uncomputed != 1:
                continue
            if self._grow(sequence):
                parts.append(ScheduledPart(sequence, 1))
        # A later sequence's need may have preempted one that was planned already.
        return [part for part in parts if part.sequence.status is Status.RUNNING]

    def _grow(self, sequence: Sequence) -> bool:
        """Make sure that the next token has a slot; False if the sequence must wait for one, or had to go itself."""
        while len(sequence.block_table) * self.pool.block_size <= sequence.num_computed:
            block_ids = self.pool.allocate(1, sequence.block_table[-1])
            if block_ids is not None:
                sequence.block_table += block_ids
                continue
            if any(s.status is Status.OFFLOADING for s in self.admitted):
                return False
            # Blocks that a loader thread still reads can't be taken away.
            victim = next(s for s in reversed(self.admitted) if s.status is Status.RUNNING and s.is_idle)
            self.preempt(victim)
            if victim is sequence:
                return False
        return True

    def preempt(self, sequence: Sequence) -> None:
        """Take a sequence's blocks away, at once or when they are stored."""
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        sequence.status = Status.OFFLOADING
        if not self.offload(sequence):
            self.requeue(sequence)

    def requeue(self, sequence: Sequence) -> None:
        """Give a preempted sequence's blocks back and let it wait at the front."""
        self.admitted.remove(sequence)
        self.pool.release(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed = sequence.num_registered_blocks = 0
        sequence.status = Status.WAITING
        self.waiting.appendleft(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence. Its blocks stay referenced: whoever removes it releases them."""
        if sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        else:
            self.admitted.remove(sequence)
        sequence.status = Status.FINISHED

    def check_integrity(self) -> None:
        """Raise AssertionError if the pool's books are off or a block is in one table twice."""
        self.pool.check_integrity()
        for sequence in self.admitted:
            assert len(set(sequence.block_table)) == len(sequence.block_table)
            assert len(sequence.block_table) * self.pool.block_size >= sequence.num_computed
        assert not any(sequence.block_table for sequence in self.waiting)
