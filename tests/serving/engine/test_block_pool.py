"""The pool's books: a random walk against a small model, and each rule on its own."""

from dataclasses import dataclass, field

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cache.extent import NOBODY, Origin
from cache.hashing import BlockHash, as_token_ids, block_hash, chain_hashes
from cache.messages import PurgeQuery
from serving.engine.block_pool import BlockPool, Owner, PoolMatch

BLOCK_SIZE = 4
ROOT = BlockHash(b"root" * 4)
OTHER_ROOT = BlockHash(b"else" * 4)


def match(pool: BlockPool, tokens: list[int], root: BlockHash = ROOT) -> PoolMatch:
    ids = as_token_ids(tokens)
    return pool.match(root, chain_hashes(root, ids, BLOCK_SIZE), ids)


def register(
    pool: BlockPool, tokens: list[int], table: list[int], root: BlockHash = ROOT, origin: Origin = NOBODY
) -> list[BlockHash]:
    """Register the blocks of a chain as a sequence does, its partial block too; returns their hashes."""
    ids = as_token_ids(tokens)
    hashes = chain_hashes(root, ids, BLOCK_SIZE)
    if len(ids) % BLOCK_SIZE:
        hashes.append(block_hash(hashes[-1] if hashes else root, ids[len(hashes) * BLOCK_SIZE :]))
    for index, one in enumerate(hashes):
        parent = hashes[index - 1] if index else root
        block = ids[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE]
        pool.register(table[index], one, parent, block, Owner(root, origin))
    return hashes


