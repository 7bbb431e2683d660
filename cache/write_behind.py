"""What is written, recovered and promoted next: the ledger's side of the disk tier.

Pure bookkeeping, part of the ledger (`cache.ledger`), whose invariants hold here.
"""

from collections.abc import Collection, Iterable

from cache.events import Tier
from cache.extent import ExtentHeader
from cache.extent_tree import Extent
from cache.locked import LockedExtent
from cache.occupancy import Drop, Occupancy


class WriteBehind:
    """Extents on their way to the disk and back."""

    def __init__(self, occupancy: Occupancy) -> None:
        self._occupancy = occupancy
        self._held = occupancy.held

    def enqueue(self, extent: Extent) -> None:
        """The extent has come into dram: have it written, unless too much waits already."""
        room, budgets = self._occupancy, self._occupancy.budgets
        if not budgets.disk_bytes or extent.is_transient:
            return
        if budgets.dirty_bytes is not None and room.dirty_bytes + extent.image_bytes > budgets.dirty_bytes:
            room.counters["dropped_writes"] += 1
            return
        extent.needs_write = True
        room.dirty[extent.extent_id] = extent

    def next_write(self) -> tuple[ExtentHeader | None, list[Drop]]:
        """The next extent to make durable, its disk bytes reserved, and what has to go first."""
        room = self._occupancy
        drops: list[Drop] = []
        while room.dirty and room.disk_accepts_writes:
            extent_id, extent = room.dirty.popitem(last=False)
            if extent.is_superseded:
                extent.needs_write = False
                drops += [] if extent.num_leases else room.leave(extent, Tier.DRAM)
                continue
            made = room.make_room(Tier.DISK, extent.image_bytes, keep=self._held.ancestors(extent))
            if made is None:
                extent.needs_write = False
                room.counters["dropped_writes"] += 1
                continue
            extent.is_writing = True
            room.used_bytes[Tier.DISK] += extent.image_bytes
            room.writing[extent_id] = extent
            return extent.header, drops + made
        return None, drops

    def written(self, extent_id: str) -> list[Drop]:
        """The extent is durable."""
        room = self._occupancy
        extent = room.writing.pop(extent_id)
        extent.is_writing = extent.needs_write = False
        if not extent.in_dram:  # its image was found bad or purged meanwhile: so is what was written
            room.used_bytes[Tier.DISK] -= extent.image_bytes
            self._held.remove(extent)
            return [Drop(extent_id, Tier.DISK)]
        extent.on_disk = True
        self._held.enter_tier(extent, Tier.DISK)
        room.announce(extent, Tier.DISK)
        room.counters["written_extents"] += 1
        return []

    def write_failed(self, extent_ids: Collection[str], *, retry: bool) -> None:
        """The disk refused these extents: keep them for later, or give up their durability."""
        room = self._occupancy
        for extent_id in reversed(list(extent_ids)):
            extent = room.writing.pop(extent_id)
            extent.is_writing = False
            room.used_bytes[Tier.DISK] -= extent.image_bytes
            if not extent.in_dram:
                self._held.remove(extent)
            elif retry:
                room.dirty[extent_id] = extent
                room.dirty.move_to_end(extent_id, last=False)
            else:
                extent.needs_write = False
                room.counters["dropped_writes"] += 1

    # -- what the folder holds --------------------------------------------------------------------------

    def recover(self, headers: Iterable[ExtentHeader], locked: Iterable[LockedExtent] = ()) -> list[Drop]:
        """Enter the extents that were found on disk, least recently used first; `locked` ones only take room.

        Drops those whose blocks lie in another one already, and what is over the budget.
        """
        room = self._occupancy
        extents = [Extent(header, header.image_bytes, on_disk=True) for header in headers]
        left_out = self._held.add_recovered(extents)
        entered = [extent for extent in extents if not extent.is_prepared]
        self._held.policies[Tier.DISK].restore((e.header.extent_id, e.header.shape.bytes_per_token) for e in entered)
        room.used_bytes[Tier.DISK] += sum(extent.image_bytes for extent in entered)
        room.enter_locked(locked)
        drops = [Drop(extent.extent_id, Tier.DISK) for extent in left_out]
        return drops + (room.make_room(Tier.DISK, 0) or [])

    def replace_disk(self, headers: Iterable[ExtentHeader], locked: Iterable[LockedExtent] = ()) -> list[Drop]:
        """Another folder is in the place of the one known: these extents are in it, and no others."""
        for extent in [e for e in self._held if e.on_disk]:
            self.discard(extent, Tier.DISK)
        for each in list(self._occupancy.locked.values()):
            self._occupancy.leave_locked(each)
        return self.recover(headers, locked)

    def discard(self, extent: Extent, tier: Tier) -> list[Drop]:
        """Forget an image, leased or not. One that is still in dram is written again."""
        drops = self._occupancy.leave(extent, tier)
        if extent.in_dram and not extent.needs_write:
            self.enqueue(extent)
        return drops

    # -- promoting ----------------------------------------------------------------------------------

    def prepare_promote(self, extent_id: str) -> list[Drop] | None:
        """Reserve dram for an extent on disk; None if it may not or need not come up."""
        extent = self._held.find(extent_id)
        if extent is None or extent.in_dram or extent.is_promoting or not extent.on_disk:
            return None
        drops = self._occupancy.make_room(Tier.DRAM, extent.image_bytes)
        if drops is None:
            return None
        extent.is_promoting = True
        self._occupancy.charge_dram(extent)
        return drops

    def complete_promote(self, extent_id: str, *, succeeded: bool) -> bool:
        """End what `prepare_promote` began. False if the image must not stay in dram.

        What was found bad or purged on disk meanwhile is no better in dram.
        """
        room = self._occupancy
        extent = self._held.find(extent_id)
        assert extent is not None and extent.is_promoting
        extent.is_promoting = False
        if succeeded and extent.on_disk:
            extent.in_dram = True
            self._held.enter_tier(extent, Tier.DRAM)
            room.announce(extent, Tier.DRAM)
            room.counters["promoted_extents"] += 1
            return True
        room.discharge_dram(extent)
        if not extent.on_disk:
            self._held.remove(extent)
        return False
