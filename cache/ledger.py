"""The node store's bookkeeping: budgets, leases and what is stored, written, promoted and evicted next.

Never touches a byte of KV, a file or a clock of its own: every method decides under the caller's lock and
returns what is to be done. States of an extent:

    prepared --complete--> in dram, needs_write --written--> in dram + on disk --evict--> on disk --evict--> gone
        |                          |
        +--abort / expiry--> gone  +--superseded or transient: dropped without ever being written

Invariants (`check_integrity`): the bytes charged to dram, handoff and disk are the sums over the extents
there and within the budgets; nothing leased is evicted; an extent is evicted from a tier only after its
descendants in that tier; a block leaves dram only if it is durable, was refused by the disk tier, or is
worthless.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from cache.events import Event, Tier
from cache.eviction import EvictionPolicy, LruPolicy
from cache.extent import ExtentHeader, chain_header, split_into_extents
from cache.extent_tree import Extent, Run
from cache.hashing import block_hash, pack_tokens
from cache.holdings import Holdings
from cache.locked import LockedExtent
from cache.messages import LoadQuery, PurgeQuery, PurgeReceipt, StoreOffer
from cache.occupancy import Budgets, Drop, Occupancy
from cache.write_behind import WriteBehind


@dataclass(slots=True)
class Lease:
    """What one owner reads, until when."""

    expires_at: float
    extents: dict[Extent, None] = field(default_factory=dict)


class StoreDecision(NamedTuple):
    """Outcome of `prepare_store`. With nothing granted, `is_busy` and `is_full` say whether waiting helps."""

    granted: list[ExtentHeader]
    drops: list[Drop]
    is_busy: bool = False
    is_full: bool = False
    is_too_big: bool = False
    """The next extent is larger than the whole budget: waiting won't help."""
    has_more: bool = False


@dataclass(slots=True)
class Purged:
    """Outcome of `purge`: what was deleted, and the drops that put it into effect."""

    receipt: PurgeReceipt
    extent_ids: list[str]
    drops: list[Drop]

    def add(self, extent: Extent) -> None:
        header = extent.header
        in_dram, on_disk = extent.image_bytes * extent.in_dram, extent.image_bytes * extent.on_disk
        self._count(header.extent_id, header.num_blocks, header.num_tokens, in_dram, on_disk)

    def add_locked(self, locked: LockedExtent) -> None:
        self._count(locked.name, locked.num_blocks, locked.num_tokens, 0, locked.image_bytes)

    def _count(self, extent_id: str, num_blocks: int, num_tokens: int, dram_bytes: int, disk_bytes: int) -> None:
        old = self.receipt
        self.extent_ids.append(extent_id)
        self.receipt = replace(
            old,
            num_extents=old.num_extents + 1,
            num_blocks=old.num_blocks + num_blocks,
            num_tokens=old.num_tokens + num_tokens,
            dram_bytes=old.dram_bytes + dram_bytes,
            disk_bytes=old.disk_bytes + disk_bytes,
            num_files=old.num_files + (disk_bytes > 0),
        )