def num_blocks_for(tokens: list[int]) -> int:
    return -(-len(tokens) // BLOCK_SIZE)


def cache_chain(pool: BlockPool, tokens: list[int], root: BlockHash = ROOT, origin: Origin = NOBODY) -> list[int]:
    """Compute, register and release a chain; returns the blocks where it lies."""
    table = pool.allocate(num_blocks_for(tokens))
    assert table is not None
    register(pool, tokens, table, root, origin)
    pool.release(table)
    return table


@dataclass
class Chain:
    """A sequence of the model: what it holds and what it has written."""

    tokens: list[int]
    table: list[int]
    owned: list[int] = field(default_factory=list)
    """Blocks that it has allocated itself, the others are shared."""


class PoolWalk(RuleBasedStateMachine):
    """Sequences come, find, compute, register and go. The model knows who uses each block, and what was written."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(12, BLOCK_SIZE)
        self.chains: list[Chain] = []
        self.content: dict[int, tuple[int, ...]] = {}
        """What was last written into each block, and all that came before it."""
        self.reported: set[BlockHash] = set()

    def used(self) -> set[int]:
        return {block_id for chain in self.chains for block_id in chain.table}

    # Few different tokens, so that prompts share and fork everywhere.
    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=22), use_cache=st.booleans())
    def start(self, tokens: list[int], use_cache: bool) -> None:
        found = match(self.pool, tokens) if use_cache else PoolMatch()
        self.check_match(tokens, found)
        self.pool.share(found.block_ids)
        used_before, num_available = self.used() | set(found.block_ids), self.pool.num_available
        after = found.block_ids[-1] if found.block_ids else None
        wanted = num_blocks_for(tokens) - len(found.block_ids)
        fresh = self.pool.allocate(wanted, after, room=2)
        if fresh is None:
            assert wanted > num_available
            assert self.pool.num_available == num_available
            self.pool.release(found.block_ids)
            return
        assert len(fresh) == len(set(fresh)) == wanted
        assert not used_before & set(fresh), "a used block was handed out"
        chain = Chain(tokens, [*found.block_ids, *fresh], fresh)
        self.chains.append(chain)
        for index, block_id in enumerate(chain.table):
            if block_id in fresh:
                self.content[block_id] = tuple(tokens[: (index + 1) * BLOCK_SIZE])

    def check_match(self, tokens: list[int], found: PoolMatch) -> None:
        for index, block_id in enumerate(found.block_ids):
            assert self.content[block_id] == tuple(tokens[: (index + 1) * BLOCK_SIZE])
        if found.partial_block_id is not None:
            num_tokens = len(found.block_ids) * BLOCK_SIZE + found.partial_tokens
            assert self.content[found.partial_block_id][:num_tokens] == tuple(tokens[:num_tokens])
            assert found.partial_tokens >= 1

    @precondition(lambda self: self.chains)
    @rule(which=st.integers(0, 99), with_tail=st.booleans())
    def finish(self, which: int, with_tail: bool) -> None:
        chain = self.chains.pop(which % len(self.chains))
        end = len(chain.tokens) if with_tail else len(chain.tokens) // BLOCK_SIZE * BLOCK_SIZE
        hashes = register(self.pool, chain.tokens[:end], chain.table)
        full = end // BLOCK_SIZE
        assert set(hashes[:full]) <= self.pool.all_hashes()
        self.pool.release(chain.table)
        found = match(self.pool, chain.tokens)
        assert len(found.block_ids) * BLOCK_SIZE + found.partial_tokens >= end, "what was registered is not found"

    @precondition(lambda self: self.chains)
    @rule(which=st.integers(0, 99))
    def cancel(self, which: int) -> None:
        self.pool.release(self.chains.pop(which % len(self.chains)).table)

    @rule()
    def purge(self) -> None:
        num_found = len(self.pool.all_hashes())
        assert self.pool.purge(PurgeQuery(root_hash=OTHER_ROOT)) == 0
        assert self.pool.purge(PurgeQuery(root_hash=ROOT)) == num_found
        assert not self.pool.all_hashes()

    @rule()
    def report(self) -> None:
        changes = self.pool.take_changes()
        assert not changes.added & changes.removed
        self.reported = (self.reported - changes.removed) | changes.added
        assert self.reported == self.pool.all_hashes(), "a reader of the changes knows something else"
        assert not self.pool.has_changes

    @invariant()
    def books_are_right(self) -> None:
        self.pool.check_integrity()
        assert self.pool.num_used == len(self.used())


PoolWalk.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPoolWalk = PoolWalk.TestCase


def test_a_cached_chain_is_found_until_its_place_is_needed() -> None:
    pool = BlockPool(4, BLOCK_SIZE)
    table = cache_chain(pool, list(range(10)))
    assert repr(pool) == "<BlockPool 4 blocks: 1 free, 0 used, 3 cached>"
    found = match(pool, list(range(10)))
    assert (found.block_ids, found.partial_block_id, found.partial_tokens) == (tuple(table[:2]), table[2], 2)
    assert match(pool, list(range(10)), OTHER_ROOT) == PoolMatch()
    assert pool.allocate(4) is not None
    assert match(pool, list(range(10))) == PoolMatch()


def test_eviction_takes_leaves_first_and_the_least_recently_used_chain_first() -> None:
    pool = BlockPool(6, BLOCK_SIZE)
    old, new = [1] * 12, [2] * 12
    cache_chain(pool, old)
    cache_chain(pool, new)
    found_of_old = []
    for _ in range(3):
        assert pool.allocate(1) is not None
        found_of_old.append(len(match(pool, old).block_ids))
        assert len(match(pool, new).block_ids) == 3
    assert found_of_old == [2, 1, 0]


def test_using_a_chain_again_makes_it_the_youngest() -> None:
    pool = BlockPool(4, BLOCK_SIZE)
    first, second = [1] * 8, [2] * 8
    cache_chain(pool, first)
    cache_chain(pool, second)
    block_ids = match(pool, first).block_ids
    pool.share(block_ids)
    pool.release(block_ids)
    assert pool.allocate(2) is not None
    assert len(match(pool, first).block_ids) == 2
    assert match(pool, second) == PoolMatch()


def test_allocation_is_all_or_nothing() -> None:
    pool = BlockPool(4, BLOCK_SIZE)
    cache_chain(pool, [1] * 8)
    taken = pool.allocate(1)
    before = repr(pool)
    assert pool.allocate(4) is None
    assert repr(pool) == before
    assert len(match(pool, [1] * 8).block_ids) == 2, "a refused allocation evicts nothing"
    assert taken is not None
    assert pool.allocate(0) == []


def test_blocks_come_in_consecutive_ids() -> None:
    pool = BlockPool(16, BLOCK_SIZE)
    assert pool.allocate(3) == [0, 1, 2]
    second = pool.allocate(2)
    assert second == [3, 4]
    pool.release([1])
    assert pool.allocate(2, after=4) == [5, 6], "behind the sequence's last block, not into the hole"
    assert pool.allocate(1) == [1], "the smallest run that fits"
    assert pool.allocate(2, after=0) == [7, 8], "what follows is taken: another run"
    assert pool.allocate(1, after=15) == [9], "nothing follows the last block"


def test_room_to_grow_chooses_the_larger_run() -> None:
    pool = BlockPool(16, BLOCK_SIZE)
    taken = pool.allocate(16)
    assert taken is not None
    pool.release([2, 3])  # runs of 2 and 5
    pool.release([8, 9, 10, 11, 12])
    assert pool.allocate(2, room=2) == [8, 9]
    assert pool.allocate(2) == [2, 3]
    pool.release([2, 3])
    assert pool.allocate(4) == [10, 11, 12, 2], "no run is large enough: the largest first"


def test_a_tail_that_is_superseded_is_freed() -> None:
    pool = BlockPool(8, BLOCK_SIZE)
    cache_chain(pool, [1, 2])
    cache_chain(pool, [1, 2, 3])
    assert repr(pool) == "<BlockPool 8 blocks: 7 free, 0 used, 1 cached>"
    cache_chain(pool, [1, 2, 3, 4])
    assert repr(pool) == "<BlockPool 8 blocks: 7 free, 0 used, 1 cached>"
    assert match(pool, [1, 2, 9]).partial_tokens == 2


def test_a_superseded_tail_in_use_is_freed_when_it_is_released() -> None:
    pool = BlockPool(8, BLOCK_SIZE)
    tail = cache_chain(pool, [1, 2])
    pool.share(tail)
    cache_chain(pool, [1, 2, 3])
    assert match(pool, [1, 2]).partial_block_id != tail[0]
    pool.check_integrity()
    pool.release(tail)
    assert repr(pool) == "<BlockPool 8 blocks: 7 free, 0 used, 1 cached>"


@pytest.mark.parametrize("longer", [[1, 2, 3], [1, 2, 3, 4]], ids=["tail", "full block"])
def test_a_tail_that_is_covered_is_not_kept(longer: list[int]) -> None:
    pool = BlockPool(8, BLOCK_SIZE)
    cache_chain(pool, longer)
    cache_chain(pool, [1, 2])
    assert repr(pool) == "<BlockPool 8 blocks: 7 free, 0 used, 1 cached>"
    assert len(pool.all_hashes()) == 1


def test_a_second_block_with_the_same_content_stays_private() -> None:
    pool = BlockPool(8, BLOCK_SIZE)
    first, second = pool.allocate(1), pool.allocate(1)
    assert first is not None
    assert second is not None
    register(pool, [1, 2, 3, 4], first)
    register(pool, [1, 2, 3, 4], second)
    pool.release(second)
    assert repr(pool) == "<BlockPool 8 blocks: 7 free, 1 used, 0 cached>"
    assert match(pool, [1, 2, 3, 4]).block_ids == tuple(first)


def test_a_block_that_came_and_left_between_two_reports_is_reported_as_gone() -> None:
    pool = BlockPool(1, BLOCK_SIZE)
    cache_chain(pool, [1, 2, 3, 4])
    assert pool.allocate(1) is not None
    changes = pool.take_changes()
    assert not changes.added
    assert len(changes.removed) == 1
    assert not pool.has_changes


ANNA, BERT = Origin("acme", "anna"), Origin("acme", "bert")


def test_a_purge_takes_what_is_meant_and_nothing_else() -> None:
    pool = BlockPool(16, BLOCK_SIZE)
    cache_chain(pool, [1] * 10, origin=ANNA)
    cache_chain(pool, [2] * 10, origin=BERT)
    cache_chain(pool, [1] * 10, OTHER_ROOT, ANNA)
    assert pool.purge(PurgeQuery("acme", "nobody")) == 0
    assert pool.purge(PurgeQuery("acme", "anna", OTHER_ROOT)) == 3
    assert match(pool, [1] * 10, OTHER_ROOT) == PoolMatch()
    assert pool.purge(PurgeQuery("acme", "anna")) == 3
    assert match(pool, [1] * 10) == PoolMatch()
    assert len(match(pool, [2] * 10).block_ids) == 2
    assert pool.purge(PurgeQuery("acme")) == 3
    assert repr(pool) == "<BlockPool 16 blocks: 16 free, 0 used, 0 cached>"
    pool.check_integrity()


def test_what_is_purged_in_use_is_free_when_it_is_released() -> None:
    pool = BlockPool(8, BLOCK_SIZE)
    table = cache_chain(pool, [1] * 8, origin=ANNA)
    pool.share(table)
    pool.take_changes()
    assert pool.purge(PurgeQuery(session="anna")) == 2
    assert match(pool, [1] * 8) == PoolMatch()
    assert len(pool.take_changes().removed) == 2, "and those who follow the pool's changes know"
    pool.check_integrity()
    pool.release(table)
    assert repr(pool) == "<BlockPool 8 blocks: 8 free, 0 used, 0 cached>"
