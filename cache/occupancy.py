"""Who takes how much room in which tier: the byte budgets, and how extents leave to keep them.

Pure bookkeeping, part of the ledger (`cache.ledger`), whose invariants hold here.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from cache.events import Event, ExtentRemoved, ExtentStored, Tier
from cache.extent_tree import Extent
from cache.holdings import Holdings
from cache.locked import LockedExtent


@dataclass(frozen=True, slots=True)
class Budgets:
    """Hard limits in bytes of images, and how much one offer may reserve at once."""

    dram_bytes: int
    disk_bytes: int
    """0: no disk tier."""
    handoff_bytes: int
    extent_max_bytes: int = 16 << 20
    max_extents_per_grant: int = 4
    dirty_bytes: int | None = None
    """Most that waits to be written; beyond it new extents stay in dram only. None: no bound but dram's."""


class Drop(NamedTuple):
    """To be done by the caller: forget the extent's image in `tier`."""

    extent_id: str
    tier: Tier


class Occupancy:
    """Bytes of images in each tier, within the budgets."""

    def __init__(self, budgets: Budgets, held: Holdings, publish: Callable[[Event], None]) -> None:
        self.budgets = budgets
        self.held = held
        self.disk_accepts_writes = budgets.disk_bytes > 0
        self.counters: Counter[str] = Counter()
        self.used_bytes = {Tier.DRAM: 0, Tier.DISK: 0}
        self.handoff_bytes = 0
        self.dirty: OrderedDict[str, Extent] = OrderedDict()
        """To be written, in this order."""
        self.writing: dict[str, Extent] = {}
        self.unsettled: dict[str, Extent] = {}
        """Handoffs without readers that found no room in the cache yet."""
        self.locked: dict[str, LockedExtent] = {}
        """On disk, but encrypted with a key that is not here, oldest first, by name: they go before all others."""
        self._publish = publish

    @property
    def dirty_bytes(self) -> int:
        return sum(extent.image_bytes for extent in (*self.dirty.values(), *self.writing.values()))

    def announce(self, extent: Extent, tier: Tier) -> None:
        """Tell the routers that it can be read from a tier."""
        if not extent.is_transient:
            self._publish(ExtentStored(extent.extent_id, tier, extent.header.packed_hashes))

    def make_room(self, tier: Tier, num_bytes: int, keep: set[Extent] | None = None) -> list[Drop] | None:
        """Evict until `num_bytes` more fit in `tier`; None, and nothing changed, if they can't.

        `keep` may go from dram to disk, but not further.
        """

        def may_evict(extent: Extent) -> bool:
            is_kept = keep is not None and extent in keep
            if extent.num_leases or (is_kept and not (tier is Tier.DRAM and extent.on_disk)):
                return False
            if tier is Tier.DRAM:
                return not extent.is_handoff and self.may_leave_dram(extent)
            return not extent.is_promoting

        budget = self.budgets.dram_bytes if tier is Tier.DRAM else self.budgets.disk_bytes
        needed_bytes = self.used_bytes[tier] + num_bytes - budget
        locked = self._pick_locked(needed_bytes) if tier is Tier.DISK else []
        picked = self.held.pick_victims(tier, needed_bytes - sum(each.image_bytes for each in locked), may_evict)
        if picked is None:
            return None
        if picked or locked:
            self.counters[f"evicted_{tier.value}_extents"] += len(picked) + len(locked)
        drops = [self.leave_locked(each) for each in locked]
        return drops + [drop for extent in picked for drop in self.leave(extent, tier)]

    def _pick_locked(self, num_bytes: int) -> list[LockedExtent]:
        """For `num_bytes`, or all of them."""
        picked: list[LockedExtent] = []
        for each in self.locked.values() if num_bytes > 0 else ():
            picked.append(each)
            num_bytes -= each.image_bytes
            if num_bytes <= 0:
                break
        return picked

    def enter_locked(self, locked: Iterable[LockedExtent]) -> None:
        """They are on disk."""
        for each in locked:
            self.locked[each.name] = each
            self.used_bytes[Tier.DISK] += each.image_bytes

    def leave_locked(self, locked: LockedExtent) -> Drop:
        """Take it from the disk."""
        del self.locked[locked.name]
        self.used_bytes[Tier.DISK] -= locked.image_bytes
        return Drop(locked.name, Tier.DISK)

    def may_leave_dram(self, extent: Extent) -> bool:
        """It is durable, or was refused by the disk, or is worthless."""
        if extent.is_writing:
            return False
        return extent.is_superseded or not extent.needs_write or not self.disk_accepts_writes

    def leave(self, extent: Extent, tier: Tier) -> list[Drop]:
        """Take an extent out of a tier, and forget it if that was the last."""
        extent_id = extent.extent_id
        self.held.policies[tier].remove(extent_id)
        if tier is Tier.DRAM:
            self.discharge_dram(extent)
            extent.in_dram = extent.needs_write = False
            self.dirty.pop(extent_id, None)
            self.unsettled.pop(extent_id, None)
        else:
            self.used_bytes[Tier.DISK] -= extent.image_bytes
            extent.on_disk = False
        if not extent.is_transient:
            self._publish(ExtentRemoved(extent_id, tier))
        if not (extent.is_readable or extent.is_writing or extent.is_promoting):
            self.held.remove(extent)
        return [Drop(extent_id, tier)]

    def charge_dram(self, extent: Extent) -> None:
        """Its bytes are in dram, or on their way."""
        if extent.is_handoff:
            self.handoff_bytes += extent.image_bytes
        else:
            self.used_bytes[Tier.DRAM] += extent.image_bytes

    def discharge_dram(self, extent: Extent) -> None:
        """Whatever comes into dram later is no handoff any more."""
        if extent.is_handoff:
            self.handoff_bytes -= extent.image_bytes
            extent.is_handoff = False
        else:
            self.used_bytes[Tier.DRAM] -= extent.image_bytes

    def check_integrity(self) -> None:
        """Raise AssertionError if a sum is off."""
        in_dram = [e for e in self.held if e.takes_room_in(Tier.DRAM)]
        handoff = sum(e.image_bytes for e in in_dram if e.is_handoff)
        dram = sum(e.image_bytes for e in in_dram if not e.is_handoff)
        disk = sum(e.image_bytes for e in self.held if e.takes_room_in(Tier.DISK))
        disk += sum(each.image_bytes for each in self.locked.values())
        assert (handoff, dram, disk) == (self.handoff_bytes, self.used_bytes[Tier.DRAM], self.used_bytes[Tier.DISK])
        assert dram <= self.budgets.dram_bytes
        assert disk <= self.budgets.disk_bytes
        assert handoff <= self.budgets.handoff_bytes
        assert set(self.writing.values()) == {e for e in self.held if e.is_writing}
        waiting = {e for e in self.held if e.needs_write and not e.is_writing}
        assert set(self.dirty.values()) == waiting, "what needs writing and what is queued disagree"
        assert all(e.is_handoff and e.in_dram for e in self.unsettled.values())
