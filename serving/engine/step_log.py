"""When an engine's last steps began and ended, and how large they were: what benches and the curious look at.

Times are of the monotonic clock, which all processes of one machine share. Written by the step loop, read by any
thread. It holds the newest steps alone and is never sent anywhere by itself.
"""

import threading
from collections import deque
from dataclasses import dataclass
from itertools import takewhile

MAX_STEPS = 8192
"""Minutes of decoding."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step of the loop, from its planning's end until its tokens were sampled."""

    began_at: float
    ended_at: float
    num_sequences: int
    num_tokens: int
    """As many as sequences if the step only decoded; none if it only sampled, from logits that were handed off."""

    @property
    def seconds(self) -> float:
        return self.ended_at - self.began_at

    @property
    def is_decode(self) -> bool:
        return self.num_tokens == self.num_sequences


class StepLog:
    """See the module's docstring."""

    def __init__(self, max_steps: int = MAX_STEPS) -> None:
        self._steps: deque[StepRecord] = deque(maxlen=max_steps)
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<StepLog {len(self._steps)} steps>"

    def note(self, step: StepRecord) -> None:
        """The newest step; an old one is forgotten for it."""
        with self._lock:
            self._steps.append(step)

    def since(self, at: float) -> tuple[StepRecord, ...]:
        """Steps that ended after `at`, in order."""
        with self._lock:
            newest_first = list(takewhile(lambda step: step.ended_at > at, reversed(self._steps)))
        return tuple(reversed(newest_first))
