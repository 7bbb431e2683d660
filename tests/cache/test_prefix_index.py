"""The prefix index against the plain definition: the longest common prefix over all stored chains."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cache.hashing import HASH_BYTES, BlockHash, as_token_ids, block_hash, chain_hashes
from cache.prefix_index import PrefixIndex, PrefixMatch, common_prefix

SIZE = 3
ROOT = BlockHash(bytes(HASH_BYTES))
# Few different ids, so that chains share and fork often; ids whose bytes compare unlike the ids would.
PROMPTS = st.lists(st.sampled_from([0, 1, 255, 256, 2**31 - 1]), max_size=11).map(tuple)

Tokens = tuple[int, ...]


def blocks_of(tokens: Sequence[int]) -> list[tuple[Tokens, Tokens]]:
    """All blocks of a chain, the partial one included: tokens of the history, tokens of the block."""
    return [(tuple(tokens[:at]), tuple(tokens[at : at + SIZE])) for at in range(0, len(tokens), SIZE)]


def hash_of(tokens: Sequence[int]) -> BlockHash:
    parent = ROOT
    for _, block in blocks_of(tokens):
        parent = block_hash(parent, as_token_ids(block))
    return parent


def match(index: PrefixIndex, tokens: Sequence[int]) -> PrefixMatch:
    ids = as_token_ids(tokens)
    return index.match(ROOT, chain_hashes(ROOT, ids, SIZE), ids, SIZE)


def common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class IndexMachine(RuleBasedStateMachine):
    """Chains come block by block and blocks go in any order; lookups agree with a walk over everything."""

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex()
        self.stored: set[tuple[Tokens, Tokens]] = set()

    @rule(tokens=PROMPTS)
    def add(self, tokens: Tokens) -> None:
        for history, block in blocks_of(tokens):
            self.index.add(hash_of(history + block), hash_of(history), as_token_ids(block))
            self.stored.add((history, block))

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        if self.stored:
            history, block = data.draw(st.sampled_from(sorted(self.stored)))
            self.index.remove(hash_of(history + block))
            self.stored.discard((history, block))

    @rule(tokens=PROMPTS)
    def look(self, tokens: Tokens) -> None:
        found = match(self.index, tokens)
        at = 0
        while len(tokens) - at >= SIZE and (tokens[:at], tokens[at : at + SIZE]) in self.stored:
            at += SIZE
        rest = tokens[at : at + SIZE]
        longest = max((common(rest, block) for history, block in self.stored if history == tokens[:at]), default=0)
        assert found.num_blocks == at // SIZE
        assert found.num_tokens(SIZE) == at + longest
        if longest:
            assert found.partial is not None
            assert found.partial in self.index
            holders = [block for history, block in self.stored if hash_of(history + block) == found.partial]
            assert [common(rest, block) for block in holders] == [longest]
        else:
            assert found.partial is None

    @rule(history=PROMPTS, block=st.lists(st.sampled_from([0, 1, 256]), min_size=1, max_size=SIZE).map(tuple))
    def look_for_superseded(self, history: Tokens, block: Tokens) -> None:
        history = history[: len(history) // SIZE * SIZE]
        found = self.index.superseded_by(hash_of(history), as_token_ids(block))
        expected = {
            hash_of(history + tail)
            for parent, tail in self.stored
            if parent == history and len(tail) < len(block) and block[: len(tail)] == tail
        }
        assert sorted(found) == sorted(expected)

    @invariant()
    def is_sound(self) -> None:
        self.index.check_integrity()
        assert len(self.index) == len(self.stored)


IndexMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestIndexMachine = IndexMachine.TestCase


@given(st.lists(PROMPTS, max_size=6), PROMPTS)
def test_a_prompt_matches_as_far_as_any_stored_chain_does(chains: list[Tokens], tokens: Tokens) -> None:
    index = PrefixIndex()
    for chain in chains:
        for history, block in blocks_of(chain):
            index.add(hash_of(history + block), hash_of(history), as_token_ids(block))
    assert match(index, tokens).num_tokens(SIZE) == max((common(chain, tokens) for chain in chains), default=0)


def test_descendants_of_a_removed_block_are_found_again_with_it() -> None:
    index = PrefixIndex()
    for history, block in blocks_of([1, 2, 3, 4, 5, 6]):
        index.add(hash_of(history + block), hash_of(history), as_token_ids(block))
    index.remove(hash_of([1, 2, 3]))
    assert match(index, [1, 2, 3, 4, 5, 6]).num_tokens(SIZE) == 0
    index.add(hash_of([1, 2, 3]), ROOT, as_token_ids([1, 2, 3]))
    assert match(index, [1, 2, 3, 4, 5, 6]).num_tokens(SIZE) == 6


def test_removing_an_unknown_block_is_an_error() -> None:
    with pytest.raises(KeyError):
        PrefixIndex().remove(ROOT)


def test_a_popular_parent_costs_no_walk() -> None:
    index = PrefixIndex()
    for token in range(5000):
        index.add(hash_of([token, token]), ROOT, as_token_ids([token, token]))
    assert match(index, [4321, 4321, 7]).num_tokens(SIZE) == 2
    assert index.superseded_by(ROOT, as_token_ids([4321, 4321, 7])) == [hash_of([4321, 4321])]


def test_common_prefix_counts_tokens_not_bytes() -> None:
    a, b = (as_token_ids(ids).astype(">i4").tobytes() for ids in ([1, 256], [1, 257]))
    assert common_prefix(a, b) == 1
    assert common_prefix(a, a) == 2
    assert common_prefix(a, b"") == 0
