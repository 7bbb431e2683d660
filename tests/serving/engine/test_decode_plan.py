"""Every slot is attended to exactly once, whatever the lengths and fragmentations."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from serving.engine.decode_plan import PIECE_UNIT, DecodePlan, Piece, SlotRun, pair_up, plan_decode


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


def plan(runs: list[list[SlotRun]]) -> DecodePlan:
    return plan_decode(range(5, 5 + len(runs)), runs, torch.float32, torch.device("cpu"))


def attended_slots(planned: DecodePlan, sequence: int) -> list[int]:
    """The slots behind the partial results that are merged for a sequence."""
    pieces = [piece for pair in planned.pairs for piece in pair]
    num_sequences = len(planned.rows)
    slots: list[int] = []
    is_real = planned.partials_mask[sequence].flatten() == 0
    for number in planned.partials[sequence][is_real].tolist():
        if number < num_sequences:
            assert number == sequence
            slots += planned.tail_slots[sequence][planned.tail_mask[sequence].flatten() == 0].tolist()
        else:
            piece = pieces[number - num_sequences]
            assert piece.sequence == sequence == int(planned.piece_sequences[number - num_sequences])
            slots += range(piece.first, piece.first + piece.length)
    return slots


@given(runs=sequences_of_runs())
def test_all_slots_once(runs: list[list[SlotRun]]) -> None:
    planned = plan(runs)
    assert planned.rows.tolist() == list(range(5, 5 + len(runs)))
    for sequence, own in enumerate(runs):
        expected = [slot for first, last in own for slot in range(first, last)]
        assert sorted(attended_slots(planned, sequence)) == sorted(expected)
        # What fills a row up is there to be read, though it is masked: a slot of the sequence, so never unwritten.
        assert set(planned.tail_slots[sequence].tolist()) <= set(expected)
    assert all(a.length == b.length and a.first < b.first for a, b in planned.pairs)


@given(lengths=st.lists(st.integers(1, 40), max_size=12))
def test_pairing_takes_one_call_per_piece_at_most(lengths: list[int]) -> None:
    firsts = np.cumsum([0, *lengths]) * PIECE_UNIT
    pieces = [Piece(length * PIECE_UNIT, int(firsts[at]), at) for at, length in enumerate(lengths)]
    pairs = pair_up(pieces)
    assert len(pairs) <= len(pieces)
    assert sum(2 * a.length for a, _ in pairs) == sum(piece.length for piece in pieces)


def test_equal_sequences_pair_up_at_once() -> None:
    planned = plan([[(at * 1024, at * 1024 + 1000 + at)] for at in range(16)])
    assert len(planned.pairs) == 8
    assert {a.length for a, _ in planned.pairs} == {960}
    assert planned.tail_slots.shape == (16, 55)
    assert planned.partials.shape == (16, 2)


def test_short_sequences_take_one_call() -> None:
    planned = plan([[(0, 64)], [(100, 101)]])
    assert planned.pairs == ()
    assert planned.tail_slots.shape == (2, 64)
