from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.engine import kernels
from serving.engine.kv_pool import KVLayout, KVPool
from serving.engine.step_batch import MAX_VIEWED_RUNS, SequencePart, build_step_batch, slot_runs


def make_pool(num_blocks: int = 64) -> KVPool:
    return KVPool(KVLayout(num_layers=1, num_kv_heads=1, head_dim=2, block_size=4, dtype="float32"), num_blocks)


@given(table=st.permutations(range(12)), block_size=st.integers(1, 5), data=st.data())
def test_runs_cover_the_tokens_in_order_and_are_as_few_as_possible(
    table: list[int], block_size: int, data: st.DataObject
) -> None:
    num_tokens = data.draw(st.integers(0, len(table) * block_size))
    runs = slot_runs(table, block_size, num_tokens)
    expected = [table[at // block_size] * block_size + at % block_size for at in range(num_tokens)]
    assert [slot for first, last in runs for slot in range(first, last)] == expected
    assert all(left[1] != right[0] for left, right in pairwise(runs))


def test_parts_are_packed_one_after_the_other() -> None:
    parts = [
        SequencePart([5, 6, 7], position=6, block_table=[2, 3, 9]),
        SequencePart([8], position=7, block_table=[5, 6]),
        SequencePart([1, 2], position=0, block_table=[20], wants_logits=False),
    ]
    batch = build_step_batch(make_pool(), parts)
    assert batch.num_tokens == 6
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 1, 2]
    assert batch.position_ids.tolist() == [6, 7, 8, 7, 0, 1]
    assert batch.slots.tolist() == [14, 15, 36, 27, 80, 81]
    assert batch.logits_indices.tolist() == [2, 3]
    # A single token sees itself through the pool, a segment does not.
    assert batch.chunk_plan is None
    assert [(s.start, s.length, s.runs) for s in batch.segments] == [(0, 3, ((8, 14),)), (4, 2, ())]
    assert batch.decode_plan is not None
    assert batch.decode_plan.rows is not None
    assert batch.decode_plan.rows.tolist() == [3]
    if batch.decode_plan.pieces is not None:
        assert batch.decode_plan.pieces.tolist() == [[0, 20, 8]]


@pytest.mark.skipif(not kernels.available(), reason="torch attends here")
def test_chunks_for_the_kernels_name_all_their_slots() -> None:
    pool = KVPool(KVLayout(num_layers=1, num_kv_heads=1, head_dim=16, block_size=4, dtype="float32"), 64)
    parts = [
        SequencePart([5, 6, 7], position=6, block_table=[2, 3, 9]),
        SequencePart([8], position=7, block_table=[5, 6]),
        SequencePart([1, 2], position=0, block_table=[20], wants_logits=False),
    ]
    batch = build_step_batch(pool, parts)
    assert batch.segments == ()
    assert batch.chunk_plan is not None
    assert batch.chunk_plan.chunks.tolist() == [[0, 3, 6, 0, 2], [4, 2, 0, 2, 3]]
    assert batch.chunk_plan.runs.tolist() == [[8, 8], [36, 1], [80, 2]]
    assert build_step_batch(pool, parts[1:2]).chunk_plan is None


def test_a_badly_fragmented_sequence_is_gathered() -> None:
    table = list(range(0, 2 * (MAX_VIEWED_RUNS + 1), 2))
    part = SequencePart([1, 2], position=4 * (len(table) - 1) + 1, block_table=table)
    (segment,) = build_step_batch(make_pool(), [part]).segments
    assert len(segment.runs) == MAX_VIEWED_RUNS + 1
    assert segment.gathered is not None
    assert segment.gathered.tolist() == [slot for first, last in segment.runs for slot in range(first, last)]
    (shorter,) = build_step_batch(make_pool(), [SequencePart([1, 2], 4 * (len(table) - 1), table)]).segments
    assert shorter.gathered is None


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="position 4 needs 2 blocks, the table has 1"):
        build_step_batch(make_pool(), [SequencePart([1, 2], position=3, block_table=[0])])
    with pytest.raises(ValueError, match="no tokens"):
        build_step_batch(make_pool(), [SequencePart([], position=4, block_table=[0, 1])])
    with pytest.raises(ValueError, match="5 tokens need 2 blocks of 4, the table has 1"):
        slot_runs([0], 4, 5)