class Ledger:
    """See the module's docstring. All methods must be called under one lock."""

    def __init__(
        self,
        budgets: Budgets,
        publish: Callable[[Event], None],
        make_policy: Callable[[], EvictionPolicy] = LruPolicy,
        lease_ttl_s: float = 60.0,
    ) -> None:
        self.budgets = budgets
        self.held = Holdings(make_policy)
        self.room = Occupancy(budgets, self.held, publish)
        self.disk = WriteBehind(self.room)
        self.counters = self.room.counters
        self._lease_ttl_s = lease_ttl_s
        self._leases: dict[str, Lease] = {}
        self._prepared: OrderedDict[str, Extent] = OrderedDict()

    def __repr__(self) -> str:
        used = self.room.used_bytes
        return (
            f"<Ledger {len(self.held)} extents, dram {used[Tier.DRAM]}/{self.budgets.dram_bytes}, "
            f"disk {used[Tier.DISK]}/{self.budgets.disk_bytes}, {len(self.room.dirty)} to write, "
            f"{len(self._leases)} leases>"
        )

    # -- reading ------------------------------------------------------------------------------------

    def prepare_load(self, query: LoadQuery, now: float) -> list[Run]:
        """Lease the longest stored continuation from `query.first_block` on to `query.owner`.

        Returns where it lies, in the order of the prompt and without gaps; nothing on a miss.
        """
        found, before = self.held.tree.match(
            query.root_hash, query.block_hashes, query.token_ids, query.block_size, query.first_block
        )
        if not found:
            self.counters["load_misses"] += 1
            return []
        self.counters["load_hits"] += 1
        self._lease(query.owner, (run.extent for run in found), now)
        self.held.note_use([*before, *found])
        return found

    def complete_load(self, owner: str) -> list[Drop]:
        """End all leases of `owner`."""
        self.held.settle_uses()
        drops: list[Drop] = []
        lease = self._leases.pop(owner, None)
        for extent in lease.extents if lease else ():
            extent.num_leases -= 1
            drops += self._settle(extent)
        return drops

    def renew_lease(self, owner: str, now: float) -> None:
        """A reader that still reads keeps what it has leased."""
        if owner in self._leases:
            self._leases[owner].expires_at = now + self._lease_ttl_s

    def _lease(self, owner: str, extents: Iterable[Extent], now: float) -> None:
        lease = self._leases.setdefault(owner, Lease(0.0))
        lease.expires_at = now + self._lease_ttl_s
        for extent in extents:
            if extent not in lease.extents:
                lease.extents[extent] = None
                extent.num_leases += 1

    # -- storing ------------------------------------------------------------------------------------

    def prepare_store(self, offer: StoreOffer, now: float) -> StoreDecision:
        """Reserve room for the blocks that are missing, in the order of the chain.

        A handoff's blocks that are stored already are leased to its owner too.
        """
        chain = self.held.tree.runs(offer.block_hashes)
        tail = self._missing_tail(offer, chain)
        if self._is_busy(offer, chain, tail):
            return StoreDecision([], [], is_busy=True)
        missing = self._missing(offer, chain) + ([tail] if tail else [])
        if offer.handoff_owner is not None and chain:
            handed = (run.extent for run in chain if run.end(offer.block_size) > offer.first_block)
            self._lease(offer.handoff_owner, handed, now)
        granted: list[ExtentHeader] = []
        drops: list[Drop] = []
        for header in missing[: self.budgets.max_extents_per_grant]:
            room = self._reserve(header, offer, chain, now)
            if room is None:
                break
            granted.append(header)
            drops += room
        is_full = bool(missing) and not granted
        is_too_big = is_full and missing[0].image_bytes > self._store_budget(offer)
        return StoreDecision(granted, drops, False, is_full, is_too_big, len(granted) < len(missing))

    def _store_budget(self, offer: StoreOffer) -> int:
        return self.budgets.dram_bytes if offer.handoff_owner is None else self.budgets.handoff_bytes

    def _is_busy(self, offer: StoreOffer, chain: list[Run], tail: ExtentHeader | None) -> bool:
        """Another writer makes some of the blocks."""
        if any(run.extent.is_prepared and run.end(offer.block_size) > offer.first_block for run in chain):
            return True
        return tail is not None and self.held.tree.find_first(tail.block_hash(0)) is not None

    def _missing(self, offer: StoreOffer, chain: list[Run]) -> list[ExtentHeader]:
        """Extents to make of the offered full blocks that are not stored."""
        missing: list[ExtentHeader] = []
        at = offer.first_block
        for begin, end in (
            *((run.first_block, run.end(offer.block_size)) for run in chain),
            (len(offer.block_hashes), 0),
        ):
            if begin > at:
                run = chain_header(
                    offer.root_hash,
                    offer.block_hashes,
                    offer.token_ids,
                    at,
                    begin,
                    offer.block_size,
                    offer.shape,
                    offer.origin,
                )
                missing += split_into_extents(run, self.budgets.extent_max_bytes)
            at = max(at, end)
        return missing

    def _missing_tail(self, offer: StoreOffer, chain: list[Run]) -> ExtentHeader | None:
        num_full = len(offer.block_hashes)
        tokens = offer.token_ids[num_full * offer.block_size :]
        if not offer.with_tail or not len(tokens):
            return None
        parent = offer.block_hashes[-1] if offer.block_hashes else offer.root_hash
        if self.held.tree.holds_tail(parent, pack_tokens(tokens), chain[-1:], num_full, offer.block_size):
            return None
        hashes = (block_hash(parent, tokens),)
        return ExtentHeader.make(
            offer.root_hash, parent, hashes, tokens, offer.block_size, offer.shape, num_full, offer.origin
        )

    def _reserve(self, header: ExtentHeader, offer: StoreOffer, chain: list[Run], now: float) -> list[Drop] | None:
        """Room for one extent of `offer`, None if there is none.

        `chain` is what is stored of the same chain: it never loses its last copy to its own continuation.
        """
        image_bytes = header.image_bytes
        drops: list[Drop] | None = []
        if offer.handoff_owner is None:
            drops = self.room.make_room(Tier.DRAM, image_bytes, keep={run.extent for run in chain})
        elif self.room.handoff_bytes + image_bytes > self.budgets.handoff_bytes:
            drops = None
        if drops is None:
            return None
        extent = Extent(
            header,
            image_bytes,
            is_handoff=offer.handoff_owner is not None,
            # Decode goes on from a handoff's tail at once, and stores what comes of it.
            is_transient=offer.is_transient or (offer.handoff_owner is not None and header.is_tail),
            expires_at=now + self._lease_ttl_s,
            handoff_owner=offer.handoff_owner,
        )
        self.room.charge_dram(extent)
        size = offer.block_size
        above = (run.extent for run in chain if run.first_block < header.first_block <= run.end(size))
        self.held.add(extent, next(above, None))
        chain.append(Run(extent, 0, header.first_block, header.num_tokens))
        self._prepared[extent.extent_id] = extent
        return drops

    def is_prepared(self, extent_id: str) -> bool:
        """A writer may still complete this extent."""
        return extent_id in self._prepared

    def complete_store(self, extent_id: str, now: float) -> bool:
        """The image is in dram: make the extent visible. False if the reservation has lapsed."""
        extent = self._prepared.pop(extent_id, None)
        if extent is None:
            return False
        extent.in_dram = True
        self.held.show(extent)
        self.held.enter_tier(extent, Tier.DRAM)
        if extent.handoff_owner is None:
            self.disk.enqueue(extent)
        else:  # whoever waits for it reads it first: written at the same time, it takes three times as long to arrive
            self._lease(extent.handoff_owner, [extent], now)
        self.room.announce(extent, Tier.DRAM)
        self.counters["stored_blocks"] += extent.header.num_blocks
        return True

    def abort_store(self, extent_id: str) -> None:
        """The writer gives up, or its reservation has lapsed: free what was reserved."""
        extent = self._prepared.pop(extent_id, None)
        if extent is None:
            return
        self.room.discharge_dram(extent)
        self.held.remove(extent)
        self.counters["aborted_extents"] += 1

    # -- leaving ------------------------------------------------------------------------------------

    def expire(self, now: float) -> list[Drop]:
        """Leases and reservations whose owners have died, and handoffs that found no room before."""
        self.held.settle_uses()
        drops: list[Drop] = []
        for owner in [o for o, lease in self._leases.items() if lease.expires_at <= now]:
            drops += self.complete_load(owner)
            self.counters["expired_leases"] += 1
        for extent_id in [i for i, extent in self._prepared.items() if extent.expires_at <= now]:
            self.abort_store(extent_id)
        for extent in list(self.room.unsettled.values()):
            drops += self._settle(extent)
        return drops

    def discard(self, extent_id: str, tier: Tier) -> list[Drop]:
        """The image in `tier` turned out bad or missing: forget it there, leased or not.

        An image that is still in dram is written again.
        """
        extent = self.held.find(extent_id)
        if extent is None or not extent.is_in(tier):
            return []
        return self.disk.discard(extent, tier)

    def purge(self, query: PurgeQuery) -> Purged:
        """Take out of all tiers what is meant, leased or not."""
        meant = {extent for extent in self.held if query.means(extent.header)}
        kept = self._histories_of_others(meant) if query.session is not None else set()
        receipt = PurgeReceipt(num_kept_blocks=sum(extent.header.num_blocks for extent in kept))
        purged = Purged(receipt, [], [])
        for extent in meant - kept:
            purged.add(extent)
            if extent.is_prepared:
                self.abort_store(extent.extent_id)
            for tier in (Tier.DRAM, Tier.DISK):
                if extent.is_in(tier):
                    purged.drops += self.room.leave(extent, tier)
        self._purge_locked(query, purged)
        return purged

    def _purge_locked(self, query: PurgeQuery, purged: Purged) -> None:
        """Whose session stored an encrypted extent can't be told without its key: such a purge leaves them all."""
        for locked in list(self.room.locked.values()):
            is_meant = query.means(locked)
            if is_meant is None:
                purged.receipt = replace(purged.receipt, num_unknown=purged.receipt.num_unknown + 1)
            elif is_meant:
                purged.add_locked(locked)
                purged.drops.append(self.room.leave_locked(locked))

    def _histories_of_others(self, extents: set[Extent]) -> set[Extent]:
        """Those of the extents that others hang on."""
        found: set[Extent] = set()
        for extent in self.held:
            above = extent.parent if extent not in extents else None
            while above is not None and above not in found:
                found.add(above)
                above = above.parent
        return found & extents

    def _settle(self, extent: Extent) -> list[Drop]:
        """Without leases a handoff becomes an ordinary cached extent, or leaves."""
        was_tried = self.room.unsettled.pop(extent.extent_id, None) is not None
        if not extent.is_handoff or not extent.in_dram or extent.num_leases:
            return []
        if extent.is_transient:
            return self.room.leave(extent, Tier.DRAM)
        if not (was_tried or extent.on_disk or extent.needs_write):
            self.disk.enqueue(extent)
        drops = self.room.make_room(Tier.DRAM, extent.image_bytes)
        if drops is not None:
            self.room.discharge_dram(extent)
            self.room.charge_dram(extent)
            return drops
        if self.room.may_leave_dram(extent):
            return self.room.leave(extent, Tier.DRAM)
        self.room.unsettled[extent.extent_id] = extent
        return []

    # -- looking ------------------------------------------------------------------------------------

    @property
    def has_dirty(self) -> bool:
        return bool(self.room.dirty or self.room.writing)

    def check_integrity(self) -> None:
        """Raise AssertionError if a sum or a link is off."""
        self.held.check_integrity()
        self.room.check_integrity()
        leased = Counter(extent for lease in self._leases.values() for extent in lease.extents)
        assert all(e.num_leases == leased[e] for e in self.held), "leases are miscounted"
        assert set(self._prepared.values()) == {e for e in self.held if e.is_prepared}
