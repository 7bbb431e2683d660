"""Time goes on whatever the clock does."""

from cache.steady_clock import SteadyClock
from tests.cache.stores import Clock


def test_jumps_back_count_as_no_time_and_forward_as_they_are() -> None:
    source = Clock()
    clock = SteadyClock(source)
    assert (clock(), repr(clock)) == (1000.0, "<SteadyClock 1000.000>")
    source.now -= 3600.0
    assert clock() == 1000.0
    source.now += 5.0
    assert clock() == 1005.0, "what waits for 5 s has waited 5 s"
    source.now += 86_400.0
    assert clock() == 87_405.0
