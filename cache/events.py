"""What a node store tells the routers: numbered events under an epoch.

A reader keeps `(epoch, next_number)` and asks for what came after. After a restart of the node store the
epoch differs, and after a long pause the number is too old: in both cases it gets a snapshot instead.
Holdings travel as whole extents with packed hashes, never as one object per block.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal


class Tier(StrEnum):
    """A place where blocks live, fastest first."""

    DEVICE = "device"
    DRAM = "dram"
    DISK = "disk"


@dataclass(frozen=True, slots=True)
class ExtentStored:
    """An extent can now be read from `tier` (dram or disk) of the node."""

    extent_id: str
    tier: Tier
    block_hashes: bytes
    """Packed hashes of its blocks; a partial tail has one, its own."""


@dataclass(frozen=True, slots=True)
class ExtentRemoved:
    """An extent has left `tier` of the node."""

    extent_id: str
    tier: Tier


@dataclass(frozen=True, slots=True)
class DeviceBlocks:
    """Change of the blocks in one engine's pool (its device tier)."""

    replica_id: str
    added: bytes
    removed: bytes


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """What one engine has to do and how fast it does it."""

    replica_id: str
    role: Literal["prefill", "decode"]
    num_running: int
    num_waiting: int
    queued_prefill_tokens: int
    """Prompt tokens accepted and not yet computed."""
    prefill_tokens_per_s: float
    """Measured, of the first tokens of a prompt; 0 before the first prefill."""
    decode_step_s: float
    """Measured time of one decode step; 0 before the first."""
    load_bytes_per_s: tuple[tuple[Tier, float], ...] = ()
    """Measured bandwidth of loading from each tier, for those that were used."""
    prefill_s_per_position: float = 0.0
    """Measured: what a token takes longer for each token before it, in seconds; 0 before the first prefill."""


@dataclass(frozen=True, slots=True)
class ReplicaGone:
    """An engine has left the node: forget its device blocks and its load."""

    replica_id: str


Event = ExtentStored | ExtentRemoved | DeviceBlocks | ReplicaLoad | ReplicaGone


@dataclass(frozen=True, slots=True)
class EventBatch:
    """An answer to `EventLog.read`."""

    node_id: str
    epoch: str
    next_number: int
    """Number to ask for next."""
    is_snapshot: bool
    """True: forget all that was known of this node, then apply `events`."""
    events: tuple[Event, ...]


class EventLog:
    """A bounded log of events with a snapshot for readers that are too far behind.

    `snapshot` is called without the log's lock and must return the whole present state as events.
    Events that are already part of a snapshot may be repeated after it; applying one twice is harmless.
    """

    def __init__(
        self,
        node_id: str,
        epoch: str,
        snapshot: Callable[[], list[Event]],
        capacity: int = 4096,
    ) -> None:
        self.node_id = node_id
        self.epoch = epoch
        self._snapshot = snapshot
        self._events: deque[Event] = deque(maxlen=capacity)
        self._next_number = 0
        self._changed = threading.Condition()

    def __repr__(self) -> str:
        return f"<EventLog {self.node_id} epoch={self.epoch} next={self._next_number} kept={len(self._events)}>"

    def append(self, event: Event) -> None:
        with self._changed:
            self._events.append(event)
            self._next_number += 1
            self._changed.notify_all()

    def read(self, epoch: str | None, number: int, wait_s: float = 0.0) -> EventBatch:
        """Events from `number` on, waiting up to `wait_s` for the first; a snapshot if they can't be had."""
        deadline = time.monotonic() + wait_s
        with self._changed:
            while epoch == self.epoch and number == self._next_number:
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            next_number = self._next_number
            oldest = next_number - len(self._events)
            if epoch == self.epoch and oldest <= number <= next_number:
                events = tuple(self._events)[number - oldest :]
                return EventBatch(self.node_id, self.epoch, next_number, False, events)
        # `next_number` was read before the snapshot, so nothing can fall between the two.
        return EventBatch(self.node_id, self.epoch, next_number, True, tuple(self._snapshot()))
