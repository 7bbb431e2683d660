"""Loading and computing of one prompt never touch the same token, leave none out, and always come to an end."""

import threading

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cache.events import Tier
from serving.engine.meeting import Meeting
from serving.protocol import LoadPlan

BLOCK_SIZE = 4


def meeting_of(front: int, stored: int, kind: str = "both", end: int | None = None) -> Meeting:
    meeting = Meeting(front, end or stored, BLOCK_SIZE, 0.0)
    plan = LoadPlan("both" if kind == "both" else "load", stored - front, 0, 1.0)
    meeting.begin_load(plan, stored, 0.5)
    return meeting


def block_end(begin: int, stored: int) -> int:
    return min(begin // BLOCK_SIZE * BLOCK_SIZE + BLOCK_SIZE, stored)


def load_back(meeting: Meeting, begin: int, stored: int) -> bool:
    """Bring one block from the back; whether the meeting wanted it."""
    if not meeting.claim_previous(begin):
        return False
    meeting.wrote(begin, block_end(begin, stored), Tier.DISK)
    return True


def test_both_ends_meet_in_the_middle() -> None:
    meeting = meeting_of(0, 16)
    assert meeting.claim_front(4) == 4
    assert load_back(meeting, 12, 16)
    assert load_back(meeting, 8, 16)
    assert not meeting.meet(4)
    assert meeting.claim_front(100) == 4, "no further than to the back"
    assert not load_back(meeting, 4, 16), "that one is being computed"
    assert meeting.meet(8)
    loaded = meeting.take(8)
    assert loaded is not None
    assert (loaded.begin, loaded.end, loaded.by_tier) == (8, 16, {Tier.DISK: 8})
    assert not meeting.has_more
    assert meeting.gap() is None


def test_a_block_that_is_being_written_is_waited_for() -> None:
    meeting = meeting_of(0, 8)
    assert meeting.claim_previous(4)
    assert meeting.claim_front(100) == 4
    assert not meeting.meet(4), "the step loop must not read what is being written"
    meeting.wrote(4, 8, Tier.DRAM)
    assert meeting.meet(4)


def test_a_load_in_turn_is_turned_between_two_blocks() -> None:
    meeting = meeting_of(2, 15, "load")
    assert meeting.claim_front(100) == 0, "it is not asked to compute"
    assert meeting.claim_next()
    assert not meeting.turn()
    meeting.wrote(0, 4, Tier.DRAM)
    assert meeting.claim_next()
    meeting.wrote(4, 8, Tier.DISK)
    assert meeting.turn()
    assert not meeting.claim_next()
    loaded = meeting.take(2)
    assert loaded is not None
    assert (loaded.begin, loaded.end, loaded.by_tier) == (2, 8, {Tier.DRAM: 2, Tier.DISK: 4})
    assert load_back(meeting, 12, 15)
    assert meeting.claim_front(100) == 4
    assert meeting.meet(12)
    assert meeting.num_loaded == 9


def test_nothing_stored_ends_at_once() -> None:
    meeting = Meeting(5, 40, BLOCK_SIZE, 0.0)
    assert meeting.plan is None
    meeting.end_load()
    assert meeting.take(5) is None
    assert not meeting.has_more
    assert meeting.back == 5


def test_a_front_that_could_not_wait_for_the_answer_gets_there_first() -> None:
    meeting = Meeting(0, 40, BLOCK_SIZE, 0.0)
    assert meeting.turn()
    assert meeting.claim_front(22) == 22
    meeting.begin_load(LoadPlan("load", 20, 0, 1.0), 20, 2.0)
    assert meeting.gap() is None
    assert not load_back(meeting, 16, 20)
    assert meeting.meet(22)
    assert not meeting.has_more


def test_a_gap_left_by_a_bad_block_is_for_the_next_pass_or_the_front() -> None:
    meeting = meeting_of(0, 24)
    assert load_back(meeting, 20, 24)
    assert meeting.gap() == (0, 20)
    meeting.begin_pass()  # block 4 was bad, the store has the first twelve tokens
    assert load_back(meeting, 8, 12)
    assert meeting.claim_front(100) == 8
    assert not load_back(meeting, 4, 12)
    assert meeting.meet(8)
    first = meeting.take(8)
    assert first is not None
    assert (first.begin, first.end) == (8, 12)
    assert meeting.take(12) is None
    assert meeting.has_more
    assert meeting.claim_front(100) == 8
    last = meeting.take(20)
    assert last is not None
    assert (last.begin, last.end) == (20, 24)


def test_stop_ends_the_load_but_not_a_block_that_is_being_written() -> None:
    meeting = meeting_of(0, 16)
    assert meeting.claim_previous(12)
    meeting.stop()
    meeting.wrote(12, 16, Tier.DRAM)
    assert not meeting.claim_previous(8)
    assert meeting.gap() is None


@pytest.mark.parametrize("kind", ["both", "load"])
def test_a_block_that_brings_nothing_is_not_waited_for(kind: str) -> None:
    """After a bad block, the store may offer a tail that ends before what the pool has."""
    meeting = meeting_of(6, 12, kind)
    assert meeting.claim_previous(4) if kind == "both" else meeting.claim_next()
    meeting.wrote(4, 5, Tier.DISK)
    assert meeting.num_loaded == 0
    meeting.end_load()
    assert not meeting.has_more
    assert meeting.back == 6


class Sides:
    """Both sides of a meeting in one thread, each moved on by the test."""

    def __init__(self, front: int, stored: int, bad_blocks: list[int], *, begins_in_turn: bool) -> None:
        self.meeting = meeting_of(front, stored, "load" if begins_in_turn else "both")
        self.stored, self.bad_blocks = stored, bad_blocks
        self.position = front
        self.num_computed = self.num_loaded = 0
        self.is_ended = False
        self.next_in_turn = front // BLOCK_SIZE * BLOCK_SIZE
        self.next_back = (stored - 1) // BLOCK_SIZE * BLOCK_SIZE

    @property
    def is_done(self) -> bool:
        return self.is_ended and not self.meeting.has_more

    def load_one(self) -> None:
        if self.is_ended:
            return
        if not self.meeting.is_turned:
            self._load_in_turn()
        elif self.next_back // BLOCK_SIZE in self.bad_blocks:
            self.meeting.begin_pass()
            self.next_back -= BLOCK_SIZE
        elif self.next_back >= 0 and load_back(self.meeting, self.next_back, self.stored):
            self.next_back -= BLOCK_SIZE

    def _load_in_turn(self) -> None:
        begin = self.next_in_turn
        if begin < self.stored and begin // BLOCK_SIZE not in self.bad_blocks and self.meeting.claim_next():
            self.next_in_turn = block_end(begin, self.stored)
            self.meeting.wrote(begin, self.next_in_turn, Tier.DRAM)

    def compute(self, num_tokens: int) -> None:
        if self.meeting.is_turned:
            self.take()
        claimed = self.meeting.claim_front(num_tokens)
        self.num_computed += claimed
        self.position += claimed
        if self.meeting.meet(self.position):
            self.is_ended = True
            self.take()

    def take(self) -> None:
        while (found := self.meeting.take(self.position)) is not None:
            assert found.begin == self.position
            assert sum(found.by_tier.values()) == found.end - found.begin
            self.num_loaded += found.end - found.begin
            self.position = found.end


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 20),
    st.integers(1, 60),
    st.lists(st.integers(0, 9), max_size=60),
    st.lists(st.integers(0, 14), max_size=4),
    st.booleans(),
)
@example(0, 1, [0, 9, 0], [], True)
def test_in_any_order_every_token_comes_from_one_side(
    front: int, num_stored: int, order: list[int], bad_blocks: list[int], begins_in_turn: bool
) -> None:
    """0 to 4: the load gets a block; 5 to 8: a step of so many tokens; 9: the load is found to be late."""
    sides = Sides(front, front + num_stored, bad_blocks, begins_in_turn=begins_in_turn)
    for action in [*order, *[9, 5, 6] * (front + num_stored)]:
        if sides.is_done:
            break
        if action < 5:
            sides.load_one()
        elif action < 9:
            sides.compute(action)
        else:
            sides.meeting.turn()
    assert sides.is_done
    is_end_bad = (sides.stored - 1) // BLOCK_SIZE in bad_blocks
    assert sides.position == sides.stored or (is_end_bad and sides.position < sides.stored)
    assert front + sides.num_computed + sides.num_loaded == sides.position
    assert sides.num_loaded == sides.meeting.num_loaded, "nothing is loaded in vain"


