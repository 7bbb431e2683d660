"""Engines share the machine's cores: each has its own, and those of neighbours that rest."""

import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from serving.engine.cores import (
    BACKGROUND_NICENESS,
    LOOK_INTERVAL_S,
    PATIENCE_S,
    Cores,
    Neighbours,
    begin_background_thread,
    num_threads_for,
)

LONG_S = 10 * PATIENCE_S


@pytest.mark.parametrize(
    ("num_own", "num_cores", "rested_s", "expected"),
    [
        (1, 2, [], 2),
        (1, 2, [0.0], 1),
        (1, 2, [PATIENCE_S / 2], 1),
        (1, 2, [LONG_S], 2),
        (1, 2, [LONG_S, 0.0], 1),
        (2, 8, [0.0, LONG_S, LONG_S], 4),
        (2, 8, [0.0, 0.0, 0.0], 2),
        (3, 8, [0.0, 0.0, 0.0], 3),
        (4, 2, [0.0], 4),
    ],
)
def test_those_that_work_share_the_machine(num_own: int, num_cores: int, rested_s: list[float], expected: int) -> None:
    assert num_threads_for(num_own, num_cores, rested_s) == expected


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@contextmanager
def two_neighbours(directory: Path, clock: Clock) -> Iterator[tuple[Neighbours, Neighbours]]:
    one, other = Neighbours(directory, "one", clock), Neighbours(directory, "other", clock)
    try:
        yield one, other
    finally:
        one.close()
        other.close()
        assert not directory.exists()


def test_a_neighbour_is_seen_to_work_and_to_rest(tmp_path: Path) -> None:
    clock = Clock()
    with two_neighbours(tmp_path / "cores", clock) as (one, other):
        assert one.rested_s() == [clock.now], "it has never worked"
        other.work()
        other.work()
        assert one.rested_s() == [0.0]
        assert one.rested_s() == [0.0]
        other.rest()
        other.rest()
        assert one.rested_s() == pytest.approx([0.0], abs=1e-3)
        clock.now += 0.5
        assert one.rested_s() == pytest.approx([0.5], abs=1e-3)
        one.work()
        assert other.rested_s() == [0.0]
        assert one.rested_s() == pytest.approx([0.5], abs=1e-3), "one's own work is no neighbour's"


def test_neighbours_come_and_go(tmp_path: Path) -> None:
    clock = Clock()
    with two_neighbours(tmp_path / "cores", clock) as (one, _):
        one.rested_s()
        third = Neighbours(tmp_path / "cores", "third", clock)
        third.work()
        clock.now += LOOK_INTERVAL_S
        assert min(one.rested_s()) == 0.0
        assert len(one.rested_s()) == 2
        third.close()
        assert 0.0 not in one.rested_s(), "its lock has gone at once"
        clock.now += LOOK_INTERVAL_S
        assert len(one.rested_s()) == 1


def _work_and_die(directory: Path, is_working: Any, never: Any) -> None:
    neighbours = Neighbours(directory, "dying")
    neighbours.work()
    is_working.set()
    never.wait()


def test_a_neighbour_that_is_killed_rests(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    is_working, never = context.Event(), context.Event()
    clock = Clock()
    one = Neighbours(tmp_path, "one", clock)
    process = context.Process(target=_work_and_die, args=(tmp_path, is_working, never))
    process.start()
    try:
        assert is_working.wait(180)
        assert one.rested_s() == [0.0]
    finally:
        process.kill()
        process.join()
        process.close()
    assert one.rested_s() == [clock.now]
    one.close()


def test_threads_follow_the_neighbours(tmp_path: Path) -> None:
    clock, applied = Clock(), list[int]()
    with two_neighbours(tmp_path / "cores", clock) as (mine, other):
        cores = Cores(1, 2, mine, applied.append)
        cores.begin_step()
        cores.begin_step()
        assert applied == [2], "the other one rests"
        other.work()
        cores.begin_step()
        assert applied == [2, 1], "given back at the next step"
        other.rest()
        cores.begin_step()
        clock.now += PATIENCE_S / 2
        cores.begin_step()
        assert applied == [2, 1], "it may go on at once"
        clock.now += PATIENCE_S
        cores.begin_step()
        assert applied == [2, 1, 2]
        assert other.rested_s() == [0.0], "this one works"
        cores.rest()
        clock.now += LONG_S
        assert other.rested_s() == pytest.approx([LONG_S], abs=1e-3)


def test_without_neighbours_the_own_threads_are_all() -> None:
    applied = list[int]()
    cores = Cores(3, apply=applied.append)
    cores.begin_step()
    cores.rest()
    cores.begin_step()
    cores.close()
    assert applied == [3]
    assert repr(cores) == "<Cores 3 threads, 3 of its own>"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads have no niceness of their own elsewhere")
def test_a_background_thread_gives_way_and_the_others_do_not() -> None:
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = niceness()
    with ThreadPoolExecutor(1, initializer=begin_background_thread) as pool:
        assert pool.submit(niceness).result() == min(19, before + BACKGROUND_NICENESS)
        assert pool.submit(torch.get_num_threads).result() == 1
    assert niceness() == before
