"""A sequence's few stored facts and what follows from them."""

import numpy as np
import pytest

from cache.events import Tier
from cache.hashing import BlockHash, as_token_ids, block_hash, chain_hashes
from serving.engine.sequence import EngineRequest, Listener, Sequence, Status
from serving.protocol import SamplingParams

BLOCK_SIZE = 4
ROOT = BlockHash(b"root" * 4)


def sequence_of(tokens: list[int], sampling: SamplingParams | None = None) -> Sequence:
    ids = as_token_ids(tokens)
    request = EngineRequest("request", ids, ROOT, tuple(chain_hashes(ROOT, ids, BLOCK_SIZE)), sampling)
    return Sequence(request, Listener(), BLOCK_SIZE, arrived_at=10.0)


def test_output_is_hashed_as_its_blocks_become_full() -> None:
    sequence = sequence_of([1, 2, 3, 4, 5, 6], SamplingParams(8))
    for token_id in (7, 8, 9, 10, 11, 12, 13):
        sequence.append(token_id)
    assert sequence.token_ids.tolist() == list(range(1, 14))
    assert sequence.block_hashes == chain_hashes(ROOT, as_token_ids(range(1, 14)), BLOCK_SIZE)
    assert (sequence.num_prompt_tokens, sequence.num_output_tokens, sequence.num_tokens) == (6, 7, 13)
    assert sequence.parent_hash(0) == ROOT
    assert sequence.parent_hash(3) == sequence.block_hashes[2]
    assert sequence.block_token_ids(3).tolist() == [13]
    assert block_hash(sequence.parent_hash(2), sequence.block_token_ids(2)) == sequence.block_hashes[2]


def test_the_last_token_is_never_reused_when_something_is_sampled() -> None:
    sampled = sequence_of([1, 2, 3, 4, 5, 6, 7, 8], SamplingParams(1))
    assert sampled.reusable_tokens.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert len(sampled.reusable_hashes) == 1
    prefill_only = sequence_of([1, 2, 3, 4, 5, 6, 7, 8])
    assert len(prefill_only.reusable_tokens) == 8
    assert len(prefill_only.reusable_hashes) == 2


def test_only_whole_blocks_of_computed_tokens_count_as_computed() -> None:
    sequence = sequence_of(list(range(10)), SamplingParams(4))
    for num_computed, num_blocks in ((0, 0), (3, 0), (4, 1), (9, 2)):
        sequence.num_computed = num_computed
        assert len(sequence.computed_hashes) == num_blocks
        assert sequence.num_uncomputed == 10 - num_computed


@pytest.mark.parametrize(
    ("is_loading", "num_stores", "is_idle"), [(False, 0, True), (True, 0, False), (False, 2, False)]
)
def test_it_is_idle_when_no_job_uses_its_blocks(is_loading: bool, num_stores: int, is_idle: bool) -> None:
    sequence = sequence_of([1], SamplingParams(1))
    sequence.is_load_in_flight, sequence.num_stores_in_flight = is_loading, num_stores
    assert sequence.is_idle == is_idle


def test_a_prompt_token_is_accounted_for_once() -> None:
    sequence = sequence_of(list(range(10)), SamplingParams(4))
    sequence.num_computed = 6
    assert sequence.account() == 6
    assert sequence.account() == 0
    sequence.num_computed = 2  # preempted, and some of it found again
    assert sequence.account() == 0
    sequence.num_computed = 12  # output does not count
    assert sequence.account() == 4


def test_usage_tells_tiers_and_times() -> None:
    sequence = sequence_of(list(range(10)), SamplingParams(4))
    sequence.cached_tokens = {Tier.DEVICE: 4, Tier.DISK: 2}
    sequence.remote_tokens, sequence.prefill_tokens, sequence.num_prompt_computed = 1, 2, 1
    assert sequence.usage().ttft_s == 0.0
    sequence.append(5)
    sequence.first_token_at = 10.5
    usage = sequence.usage()
    assert (usage.device_tokens, usage.dram_tokens, usage.disk_tokens, usage.remote_tokens) == (4, 0, 2, 1)
    assert usage.cached_tokens + usage.prefill_tokens + usage.decode_computed_tokens == usage.prompt_tokens
    assert usage.completion_tokens == 1
    assert usage.ttft_s == 0.5


def test_the_prompt_is_copied() -> None:
    ids = as_token_ids([1, 2, 3])
    sequence = Sequence(EngineRequest("r", ids, ROOT, (), SamplingParams(2)), Listener(), BLOCK_SIZE, 0.0)
    sequence.append(4)
    assert np.array_equal(ids, [1, 2, 3])
    assert sequence.status is Status.WAITING
    assert repr(sequence) == "<Sequence r waiting 0/4 tokens, 0 blocks>"
