"""Every slot is attended to exactly once, whatever the lengths and fragmentations, on the CPU and elsewhere."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from serving.engine import kernels
from serving.engine.decode_plan import MAX_PIECE_SLOTS, DecodePlan, SlotRun, plan_decode


@st.composite
def sequences_of_runs(draw: st.DrawFn) -> list[list[SlotRun]]:
    """Disjoint runs, in any order, of several sequences."""
    lengths = draw(st.lists(st.lists(st.integers(1, 700), min_size=1, max_size=4), min_size=1, max_size=6))
    places = [(sequence, at) for sequence, own in enumerate(lengths) for at in range(len(own))]
    runs: list[list[SlotRun]] = [[(0, 0)] * len(own) for own in lengths]
    first = 0
    for sequence, at in draw(st.permutations(places)):
        last = first + lengths[sequence][at]
        runs[sequence][at] = (first, last)
        first = last + draw(st.integers(0, 3))
    return runs


def plan(runs: list[list[SlotRun]], dtype: torch.dtype = torch.float32, num_others: int = 5) -> DecodePlan:
    rows = range(num_others, num_others + len(runs))
    return plan_decode(rows, runs, num_others + len(runs), torch.empty(1, 2, 0, 1, 16, dtype=dtype))


def slots_of(own: list[SlotRun]) -> list[int]:
    return [slot for first, last in own for slot in range(first, last)]


@pytest.mark.skipif(not kernels.available(), reason="everything is gathered here")
@given(runs=sequences_of_runs())
def test_pieces_cover_all_slots_once(runs: list[list[SlotRun]]) -> None:
    planned = plan(runs)
    assert planned.slots is None
    assert planned.pieces is not None
    assert planned.pieces[:, 0].tolist() == sorted(planned.pieces[:, 0].tolist())
    for sequence, own in enumerate(runs):
        pieces = planned.pieces[planned.pieces[:, 0] == sequence].tolist()
        assert all(0 < count <= MAX_PIECE_SLOTS for _, _, count in pieces)
        assert [slot for _, first, count in pieces for slot in range(first, first + count)] == slots_of(own)


@given(runs=sequences_of_runs())
def test_gathered_slots_are_all_and_the_rest_is_masked(runs: list[list[SlotRun]]) -> None:
    planned = plan(runs, torch.bfloat16)
    assert planned.pieces is None
    assert planned.slots is not None
    assert planned.mask is not None
    for sequence, own in enumerate(runs):
        slots, is_real = planned.slots[sequence], planned.mask[sequence].flatten() == 0
        assert slots[is_real].tolist() == slots_of(own)
        # What fills a row up is there to be read, though it is masked: a slot of the sequence, so never unwritten.
        assert set(slots.tolist()) == set(slots_of(own))


def test_rows_are_named_unless_they_are_all() -> None:
    rows = plan([[(0, 3)], [(8, 9)]]).rows
    assert rows is not None
    assert rows.tolist() == [5, 6]
    assert plan([[(0, 3)], [(8, 9)]], num_others=0).rows is None
