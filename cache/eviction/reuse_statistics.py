"""How likely an extent is used again next, learned from a sample of all uses.

For a sample of extents, in the tier or not, it is noted how long after one use the next one comes. From that
follows, for each group of extents, the hazard: the chance that an extent, unused for so long, is used now.

    hazard of a group at an age = number of uses after that age / time that the group's extents spent at that age

Counting the time spent makes extents count whose next use is not known yet, so nothing has to be waited for. The
sample goes on after an extent has left the tier: what eviction itself cuts off would be missing otherwise.

Time is counted in uses of the tier's extents. What was learned fades with a half-life.
"""

from collections import OrderedDict

NUM_AGES = 24
_FIRST_AGE = 16
BOUNDS = (0, *(_FIRST_AGE << k for k in range(NUM_AGES)))
"""Age `a` covers `BOUNDS[a]` up to `BOUNDS[a + 1]`."""
WIDTHS = tuple(BOUNDS[age + 1] - BOUNDS[age] for age in range(NUM_AGES))

SAMPLE_SIZE = 8192
"""Extents that are followed, at most."""
HORIZON = 4
"""They are followed for so many uses per extent in the tier."""
_HALF_LIFE = 400_000
_PRIOR_USES = 20.0
"""A group is taken to behave like all extents together until it has shown about so many uses."""
_PRIOR_ODDS = 0.1
"""And all together like this before anything was seen: a tenth is used again while its age doubles."""
_SWEEP_EVERY = 16


class ReuseStatistics:
    """See the module's docstring."""

    def __init__(self, num_groups: int) -> None:
        self._uses = [[0.0] * NUM_AGES for _ in range(num_groups)]
        self._time = [[0.0] * NUM_AGES for _ in range(num_groups)]
        self._followed: dict[int, _Followed] = {}
        self._by_age: tuple[OrderedDict[int, _Followed], ...] = tuple(OrderedDict() for _ in range(NUM_AGES))
        self._sampled_below = 1 << 32
        self._faded_at = 0

    def __repr__(self) -> str:
        return f"<ReuseStatistics {len(self._followed)} followed, {self._sampled_below / 2**32:.3g} of all>"

    def use(self, digest: int, group: int, now: int, num_extents: int) -> None:
        """An extent is used at `now` and belongs to `group` from here on; the tier holds `num_extents`."""
        if now % _SWEEP_EVERY == 0:
            self._sweep(now)
        if digest >= self._sampled_below:
            return
        followed = self._followed.pop(digest, None)
        if followed is not None:
            self._forget(digest, followed, now, is_used=True)
        self._followed[digest] = self._by_age[0][digest] = _Followed(now, group)
        if len(self._followed) > SAMPLE_SIZE:
            self._make_room(now, HORIZON * num_extents)

    def _forget(self, digest: int, followed: "_Followed", now: int, *, is_used: bool) -> None:
        age, time = followed.age, self._time[followed.group]
        del self._by_age[age][digest]
        while age < NUM_AGES - 1 and now - followed.since >= BOUNDS[age + 1]:
            time[age] += WIDTHS[age]
            age += 1
        time[age] += now - followed.since - BOUNDS[age]
        if is_used:
            self._uses[followed.group][age] += 1.0

    def _make_room(self, now: int, horizon: int) -> None:
        """Forget the one followed longest, or, if that is not long enough, follow half as many."""
        oldest = next(extents for extents in reversed(self._by_age) if extents)
        digest, followed = next(iter(oldest.items()))
        if now - followed.since > horizon:
            del self._followed[digest]
            self._forget(digest, followed, now, is_used=False)
            return
        self._sampled_below >>= 1
        for digest in [digest for digest in self._followed if digest >= self._sampled_below]:
            followed = self._followed.pop(digest)
            self._forget(digest, followed, now, is_used=False)

    def _sweep(self, now: int) -> None:
        """Book the time of those that have got older than the age that they were at."""
        for age in range(NUM_AGES - 1):
            extents, older = self._by_age[age], self._by_age[age + 1]
            while extents:
                digest, followed = next(iter(extents.items()))
                if now - followed.since < BOUNDS[age + 1]:
                    break
                del extents[digest]
                self._time[followed.group][age] += WIDTHS[age]
                followed.age = age + 1
                older[digest] = followed

    def fade(self, now: int) -> None:
        """Let what was learned long ago count for less."""
        kept = 0.5 ** ((now - self._faded_at) / _HALF_LIFE)
        self._faded_at = now
        for table in (self._uses, self._time):
            for row in table:
                row[:] = [value * kept for value in row]

    def hazards(self) -> list[list[float]]:
        """Chance of a use per unit of time, for each group and age.

        It never rises with age: where it seems to, both ages get their mean. Nor does it fall from a group to the next
        one, whose extents were used more often, as an ancestor always was: it has to outlive its descendants. A group
        with few uses is drawn towards all groups together.
        """
        everything = [
            (sum(uses[age] for uses in self._uses), sum(time[age] for time in self._time)) for age in range(NUM_AGES)
        ]
        middles = ((BOUNDS[age] + BOUNDS[age + 1]) / 2 for age in range(NUM_AGES))
        common = [
            (uses + _PRIOR_USES) / (time + _PRIOR_USES * middle / _PRIOR_ODDS)
            for (uses, time), middle in zip(everything, middles, strict=True)
        ]
        found: list[list[float]] = []
        for uses_of, time_of in zip(self._uses, self._time, strict=True):
            times = [time + _PRIOR_USES / hazard for time, hazard in zip(time_of, common, strict=True)]
            rates = _never_rising([uses + _PRIOR_USES for uses in uses_of], times)
            found.append([max(pair) for pair in zip(rates, found[-1], strict=True)] if found else rates)
        return found


class _Followed:
    """An extent of the sample: when it was last used, its group then, the age up to which its time is booked."""

    __slots__ = ("age", "group", "since")

    def __init__(self, since: int, group: int) -> None:
        self.since = since
        self.group = group
        self.age = 0


def _never_rising(uses: list[float], times: list[float]) -> list[float]:
    """Rates `uses / times`, neighbours pooled until no rate is above the one before it (isotonic regression)."""
    pools: list[tuple[float, float, int]] = []
    for use, time in zip(uses, times, strict=True):
        pool = (use, time, 1)
        while pools and pool[0] * pools[-1][1] > pools[-1][0] * pool[1]:
            before = pools.pop()
            pool = (before[0] + pool[0], before[1] + pool[1], before[2] + pool[2])
        pools.append(pool)
    return [use / time for use, time, number in pools for _ in range(number)]