@pytest.mark.parametrize("kind", ["both", "load"])
def test_two_threads_share_the_work(kind: str) -> None:
    stored = 4000
    meeting = meeting_of(0, stored, kind)
    owners: list[str | None] = [None] * stored

    def load() -> None:
        begin = 0
        while begin < stored and meeting.claim_next():
            owners[begin : begin + BLOCK_SIZE] = ["load"] * BLOCK_SIZE
            meeting.wrote(begin, begin + BLOCK_SIZE, Tier.DRAM)
            begin += BLOCK_SIZE
        begin = stored - BLOCK_SIZE
        while meeting.claim_previous(begin):
            assert owners[begin : begin + BLOCK_SIZE] == [None] * BLOCK_SIZE
            owners[begin : begin + BLOCK_SIZE] = ["load"] * BLOCK_SIZE
            meeting.wrote(begin, begin + BLOCK_SIZE, Tier.DRAM)
            begin -= BLOCK_SIZE

    loader = threading.Thread(target=load)
    loader.start()
    position = num_computed = 0
    while not meeting.turn():
        pass
    while position < stored:
        while (found := meeting.take(position)) is not None:
            position = found.end
        count = meeting.claim_front(10)
        assert owners[position : position + count] == [None] * count
        owners[position : position + count] = ["compute"] * count
        position, num_computed = position + count, num_computed + count
        meeting.meet(position)
    loader.join()
    assert None not in owners
    assert num_computed == owners.count("compute")
