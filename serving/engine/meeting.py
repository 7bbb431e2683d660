"""Where loading and computing of one prompt meet: shared by the step loop and one thread of the loader.

    in turn          | loaded >>>>                                                | end
    from both ends   | computed or being computed |        gap       <<<< loaded  | end

A load begins in the order of the prompt, as disks like it best, and is all there is to a plan that only loads. Once
it is *turned*, it comes from the back while the step loop computes from the front. Whoever wants a block claims it
first, and neither side ever touches one that the other has claimed: so no token is computed and loaded, and the
step loop may go on with a sequence while the load that it has met is still ending.

This is bookkeeping only: it never touches a block or a clock.
"""

import threading
from dataclasses import dataclass, field

from cache.events import Tier
from serving.protocol import LoadPlan


@dataclass(slots=True)
class LoadedRange:
    """Consecutive tokens whose KV has been loaded."""

    begin: int
    end: int
    by_tier: dict[Tier, int] = field(default_factory=dict)

    def add(self, begin: int, end: int, tier: Tier) -> None:
        """Take in a block at one of the ends."""
        self.begin, self.end = min(self.begin, begin), max(self.end, end)
        self.by_tier[tier] = self.by_tier.get(tier, 0) + end - begin


class Meeting:
    """See the module's docstring. Numbers are positions in the prompt, in tokens."""

    def __init__(self, front: int, end: int, block_size: int, began_at: float) -> None:
        """Tokens before `front` are in the pool; those before `end` may come from the store."""
        self.began_at = began_at
        self._block_size = block_size
        self._lock = threading.Lock()
        self._front = front
        """Tokens before it are there, or are being computed."""
        self._floor = front // block_size * block_size
        """The load writes no block that begins before it."""
        self._end = end
        self._plan: LoadPlan | None = None
        self._planned_at = began_at
        self._growing: LoadedRange | None = None
        self._grown: list[LoadedRange] = []
        """Ranges that do not grow any more and that the front has not reached."""
        self._writing: int | None = None
        """Begin of the block that is being written now."""
        self._num_loaded = 0
        self._is_turned = False
        self._is_stopped = False

    def __repr__(self) -> str:
        with self._lock:
            direction = "from both ends" if self._is_turned else "in turn"
            return f"<Meeting {direction}, computed to {self._front}, loaded from {self._back()} of {self._end}>"

    # -- called by the loader -----------------------------------------------------------------------

    def begin_load(self, plan: LoadPlan, end: int, now: float) -> None:
        """It is known what is stored, namely everything before `end`, and what is to be done about it."""
        with self._lock:
            self._plan = plan
            self._planned_at = now
            self._end = max(self._front, min(self._end, end))
            self._is_turned = self._is_turned or plan.kind == "both"

    def claim_next(self) -> bool:
        """May the next block in turn be written? False if the load is to turn or to stop."""
        with self._lock:
            if self._is_turned or self._is_stopped:
                return False
            self._writing = self._floor
            return True

    def claim_previous(self, begin: int) -> bool:
        """May the block that begins at `begin` be written, coming from the back? False if the load is to stop."""
        with self._lock:
            if self._is_stopped or begin < self._floor or self._back() <= self._front:
                return False
            self._writing = begin
            return True

    def wrote(self, begin: int, end: int, tier: Tier) -> None:
        """A claimed block is whole. It may end before the front: a store that lost a block may have a shorter tail."""
        with self._lock:
            self._writing = None
            begin = max(begin, self._front)
            if begin >= end:
                return
            if self._growing is None:
                self._growing = LoadedRange(begin, end)
            self._growing.add(begin, end, tier)
            self._num_loaded += end - begin
            if not self._is_turned:
                self._front = end
                self._floor = end // self._block_size * self._block_size

    def gap(self) -> tuple[int, int] | None:
        """Tokens that neither side has got to yet; None if the load is to stop or nothing is left for it."""
        with self._lock:
            back = self._back()
            return None if self._is_stopped or back <= max(self._front, self._floor) else (self._front, back)

    def begin_pass(self) -> None:
        """What comes now may leave a gap before what has come until now."""
        with self._lock:
            self._close()

    # -- called by the step loop --------------------------------------------------------------------

    @property
    def plan(self) -> LoadPlan | None:
        """None until the store has answered."""
        return self._plan

    @property
    def planned_at(self) -> float:
        return self._planned_at

    @property
    def is_turned(self) -> bool:
        return self._is_turned

    @property
    def num_loaded(self) -> int:
        """Tokens that the load has brought so far."""
        return self._num_loaded

    @property
    def is_over(self) -> bool:
        """The load brings no more."""
        return self._is_stopped

    @property
    def back(self) -> int:
        """Computing from the front must not go beyond."""
        with self._lock:
            return self._back()

    def turn(self) -> bool:
        """Have the load come from the back from now on; False while a block is being written, then ask again."""
        with self._lock:
            if not self._is_turned and self._writing is None:
                self._is_turned = True
                self._close()
            return self._is_turned

    def claim_front(self, num_tokens: int) -> int:
        """Claim up to `num_tokens` behind the front to be computed; returns how many it are."""
        with self._lock:
            num_tokens = max(0, min(num_tokens, self._back() - self._front))
            if num_tokens and self._is_turned:
                self._front += num_tokens
                self._floor = -(-self._front // self._block_size) * self._block_size
                return num_tokens
            return 0

    def meet(self, front: int) -> bool:
        """Whether everything before the back has been computed; then the load brings no more."""
        with self._lock:
            if self._writing is None and front >= self._back():
                self._is_stopped = True
                self._close()
            return self._is_stopped

    def stop(self) -> None:
        """Have the load bring no more. A block that is being written is still written."""
        with self._lock:
            self._is_stopped = True

    def end_load(self) -> None:
        """The load has ended: what it has brought may be taken, and all before that is for the front."""
        with self._lock:
            self._is_stopped = self._is_turned = True
            self._writing = None
            self._close()
            self._end = max((loaded.end for loaded in self._grown), default=self._front)

    def take(self, front: int) -> LoadedRange | None:
        """What has been loaded right behind `front`, if it is whole. Each range is given once."""
        with self._lock:
            for loaded in self._grown:
                if loaded.begin <= front < loaded.end:
                    self._grown.remove(loaded)
                    self._front = max(self._front, loaded.end)
                    return loaded
            return None

    @property
    def has_more(self) -> bool:
        """Whether something loaded has not been taken yet."""
        return bool(self._grown)

    # -- with the lock held -------------------------------------------------------------------------

    def _close(self) -> None:
        if self._growing is not None:
            self._grown.append(self._growing)
            self._growing = None

    def _back(self) -> int:
        begins = [loaded.begin for loaded in self._grown if loaded.end > self._front]
        if self._is_turned and self._growing is not None:
            begins.append(self._growing.begin)
        if self._writing is not None:
            begins.append(self._writing)
        return min(begins, default=self._end)
