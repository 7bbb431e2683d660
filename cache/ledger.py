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
from dataclasses import dataclass, field
from typing import NamedTuple

from cache.events import Event, ExtentRemoved, ExtentStored, Tier
from cache.eviction import EvictionPolicy, LruPolicy
from cache.extent import ExtentHeader, chain_header, split_into_extents
from cache.hashing import block_hash, pack_hashes
from cache.holdings import Extent, Holdings, Place
from cache.messages import LoadQuery, StoreOffer


@dataclass(frozen=True, slots=True)
class Budgets:
    """Hard limits in bytes of images, and how much one offer may reserve at once."""

    dram_bytes: int
    disk_bytes: int
    """0: no disk tier."""
    handoff_bytes: int
    extent_max_bytes: int = 16 << 20
    max_extents_per_grant: int = 4


class Drop(NamedTuple):
    """To be done by the caller: forget the extent's image in `tier`."""

    extent_id: str
    tier: Tier


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
        self.disk_accepts_writes = budgets.disk_bytes > 0
        self.counters: Counter[str] = Counter()
        self.used_bytes = {Tier.DRAM: 0, Tier.DISK: 0}
        self.handoff_bytes = 0
        self._publish = publish
        self._lease_ttl_s = lease_ttl_s
        self._held = Holdings(make_policy)
        self._leases: dict[str, Lease] = {}
        self._prepared: OrderedDict[str, Extent] = OrderedDict()
        self._dirty: OrderedDict[str, Extent] = OrderedDict()
        self._writing: dict[str, Extent] = {}
        self._unsettled: dict[str, Extent] = {}

    def __repr__(self) -> str:
        used = self.used_bytes
        return (
            f"<Ledger {self.num_extents} extents, dram {used[Tier.DRAM]}/{self.budgets.dram_bytes}, "
            f"disk {used[Tier.DISK]}/{self.budgets.disk_bytes}, {len(self._dirty)} to write, "
            f"{len(self._leases)} leases>"
        )

    # -- reading ------------------------------------------------------------------------------------

    def prepare_load(self, query: LoadQuery, now: float) -> tuple[list[Place], int]:
        """Lease the longest stored continuation from `query.first_block` on to `query.owner`.

        Returns its blocks and the number of prompt tokens covered, which is 0 when nothing is there.
        """
        first, size = query.first_block, query.block_size
        parent = query.block_hashes[first - 1] if first else query.root_hash
        match = self._held.match(parent, query.block_hashes[first:], query.token_ids[first * size :], size)
        found = query.block_hashes[first : first + match.num_blocks]
        places = self._held.places((*found, match.partial) if match.partial else found)
        num_tokens = first * size + match.num_tokens(size)
        for at, place in enumerate(places):
            if not place.extent.is_readable:  # found bad while it was being written or promoted
                places, num_tokens = places[:at], (first + at) * size
                break
        if not places:
            self.counters["load_misses"] += 1
            return [], 0
        self.counters["load_hits"] += 1
        self._lease(query.owner, (place.extent for place in places), now)
        had = self._held.places(query.block_hashes[:first])
        self._held.touch_chain(place.extent for place in had + places)
        return places, num_tokens

    def complete_load(self, owner: str) -> list[Drop]:
        """End all leases of `owner`."""
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

    def note_disk_hit(self, extent: Extent) -> bool:
        """Count a read from disk; True when the extent has earned its place in dram (the second hit)."""
        extent.num_disk_hits += 1
        return extent.num_disk_hits >= 2 and not extent.in_dram

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
        missing = self._missing(offer)
        if missing is None:
            return StoreDecision([], [], is_busy=True)
        chain = {place.extent for place in self._held.places(offer.block_hashes)}
        if offer.handoff_owner is not None and chain:
            handed = self._held.places(offer.block_hashes[offer.first_block :])
            self._lease(offer.handoff_owner, (place.extent for place in handed), now)
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

    def _missing(self, offer: StoreOffer) -> list[ExtentHeader] | None:
        """Extents to make of the offered blocks that are not stored; None if another writer makes some of them."""
        missing: list[ExtentHeader] = []
        hashes, num_blocks = offer.block_hashes, len(offer.block_hashes)
        tail = self._missing_tail(offer)
        wanted = [*hashes[offer.first_block :], *(tail.block_hashes if tail else ())]
        if any(self._held.is_preparing(h) for h in wanted):
            return None
        at = offer.first_block
        while at < num_blocks:
            end = at
            while end < num_blocks and self._held.place(hashes[end]) is None:
                end += 1
            if end > at:
                run = chain_header(offer.root_hash, hashes, offer.token_ids, at, end, offer.block_size, offer.shape)
                missing += split_into_extents(run, self.budgets.extent_max_bytes)
            at = end + 1
        return missing + ([tail] if tail else [])

    def _missing_tail(self, offer: StoreOffer) -> ExtentHeader | None:
        tokens = offer.token_ids[len(offer.block_hashes) * offer.block_size :]
        if not offer.with_tail or not len(tokens):
            return None
        parent = offer.block_hashes[-1] if offer.block_hashes else offer.root_hash
        match = self._held.match(parent, (), tokens, offer.block_size)
        if match.partial_tokens == len(tokens):
            return None
        tail_hash = block_hash(parent, tokens)
        return ExtentHeader(offer.root_hash, parent, (tail_hash,), tokens, offer.block_size, offer.shape)

    def _reserve(self, header: ExtentHeader, offer: StoreOffer, chain: set[Extent], now: float) -> list[Drop] | None:
        """Room for one extent of `offer`, None if there is none.

        `chain` is what is stored of the same chain: it never loses its last copy to its own continuation.
        """
        image_bytes = header.image_bytes
        drops: list[Drop] | None = []
        if offer.handoff_owner is None:
            drops = self._make_room(Tier.DRAM, image_bytes, keep=chain)
        elif self.handoff_bytes + image_bytes > self.budgets.handoff_bytes:
            drops = None
        if drops is None:
            return None
        extent = Extent(
            header,
            image_bytes,
            is_handoff=offer.handoff_owner is not None,
            is_transient=offer.is_transient,
            expires_at=now + self._lease_ttl_s,
            handoff_owner=offer.handoff_owner,
        )
        self._charge_dram(extent)
        self._held.add(extent)
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
        self._held.show(extent)
        self._held.policies[Tier.DRAM].add(extent_id)
        extent.needs_write = self.budgets.disk_bytes > 0 and not extent.is_transient
        if extent.needs_write:
            self._dirty[extent_id] = extent
        if extent.handoff_owner is not None:
            self._lease(extent.handoff_owner, [extent], now)
        self._announce(extent, Tier.DRAM)
        self.counters["stored_blocks"] += extent.header.num_blocks
        return True

    def abort_store(self, extent_id: str) -> None:
        """The writer gives up, or its reservation has lapsed: free what was reserved."""
        extent = self._prepared.pop(extent_id, None)
        if extent is None:
            return
        self._discharge_dram(extent)
        self._held.remove(extent)
        self.counters["aborted_extents"] += 1

    def _announce(self, extent: Extent, tier: Tier) -> None:
        if not extent.is_transient:
            self._publish(ExtentStored(extent.extent_id, tier, pack_hashes(extent.header.block_hashes)))

    # -- writing behind -----------------------------------------------------------------------------

    def next_write(self) -> tuple[ExtentHeader | None, list[Drop]]:
        """The next extent to make durable, its disk bytes reserved, and what has to go first."""
        drops: list[Drop] = []
        while self._dirty and self.disk_accepts_writes:
            extent_id, extent = self._dirty.popitem(last=False)
            if extent.is_superseded:
                extent.needs_write = False
                drops += [] if extent.num_leases else self._leave(extent, Tier.DRAM)
                continue
            room = self._make_room(Tier.DISK, extent.image_bytes, keep=self._held.ancestors(extent))
            if room is None:
                extent.needs_write = False
                self.counters["dropped_writes"] += 1
                continue
            extent.is_writing = True
            self.used_bytes[Tier.DISK] += extent.image_bytes
            self._writing[extent_id] = extent
            return extent.header, drops + room
        return None, drops

    def written(self, extent_id: str) -> list[Drop]:
        """The extent is durable."""
        extent = self._writing.pop(extent_id)
        extent.is_writing = extent.needs_write = False
        if not extent.in_dram:  # its image was found bad meanwhile: so is what was written
            self.used_bytes[Tier.DISK] -= extent.image_bytes
            self._held.remove(extent)
            return [Drop(extent_id, Tier.DISK)]
        extent.on_disk = True
        self._held.policies[Tier.DISK].add(extent_id)
        self._announce(extent, Tier.DISK)
        self.counters["written_extents"] += 1
        return []

    def write_failed(self, extent_id: str, *, retry: bool) -> None:
        """The disk refused the extent: keep it for later, or give up its durability."""
        extent = self._writing.pop(extent_id)
        extent.is_writing = False
        self.used_bytes[Tier.DISK] -= extent.image_bytes
        if not extent.in_dram:
            self._held.remove(extent)
        elif retry:
            self._dirty[extent_id] = extent
            self._dirty.move_to_end(extent_id, last=False)
        else:
            extent.needs_write = False
            self.counters["dropped_writes"] += 1

    def recover(self, header: ExtentHeader) -> bool:
        """Enter an extent that was found on disk at start. False if its blocks lie in another one already."""
        if self._held.places(header.block_hashes):
            return False
        extent = Extent(header, header.image_bytes, is_prepared=False, on_disk=True)
        self.used_bytes[Tier.DISK] += extent.image_bytes
        self._held.add(extent)
        self._held.show(extent)
        self._held.policies[Tier.DISK].add(header.extent_id)
        return True

    def shrink_disk(self) -> list[Drop]:
        """Evict what is over the disk budget, after a start with a smaller one."""
        return self._make_room(Tier.DISK, 0) or []

    def prepare_promote(self, extent_id: str) -> list[Drop] | None:
        """Reserve dram for an extent on disk; None if it may not or need not come up."""
        extent = self._held.find(extent_id)
        if extent is None or extent.in_dram or extent.is_promoting or not extent.on_disk:
            return None
        drops = self._make_room(Tier.DRAM, extent.image_bytes)
        if drops is None:
            return None
        extent.is_promoting = True
        self._charge_dram(extent)
        return drops

    def complete_promote(self, extent_id: str, *, succeeded: bool) -> None:
        """End what `prepare_promote` began: the image is in dram now, or could not be read."""
        extent = self._held.find(extent_id)
        assert extent is not None and extent.is_promoting
        extent.is_promoting = False
        if succeeded:
            extent.in_dram = True
            self._held.policies[Tier.DRAM].add(extent_id)
            self._announce(extent, Tier.DRAM)
            self.counters["promoted_extents"] += 1
            return
        self._discharge_dram(extent)
        if not extent.on_disk:
            self._held.remove(extent)

    # -- leaving ------------------------------------------------------------------------------------

    def expire(self, now: float) -> list[Drop]:
        """Leases and reservations whose owners have died, and handoffs that found no room before."""
        drops: list[Drop] = []
        for owner in [o for o, lease in self._leases.items() if lease.expires_at <= now]:
            drops += self.complete_load(owner)
            self.counters["expired_leases"] += 1
        for extent_id in [i for i, extent in self._prepared.items() if extent.expires_at <= now]:
            self.abort_store(extent_id)
        for extent in list(self._unsettled.values()):
            drops += self._settle(extent)
        return drops

    def discard(self, extent_id: str, tier: Tier) -> list[Drop]:
        """The image in `tier` turned out bad or missing: forget it there, leased or not.

        An image that is still in dram is written again.
        """
        extent = self._held.find(extent_id)
        if extent is None or not extent.is_in(tier):
            return []
        drops = self._leave(extent, tier)
        if extent.in_dram and not extent.needs_write and not extent.is_transient:
            extent.needs_write = True
            self._dirty[extent_id] = extent
        return drops

    def _settle(self, extent: Extent) -> list[Drop]:
        """Without leases a handoff becomes an ordinary cached extent, or leaves."""
        self._unsettled.pop(extent.extent_id, None)
        if not extent.is_handoff or not extent.in_dram or extent.num_leases:
            return []
        if extent.is_transient:
            return self._leave(extent, Tier.DRAM)
        drops = self._make_room(Tier.DRAM, extent.image_bytes)
        if drops is not None:
            self._discharge_dram(extent)
            self._charge_dram(extent)
            return drops
        if self._may_leave_dram(extent):
            return self._leave(extent, Tier.DRAM)
        self._unsettled[extent.extent_id] = extent
        return []

    def _make_room(self, tier: Tier, num_bytes: int, keep: set[Extent] | None = None) -> list[Drop] | None:
        """Evict until `num_bytes` more fit in `tier`; None, and nothing changed, if they can't.

        `keep` may go from dram to disk, but not further.
        """

        def may_evict(extent: Extent) -> bool:
            is_kept = keep is not None and extent in keep
            if extent.num_leases or (is_kept and not (tier is Tier.DRAM and extent.on_disk)):
                return False
            if tier is Tier.DRAM:
                return not extent.is_handoff and self._may_leave_dram(extent)
            return not extent.is_promoting

        budget = self.budgets.dram_bytes if tier is Tier.DRAM else self.budgets.disk_bytes
        picked = self._held.pick_victims(tier, self.used_bytes[tier] + num_bytes - budget, may_evict)
        if picked is None:
            return None
        if picked:
            self.counters[f"evicted_{tier.value}_extents"] += len(picked)
        return [drop for extent in picked for drop in self._leave(extent, tier)]

    def _may_leave_dram(self, extent: Extent) -> bool:
        if extent.is_writing:
            return False
        return extent.is_superseded or not extent.needs_write or not self.disk_accepts_writes

    def _leave(self, extent: Extent, tier: Tier) -> list[Drop]:
        extent_id = extent.extent_id
        self._held.policies[tier].remove(extent_id)
        if tier is Tier.DRAM:
            self._discharge_dram(extent)
            extent.in_dram = extent.needs_write = False
            self._dirty.pop(extent_id, None)
            self._unsettled.pop(extent_id, None)
        else:
            self.used_bytes[Tier.DISK] -= extent.image_bytes
            extent.on_disk = False
        if not extent.is_transient:
            self._publish(ExtentRemoved(extent_id, tier))
        if not (extent.is_readable or extent.is_writing or extent.is_promoting):
            self._held.remove(extent)
        return [Drop(extent_id, tier)]

    def _charge_dram(self, extent: Extent) -> None:
        if extent.is_handoff:
            self.handoff_bytes += extent.image_bytes
        else:
            self.used_bytes[Tier.DRAM] += extent.image_bytes

    def _discharge_dram(self, extent: Extent) -> None:
        """Whatever comes into dram later is no handoff any more."""
        if extent.is_handoff:
            self.handoff_bytes -= extent.image_bytes
            extent.is_handoff = False
        else:
            self.used_bytes[Tier.DRAM] -= extent.image_bytes

    # -- looking ------------------------------------------------------------------------------------

    @property
    def num_blocks(self) -> int:
        return self._held.num_blocks

    @property
    def num_extents(self) -> int:
        return len(self._held)

    @property
    def dirty_bytes(self) -> int:
        return sum(extent.image_bytes for extent in (*self._dirty.values(), *self._writing.values()))

    @property
    def has_dirty(self) -> bool:
        return bool(self._dirty or self._writing)

    def find(self, extent_id: str) -> Extent | None:
        return self._held.find(extent_id)

    def snapshot(self) -> list[Event]:
        """All holdings as events, for a reader that starts anew."""
        return self._held.snapshot()

    def disk_order(self) -> list[str]:
        """Extents on disk, least recently used first."""
        return list(self._held.policies[Tier.DISK].victims())

    def check_integrity(self) -> None:
        """Raise AssertionError if a sum or a link is off."""
        self._held.check_integrity()
        in_dram = [e for e in self._held if e.takes_room_in(Tier.DRAM)]
        handoff = sum(e.image_bytes for e in in_dram if e.is_handoff)
        dram = sum(e.image_bytes for e in in_dram if not e.is_handoff)
        disk = sum(e.image_bytes for e in self._held if e.takes_room_in(Tier.DISK))
        assert (handoff, dram, disk) == (self.handoff_bytes, self.used_bytes[Tier.DRAM], self.used_bytes[Tier.DISK])
        assert dram <= self.budgets.dram_bytes
        assert disk <= self.budgets.disk_bytes
        assert handoff <= self.budgets.handoff_bytes
        leased = Counter(extent for lease in self._leases.values() for extent in lease.extents)
        assert all(e.num_leases == leased[e] for e in self._held), "leases are miscounted"
        assert set(self._prepared.values()) == {e for e in self._held if e.is_prepared}
        assert set(self._writing.values()) == {e for e in self._held if e.is_writing}
        waiting = {e for e in self._held if e.needs_write and not e.is_writing}
        assert set(self._dirty.values()) == waiting, "what needs writing and what is queued disagree"
        assert all(e.is_handoff and e.in_dram for e in self._unsettled.values())
