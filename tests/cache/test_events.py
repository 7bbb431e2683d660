"""The event log: readers resume from a number, or get a snapshot and lose nothing."""

import threading
import time

from hypothesis import given
from hypothesis import strategies as st

from cache.events import Event, EventLog, ExtentRemoved, ExtentStored, Tier


class Ledger:
    """The smallest thing that has holdings: what is stored, told to a log."""

    def __init__(self, capacity: int = 4096, epoch: str = "one") -> None:
        self.held: set[str] = set()
        self.log = EventLog("node", epoch, self.snapshot, capacity)

    def snapshot(self) -> list[Event]:
        return [ExtentStored(extent_id, Tier.DRAM, b"") for extent_id in sorted(self.held)]

    def store(self, extent_id: str) -> None:
        self.held.add(extent_id)
        self.log.append(ExtentStored(extent_id, Tier.DRAM, b""))

    def remove(self, extent_id: str) -> None:
        self.held.discard(extent_id)
        self.log.append(ExtentRemoved(extent_id, Tier.DRAM))


class Reader:
    """Follows a log as a mirror does."""

    def __init__(self) -> None:
        self.epoch: str | None = None
        self.number = 0
        self.held: set[str] = set()
        self.num_snapshots = 0

    def follow(self, log: EventLog, wait_s: float = 0.0) -> int:
        batch = log.read(self.epoch, self.number, wait_s)
        if batch.is_snapshot:
            self.held.clear()
            self.num_snapshots += 1
        for event in batch.events:
            if isinstance(event, ExtentStored):
                self.held.add(event.extent_id)
            elif isinstance(event, ExtentRemoved):
                self.held.discard(event.extent_id)
        self.epoch, self.number = batch.epoch, batch.next_number
        return len(batch.events)


def test_a_new_reader_gets_a_snapshot_and_then_only_what_follows() -> None:
    ledger, reader = Ledger(), Reader()
    ledger.store("a")
    assert reader.follow(ledger.log) == 1
    ledger.store("b")
    ledger.remove("a")
    assert reader.follow(ledger.log) == 2
    assert reader.follow(ledger.log) == 0
    assert reader.held == {"b"}
    assert reader.num_snapshots == 1


def test_a_reader_resumes_from_any_number_that_is_kept() -> None:
    ledger = Ledger()
    for name in "abcde":
        ledger.store(name)
    for number in range(6):
        batch = ledger.log.read("one", number)
        assert not batch.is_snapshot
        assert [e.extent_id for e in batch.events if isinstance(e, ExtentStored)] == list("abcde")[number:]


def test_a_reader_that_fell_behind_gets_a_snapshot() -> None:
    ledger, reader = Ledger(capacity=3), Reader()
    reader.follow(ledger.log)
    for name in "abc":
        ledger.store(name)
    reader.follow(ledger.log)
    assert reader.num_snapshots == 1, "three events are still kept"
    for name in "defg":
        ledger.store(name)
    reader.follow(ledger.log)
    assert reader.num_snapshots == 2
    assert reader.held == set("abcdefg")


def test_another_epoch_or_a_number_from_the_future_gives_a_snapshot() -> None:
    ledger = Ledger(epoch="two")
    ledger.store("a")
    assert ledger.log.read("one", 1).is_snapshot
    assert ledger.log.read("two", 9).is_snapshot
    assert ledger.log.read(None, 0).is_snapshot
    assert not ledger.log.read("two", 1).is_snapshot


def test_a_waiting_reader_wakes_with_the_first_event() -> None:
    ledger, reader = Ledger(), Reader()
    reader.follow(ledger.log)
    follower = threading.Thread(target=reader.follow, args=(ledger.log, 30.0))
    started = time.monotonic()
    follower.start()
    ledger.store("a")
    follower.join(20.0)
    assert not follower.is_alive()
    assert time.monotonic() - started < 20.0
    assert reader.held == {"a"}


def test_waiting_ends_without_an_event_too() -> None:
    ledger, reader = Ledger(), Reader()
    reader.follow(ledger.log)
    assert reader.follow(ledger.log, wait_s=0.01) == 0


@given(st.lists(st.tuples(st.sampled_from(["store", "remove", "read"]), st.sampled_from("abcd"))), st.integers(1, 5))
def test_a_reader_always_catches_up(steps: list[tuple[str, str]], capacity: int) -> None:
    ledger, reader = Ledger(capacity), Reader()
    for step, name in steps:
        if step == "read":
            reader.follow(ledger.log)
        else:
            getattr(ledger, step)(name)
    reader.follow(ledger.log)
    assert reader.held == ledger.held


def test_a_change_during_a_snapshot_is_not_lost() -> None:
    ledger, reader = Ledger(), Reader()

    def interrupted() -> list[Event]:
        before = ledger.snapshot()
        ledger.store("late")  # after the snapshot was made, before it is handed out
        return before

    log = ledger.log
    slow = EventLog("node", "one", interrupted)
    ledger.log = slow
    ledger.store("early")
    reader.follow(slow)
    reader.follow(slow)
    assert reader.held == {"early", "late"}
    assert repr(log) == "<EventLog node epoch=one next=0 kept=0>"
