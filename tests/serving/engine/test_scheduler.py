"""Who gets blocks and who computes what: without a model, the tests themselves play the step loop."""

import random
from collections import Counter

import pytest

from cache.hashing import BlockHash, as_token_ids, chain_hashes
from serving.engine.block_pool import BlockPool
from serving.engine.scheduler import ScheduledPart, Scheduler
from serving.engine.sequence import EngineRequest, Listener, Sequence, Status
from serving.protocol import SamplingParams

BLOCK_SIZE = 4
ROOT = BlockHash(b"root" * 4)


def sequence_of(tokens: list[int], max_tokens: int = 8, *, name: str = "sequence", use_cache: bool = True) -> Sequence:
    ids = as_token_ids(tokens)
    hashes = tuple(chain_hashes(ROOT, ids, BLOCK_SIZE))
    request = EngineRequest(name, ids, ROOT, hashes, SamplingParams(max_tokens), use_cache=use_cache)
    return Sequence(request, Listener(), BLOCK_SIZE, 0.0)


def fresh(num_tokens: int, start: int, max_tokens: int = 8) -> Sequence:
    """A prompt that shares nothing with one of another `start`."""
    return sequence_of(list(range(start, start + num_tokens)), max_tokens, name=f"from {start}")


class Loop:
    """The step loop without a model: what the engine does around the scheduler, and the same bookkeeping."""

    def __init__(self, num_blocks: int, *, max_running: int = 8, step_tokens: int = 16) -> None:
        self.pool = BlockPool(num_blocks, BLOCK_SIZE)
        self.scheduler = Scheduler(self.pool, max_running, step_tokens)
        self.finished: list[Sequence] = []

    def add(self, *sequences: Sequence) -> None:
        for sequence in sequences:
            self.scheduler.add(sequence)

    def admit(self) -> list[Sequence]:
        admitted = []
        while (admission := self.scheduler.admit()) is not None:
            admission[0].status = Status.RUNNING
            admitted.append(admission[0])
        return admitted

    def step(self) -> list[ScheduledPart]:
        self.admit()
        parts = self.scheduler.plan_step()
        for part in parts:
            self.advance(part)
        self.scheduler.check_integrity()
        return parts

    def advance(self, part: ScheduledPart) -> None:
        sequence = part.sequence
        assert sequence.status is Status.RUNNING
        assert 1 <= part.num_tokens <= sequence.num_uncomputed
        wants_token = part.num_tokens == sequence.num_uncomputed
        sequence.num_computed += part.num_tokens
        assert sequence.num_computed <= len(sequence.block_table) * BLOCK_SIZE, "a token without a slot"
        self.register(sequence)
        if wants_token:
            sequence.append(1_000_000 + sequence.num_tokens)
            assert sequence.request.sampling is not None
            if sequence.num_output_tokens == sequence.request.sampling.max_tokens:
                self.finish(sequence)

    def register(self, sequence: Sequence) -> None:
        if not sequence.request.use_cache:
            return
        for index in range(sequence.num_computed // BLOCK_SIZE):
            self.pool.register(
                sequence.block_table[index],
                sequence.block_hashes[index],
                sequence.parent_hash(index),
                sequence.block_token_ids(index),
                sequence.owner,
            )

    def finish(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        self.pool.release(sequence.block_table)
        sequence.block_table = []
        self.finished.append(sequence)


def test_admission_is_in_order_of_arrival_and_the_first_blocks_those_behind() -> None:
    loop = Loop(8)
    first, large, small = fresh(16, 0), fresh(20, 100), fresh(4, 200)
    loop.add(first, large, small)
    assert loop.admit() == [first]
    assert loop.admit() == [], "the small one would fit and still waits its turn"
    loop.finish(first)
    assert loop.admit() == [large, small]


def test_no_more_are_admitted_than_may_run() -> None:
    loop = Loop(64, max_running=2)
    loop.add(*(fresh(4, 100 * i) for i in range(3)))
    assert len(loop.admit()) == 2


def test_a_chunk_takes_what_the_decodes_leave_of_the_budget() -> None:
    loop = Loop(64, step_tokens=10)
    decoding = [fresh(4, 100 * i, max_tokens=20) for i in range(2)]
    loop.add(*decoding)
    loop.step()
    long, longer = fresh(12, 1000), fresh(12, 2000)
    loop.add(long, longer)
    assert Counter({part.sequence: part.num_tokens for part in loop.step()}) == {
        decoding[0]: 1,
        decoding[1]: 1,
        long: 8,
    }
    shares = {part.sequence: part.num_tokens for part in loop.step()}
    assert shares == {decoding[0]: 1, decoding[1]: 1, long: 4, longer: 4}, "the oldest prompt first, then the next"


def test_more_decodes_than_the_budget_all_get_their_token() -> None:
    loop = Loop(64, step_tokens=3, max_running=8)
    sequences = [fresh(1, 100 * i, max_tokens=20) for i in range(5)]
    loop.add(*sequences)
    loop.step()
    loop.add(prompt := fresh(8, 1000))
    parts = loop.step()
    assert [part.sequence for part in parts] == sequences
    assert prompt.num_computed == 0


def test_the_youngest_is_preempted_and_waits_in_front() -> None:
    loop = Loop(6)
    oldest, middle, youngest = (fresh(7, 100 * i, max_tokens=12) for i in range(3))
    newcomer = fresh(4, 1000)
    loop.add(oldest, middle, youngest, newcomer)
    while not youngest.num_preemptions:
        loop.step()
    assert list(loop.scheduler.waiting) == [youngest, newcomer]
    assert youngest.block_table == []
    assert youngest.num_computed == 0
    assert youngest.num_output_tokens > 0, "what was said stays said"
    assert oldest.num_preemptions == middle.num_preemptions == 0
    while loop.scheduler.waiting[0] is not newcomer:
        loop.step()
    assert youngest in loop.scheduler.admitted or youngest in loop.finished


def test_a_preempted_sequence_finds_again_what_is_still_cached() -> None:
    loop = Loop(8)
    loop.add(sequence := fresh(10, 0))
    loop.step()
    loop.scheduler.preempt(sequence)
    loop.admit()
    assert sequence.num_computed == 8
    assert sequence.num_registered_blocks == 2


def test_a_sequence_that_still_loads_or_is_still_read_is_never_preempted() -> None:
    loop = Loop(4)
    running, loading = fresh(8, 0, max_tokens=12), fresh(8, 100)
    loop.add(running, loading)
    loop.admit()
    loading.status = Status.LOADING
    while running.status is Status.RUNNING:
        parts = loop.scheduler.plan_step()
        for part in parts:
            loop.advance(part)
    assert loading.block_table, "it would be overwritten while a loader thread writes into it"
    assert running.num_preemptions == 1
    assert loop.admit() == []


def test_a_prompt_that_fills_the_pool_is_admitted_beside_the_block_it_could_copy() -> None:
    loop = Loop(4)
    loop.add(sequence_of([1, 2, 3, 4, 5, 6], max_tokens=1))
    while loop.scheduler.admitted or loop.scheduler.waiting:
        loop.step()
    # Begins as a cached block does, and needs all four: the block to be copied can't be kept beside it.
    whole = sequence_of([1, 2, 3, *range(100, 112)], max_tokens=1)
    loop.add(whole)
    loop.step()
    assert whole.num_computed == 15
    assert loop.finished[-1] is whole


def test_a_match_is_pinned_before_the_rest_is_allocated() -> None:
    loop = Loop(4)
    prefix = list(range(8))
    loop.add(sequence_of(prefix, max_tokens=1))
    loop.step()
    loop.add(sequence_of([50, 51, 52, 53], max_tokens=1))
    loop.step()
    # All blocks but one are cached, the wanted ones among the oldest.
    loop.add(follower := sequence_of([*prefix, 8, 9, 10, 11, 12], max_tokens=1))
    loop.admit()
    assert follower.num_computed == 8
    loop.scheduler.check_integrity()


def test_cache_off_finds_nothing() -> None:
    loop = Loop(16)
    loop.add(sequence_of(list(range(8)), max_tokens=1))
    loop.step()
    loop.add(again := sequence_of(list(range(8)), max_tokens=1, use_cache=False))
    loop.admit()
    assert again.num_computed == 0


def test_removal_forgets_a_sequence_wherever_it_stands() -> None:
    loop = Loop(8)
    admitted, waiting = fresh(16, 0), fresh(20, 100)
    loop.add(admitted, waiting)
    loop.admit()
    loop.scheduler.remove(waiting)
    loop.scheduler.remove(admitted)
    assert repr(loop.scheduler).startswith("<Scheduler 0 waiting, 0 admitted")
    assert admitted.status is waiting.status is Status.FINISHED
    assert len(admitted.block_table) == 4, "who removes it releases its blocks: a job may still read them"
    loop.pool.release(admitted.block_table)
    loop.scheduler.check_integrity()


def test_queued_tokens_count_prompts_only() -> None:
    loop = Loop(8, step_tokens=6)
    loop.add(fresh(4, 0), fresh(12, 100), fresh(20, 200))
    loop.step()
    # The first decodes, the second has 2 of its 12, the third waits.
    assert loop.scheduler.num_queued_prefill_tokens == 10 + 20


@pytest.mark.parametrize("seed", range(6))
def test_nobody_starves_and_no_block_is_lost(seed: int) -> None:
    rng = random.Random(seed)
    loop = Loop(10, max_running=6, step_tokens=rng.choice([5, 16, 64]))
    # Prompts share beginnings, a request may fill the whole pool.
    heads = [[rng.randrange(50) for _ in range(20)] for _ in range(3)]
    num_added = num_cancelled = 0
    for turn in range(1700):  # times six seeds: 10,200 steps, and then the drain
        if rng.random() < 0.15:
            prompt = rng.choice(heads)[: rng.randint(0, 20)] + [rng.randrange(50) for _ in range(rng.randint(1, 10))]
            max_tokens = rng.randint(1, 10 * BLOCK_SIZE - len(prompt))
            loop.add(sequence_of(prompt, max_tokens, name=str(turn), use_cache=rng.random() < 0.8))
            num_added += 1
        if rng.random() < 0.02 and loop.scheduler.admitted:
            loop.finish(rng.choice(loop.scheduler.admitted))
            num_cancelled += 1
        loop.step()
    for _ in range(20_000):
        if not loop.scheduler.waiting and not loop.scheduler.admitted:
            break
        assert loop.step(), "somebody waits and nobody computes"
    assert len(loop.finished) == num_added
    assert loop.pool.num_used == 0
    assert num_cancelled > 0
    assert sum(sequence.num_preemptions for sequence in loop.finished) > 0
