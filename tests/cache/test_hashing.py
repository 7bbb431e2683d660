"""Chained block hashes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.hashing import (
    HASH_BYTES,
    BlockHash,
    as_token_ids,
    block_hash,
    chain_hashes,
    iter_hashes,
    pack_hashes,
    unpack_hashes,
)

ROOT = BlockHash(bytes(HASH_BYTES))
TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=40)


@given(TOKENS, st.integers(1, 7))
def test_a_chain_is_the_blocks_hashed_one_after_the_other(tokens: list[int], block_size: int) -> None:
    ids = as_token_ids(tokens)
    parent, expected = ROOT, []
    for start in range(0, len(ids) // block_size * block_size, block_size):
        parent = block_hash(parent, ids[start : start + block_size])
        expected.append(parent)
    assert chain_hashes(ROOT, ids, block_size) == expected


@given(TOKENS, TOKENS)
def test_chains_agree_exactly_as_far_as_their_tokens_do(left: list[int], right: list[int]) -> None:
    ours, theirs = chain_hashes(ROOT, as_token_ids(left), 2), chain_hashes(ROOT, as_token_ids(right), 2)
    for at, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        assert (a == b) == (left[: 2 * at + 2] == right[: 2 * at + 2])


def test_the_history_and_the_number_of_tokens_count() -> None:
    ids = as_token_ids([1, 2, 3, 4])
    other = block_hash(ROOT, ids)
    assert len({block_hash(ROOT, ids), block_hash(other, ids), block_hash(ROOT, ids[:3])}) == 3
    assert len(other) == HASH_BYTES


def test_the_hash_is_the_same_on_every_machine_and_in_every_process() -> None:
    assert block_hash(ROOT, as_token_ids([1, 2, 3])).hex() == "ae832f6079db5d729bec4c6f5ddfe693"


def test_token_ids_of_any_kind_become_little_endian_int32() -> None:
    big_endian = np.array([1, 70000], dtype=">i8")
    for given_ids in ([1, 70000], (1, 70000), big_endian, np.array([1, 9, 70000, 9], np.int32)[::2]):
        ids = as_token_ids(given_ids)
        assert ids.dtype == np.dtype("<i4")
        assert ids.flags.c_contiguous
        assert ids.tolist() == [1, 70000]


@given(st.lists(st.binary(min_size=HASH_BYTES, max_size=HASH_BYTES)))
def test_packing_hashes_loses_nothing(hashes: list[bytes]) -> None:
    packed = pack_hashes([BlockHash(h) for h in hashes])
    assert unpack_hashes(packed) == list(iter_hashes(packed)) == hashes


def test_packed_hashes_of_an_odd_length_are_refused() -> None:
    with pytest.raises(ValueError, match="17 bytes are no whole number"):
        unpack_hashes(bytes(17))
