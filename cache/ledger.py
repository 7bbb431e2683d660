"""The node store's bookkeeping: which extents exist, in which tiers, who reads them, what goes next.

Never touches a byte of KV, a file or a clock of its own: every method decides under the caller's lock and
returns what is to be done. States of an extent:

    prepared --complete--> in dram, needs_write --written--> in dram + on disk --evict--> on disk --evict--> gone
        |                          |
        +--abort / expiry--> gone  +--superseded or transient: dropped without ever being written

Invariants (`check_integrity`): the bytes charged to dram, handoff and disk are the sums over the extents
there; nothing leased is evicted; an extent leaves a tier only after its descendants in that tier; a block
leaves dram only if it is durable, was refused by the disk tier, or is worthless.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from cache.events import Event, ExtentRemoved, ExtentStored, Tier
from cache.eviction import EvictionPolicy, LruPolicy
from cache.extent import ExtentHeader, chain_header, split_into_extents
from cache.hashing import BlockHash, block_hash, pack_hashes
from cache.messages import LoadQuery, StoreOffer
from cache.prefix_index import PrefixIndex


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


@dataclass(slots=True, eq=False)
class Extent:
    """One extent's state. `is_handoff`: its dram bytes are charged to the handoff budget."""

    header: ExtentHeader
    image_bytes: int
    is_prepared: bool = True
    in_dram: bool = False
    on_disk: bool = False
    needs_write: bool = False
    is_writing: bool = False
    is_promoting: bool = False
    is_handoff: bool = False
    is_transient: bool = False
    is_superseded: bool = False
    num_leases: int = 0
    num_disk_hits: int = 0
    expires_at: float = 0.0
    handoff_owner: str | None = None

    @property
    def extent_id(self) -> str:
        return self.header.extent_id

    def is_in(self, tier: Tier) -> bool:
        return self.in_dram if tier is Tier.DRAM else self.on_disk


class Place(NamedTuple):
    """Where a block lies: which block of which extent."""

    extent: Extent
    position: int


@dataclass(slots=True)
class Lease:
    """What one owner reads, until when."""

    expires_at: float
    extents: Counter[str] = field(default_factory=Counter)


class StoreDecision(NamedTuple):
    """Outcome of `prepare_store`. With nothing granted, `is_busy` and `is_full` say whether waiting helps."""

    granted: list[ExtentHeader]
    drops: list[Drop]
    is_busy: bool = False
    is_full: bool = False
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
        self._index = PrefixIndex()
        self._extents: dict[str, Extent] = {}
        self._places: dict[BlockHash, Place] = {}
        self._by_parent: dict[BlockHash, set[str]] = {}
        self._preparing: dict[BlockHash, str] = {}
        self._superseded: OrderedDict[str, None] = OrderedDict()
        self._dirty: OrderedDict[str, None] = OrderedDict()
        self._leases: dict[str, Lease] = {}
        self._policies = {Tier.DRAM: make_policy(), Tier.DISK: make_policy()}

    def __repr__(self) -> str:
        used = self.used_bytes
        return (
            f"<Ledger {len(self._extents)} extents, dram {used[Tier.DRAM]}/{self.budgets.dram_bytes}, "
            f"disk {used[Tier.DISK]}/{self.budgets.disk_bytes}, {len(self._dirty)} to write, {len(self._leases)} leases>"
        )

    # -- reading ------------------------------------------------------------------------------------

    def prepare_load(self, query: LoadQuery, now: float) -> tuple[list[Place], int]:
        """Lease the longest stored prefix to `query.owner`.

        Returns the blocks from `query.first_block` on and the number of prompt tokens covered, which is 0
        when nothing beyond `first_block` is there.
        """
        match = self._index.match(query.root_hash, query.block_hashes, query.token_ids, query.block_size)
        places = [self._places[h] for h in query.block_hashes[query.first_block : match.num_blocks]]
        if match.partial is not None and match.num_blocks >= query.first_block:
            places.append(self._places[match.partial])
        if not places:
            self.counters["load_misses"] += 1
            return [], 0
        self.counters["load_hits"] += 1
        extents = list(dict.fromkeys(place.extent for place in places))
        self._lease(query.owner, extents, now)
        self._touch_chain(query.block_hashes[: match.num_blocks], extents)
        return places, match.num_tokens(query.block_size)

    def complete_load(self, owner: str) -> list[Drop]:
        """End all leases of `owner`."""
        lease = self._leases.pop(owner, None)
        return self._unlease(lease) if lease else []

    def renew_lease(self, owner: str, now: float) -> None:
        """A reader that still reads keeps what it has leased."""
        if owner in self._leases:
            self._leases[owner].expires_at = now + self._lease_ttl_s

    def note_disk_hit(self, extent: Extent) -> bool:
        """Count a read from disk; True when the extent has earned its place in dram (the second hit)."""
        extent.num_disk_hits += 1
        return extent.num_disk_hits >= 2 and not extent.in_dram

    def _lease(self, owner: str, extents: list[Extent], now: float) -> None:
        lease = self._leases.setdefault(owner, Lease(0.0))
        lease.expires_at = now + self._lease_ttl_s
        for extent in extents:
            lease.extents[extent.extent_id] += 1
            extent.num_leases += 1

    def _unlease(self, lease: Lease) -> list[Drop]:
        drops: list[Drop] = []
        for extent_id, count in lease.extents.items():
            extent = self._extents.get(extent_id)
            if extent is None:
                continue
            extent.num_leases -= count
            if extent.num_leases == 0:
                drops += self._settle(extent)
        return drops

    def _touch_chain(self, block_hashes: tuple[BlockHash, ...], extents: list[Extent]) -> None:
        """Last to first, so that an ancestor is younger than its descendants; blocks the reader had count too."""
        chain = dict.fromkeys([self._places[h].extent for h in block_hashes] + extents)
        for extent in reversed(chain):
            for policy in self._policies.values():
                policy.touch(extent.extent_id)

    # -- storing ------------------------------------------------------------------------------------

    def prepare_store(self, offer: StoreOffer, now: float) -> StoreDecision:
        """Reserve room for the blocks that are missing, in the order of the chain."""
        missing, is_busy = self._missing(offer)
        if is_busy:
            return StoreDecision([], [], is_busy=True)
        granted: list[ExtentHeader] = []
        drops: list[Drop] = []
        for header in missing[: self.budgets.max_extents_per_grant]:
            room = self._reserve(header, offer, now)
            if room is None:
                break
            granted.append(header)
            drops += room
        is_full = bool(missing) and not granted
        return StoreDecision(granted, drops, is_full=is_full, has_more=len(granted) < len(missing))

    def _missing(self, offer: StoreOffer) -> tuple[list[ExtentHeader], bool]:
        """Extents to make of the offered blocks that are not stored, and whether another writer makes some."""
        missing: list[ExtentHeader] = []
        num_blocks = len(offer.block_hashes)
        at = offer.first_block
        while at < num_blocks:
            end = at
            while end < num_blocks and offer.block_hashes[end] not in self._places:
                if offer.block_hashes[end] in self._preparing:
                    return [], True
                end += 1
            if end > at:
                run = chain_header(
                    offer.root_hash, offer.block_hashes, offer.token_ids, at, end, offer.block_size, offer.shape
                )
                missing += split_into_extents(run, self.budgets.extent_max_bytes)
            at = end + 1
        tail = self._missing_tail(offer)
        if tail is not None and tail.block_hashes[0] in self._preparing:
            return [], True
        return missing + ([tail] if tail else []), False

    def _missing_tail(self, offer: StoreOffer) -> ExtentHeader | None:
        num_full_tokens = len(offer.block_hashes) * offer.block_size
        tokens = offer.token_ids[num_full_tokens:]
        if not offer.with_tail or not len(tokens):
            return None
        parent = offer.block_hashes[-1] if offer.block_hashes else offer.root_hash
        match = self._index.match(parent, (), tokens, offer.block_size)
        if match.partial_tokens == len(tokens):
            return None
        tail_hash = block_hash(parent, tokens)
        return ExtentHeader(offer.root_hash, parent, (tail_hash,), tokens, offer.block_size, offer.shape)

    def _reserve(self, header: ExtentHeader, offer: StoreOffer, now: float) -> list[Drop] | None:
        image_bytes = header.image_bytes
        is_handoff = offer.handoff_owner is not None
        drops: list[Drop] | None = []
        if is_handoff:
            if self.handoff_bytes + image_bytes > self.budgets.handoff_bytes:
                return None
            self.handoff_bytes += image_bytes
        else:
            drops = self._make_room(Tier.DRAM, image_bytes)
            if drops is None:
                return None
            self.used_bytes[Tier.DRAM] += image_bytes
        extent = Extent(
            header,
            image_bytes,
            is_handoff=is_handoff,
            is_transient=offer.is_transient,
            expires_at=now + self._lease_ttl_s,
            handoff_owner=offer.handoff_owner,
        )
        self._extents[header.extent_id] = extent
        self._preparing.update(dict.fromkeys(header.block_hashes, header.extent_id))
        return drops

    def complete_store(self, extent_id: str, now: float) -> bool:
        """The image is in dram: make the extent visible. False if the reservation has lapsed."""
        extent = self._extents.get(extent_id)
        if extent is None or not extent.is_prepared:
            return False
        extent.is_prepared = False
        extent.in_dram = True
        self._forget_preparing(extent)
        self._enter(extent)
        self._policies[Tier.DRAM].add(extent_id)
        extent.needs_write = self.budgets.disk_bytes > 0 and not extent.is_transient
        if extent.needs_write:
            self._dirty[extent_id] = None
        if extent.handoff_owner is not None:
            self._lease(extent.handoff_owner, [extent], now)
        self._supersede_tails(extent.header)
        self._announce(extent, Tier.DRAM)
        self.counters["stored_blocks"] += extent.header.num_blocks
        return True

    def abort_store(self, extent_id: str) -> None:
        """The writer gives up, or its reservation has lapsed: free what was reserved."""
        extent = self._extents.get(extent_id)
        if extent is None or not extent.is_prepared:
            return
        self._forget_preparing(extent)
        self._discharge_dram(extent)
        del self._extents[extent_id]
        self.counters["aborted_extents"] += 1

    def _forget_preparing(self, extent: Extent) -> None:
        for h in extent.header.block_hashes:
            self._preparing.pop(h, None)

    def _enter(self, extent: Extent) -> None:
        header = extent.header
        parent = header.parent_hash
        self._by_parent.setdefault(parent, set()).add(extent.extent_id)
        for index, h in enumerate(header.block_hashes):
            if h not in self._places:
                self._places[h] = Place(extent, index)
                self._index.add(h, parent, header.block_token_ids(index))
            parent = h

    def _supersede_tails(self, header: ExtentHeader) -> None:
        """Tails that the new block contains are worth nothing any more."""
        for h in self._index.superseded_by(header.parent_hash, header.block_token_ids(0)):
            extent = self._places[h].extent
            if extent.header.is_tail:
                extent.is_superseded = True
                self._superseded[extent.extent_id] = None

    def _announce(self, extent: Extent, tier: Tier) -> None:
        if not extent.is_transient:
            self._publish(ExtentStored(extent.extent_id, tier, pack_hashes(extent.header.block_hashes)))

    # -- writing behind -----------------------------------------------------------------------------

    def next_write(self) -> tuple[ExtentHeader | None, list[Drop]]:
        """The next extent to make durable, its disk bytes reserved, and what has to go first."""
        drops: list[Drop] = []
        while self._dirty and self.disk_accepts_writes:
            extent_id, _ = self._dirty.popitem(last=False)
            extent = self._extents[extent_id]
            if extent.is_superseded and not extent.num_leases:
                drops += self._leave(extent, Tier.DRAM)
                continue
            room = self._make_room(Tier.DISK, extent.image_bytes)
            if room is None:
                extent.needs_write = False
                self.counters["dropped_writes"] += 1
                continue
            self.used_bytes[Tier.DISK] += extent.image_bytes
            extent.is_writing = True
            return extent.header, drops + room
        return None, drops

    def written(self, extent_id: str) -> list[Drop]:
        """The extent is durable."""
        extent = self._extents[extent_id]
        extent.is_writing = extent.needs_write = False
        extent.on_disk = True
        self._policies[Tier.DISK].add(extent_id)
        self._announce(extent, Tier.DISK)
        self.counters["written_extents"] += 1
        return self._settle(extent) if not extent.num_leases else []

    def write_failed(self, extent_id: str, *, retry: bool) -> None:
        """The disk refused the extent: keep it for later, or give up its durability."""
        extent = self._extents[extent_id]
        extent.is_writing = False
        self.used_bytes[Tier.DISK] -= extent.image_bytes
        if not extent.in_dram:
            self._remove(extent)
        elif retry:
            self._dirty[extent_id] = None
            self._dirty.move_to_end(extent_id, last=False)
        else:
            extent.needs_write = False
            self.counters["dropped_writes"] += 1

    def recover(self, header: ExtentHeader) -> None:
        """Enter an extent that was found on disk at start."""
        extent = Extent(header, header.image_bytes, is_prepared=False, on_disk=True)
        self._extents[header.extent_id] = extent
        self.used_bytes[Tier.DISK] += extent.image_bytes
        self._enter(extent)
        self._policies[Tier.DISK].add(header.extent_id)

    def shrink_disk(self) -> list[Drop]:
        """Evict what is over the disk budget, after a start with a smaller one."""
        return self._make_room(Tier.DISK, 0) or []

    def prepare_promote(self, extent_id: str) -> list[Drop] | None:
        """Reserve dram for an extent on disk; None if it may not or need not come up."""
        extent = self._extents.get(extent_id)
        if extent is None or extent.in_dram or extent.is_promoting or not extent.on_disk:
            return None
        extent.num_leases += 1
        drops = self._make_room(Tier.DRAM, extent.image_bytes)
        extent.num_leases -= 1
        if drops is None:
            return None
        self.used_bytes[Tier.DRAM] += extent.image_bytes
        extent.is_promoting = True
        return drops

    def complete_promote(self, extent_id: str, *, succeeded: bool) -> None:
        """End what `prepare_promote` began: the image is in dram now, or could not be read."""
        extent = self._extents[extent_id]
        extent.is_promoting = False
        if succeeded:
            extent.in_dram = True
            self._policies[Tier.DRAM].add(extent_id)
            self._announce(extent, Tier.DRAM)
            self.counters["promoted_extents"] += 1
            return
        self.used_bytes[Tier.DRAM] -= extent.image_bytes
        if not extent.on_disk:
            self._remove(extent)

    # -- leaving ------------------------------------------------------------------------------------

    def expire(self, now: float) -> list[Drop]:
        """Leases and reservations whose owners have died."""
        drops: list[Drop] = []
        for owner in [o for o, lease in self._leases.items() if lease.expires_at <= now]:
            drops += self.complete_load(owner)
            self.counters["expired_leases"] += 1
        for extent in [e for e in self._extents.values() if e.is_prepared and e.expires_at <= now]:
            self.abort_store(extent.extent_id)
        return drops

    def discard(self, extent_id: str, tier: Tier) -> list[Drop]:
        """The image in `tier` turned out bad or missing: forget it there, leased or not."""
        extent = self._extents.get(extent_id)
        if extent is None or extent.is_prepared or not extent.is_in(tier):
            return []
        return self._leave(extent, tier)

    def _settle(self, extent: Extent) -> list[Drop]:
        """The last lease is gone: a handoff becomes an ordinary cached extent, or leaves."""
        if extent.is_prepared or not extent.is_handoff or not extent.in_dram:
            return []
        if extent.is_transient:
            return self._leave(extent, Tier.DRAM)
        drops = self._make_room(Tier.DRAM, extent.image_bytes)
        if drops is not None:
            self.handoff_bytes -= extent.image_bytes
            self.used_bytes[Tier.DRAM] += extent.image_bytes
            extent.is_handoff = False
            return drops
        return self._leave(extent, Tier.DRAM) if self._may_leave_dram(extent) else []

    def _make_room(self, tier: Tier, num_bytes: int) -> list[Drop] | None:
        """Evict until `num_bytes` more fit in `tier`; None, and nothing changed, if they can't."""
        budget = self.budgets.dram_bytes if tier is Tier.DRAM else self.budgets.disk_bytes
        excess = self.used_bytes[tier] + num_bytes - budget
        picked: dict[str, Extent] = {}
        for extent in self._victims(tier) if excess > 0 else ():
            if extent.extent_id in picked or not self._may_evict(extent, tier, picked):
                continue
            picked[extent.extent_id] = extent
            excess -= extent.image_bytes
            if excess <= 0:
                break
        if excess > 0:
            return None
        drops: list[Drop] = []
        for extent in picked.values():
            drops += self._leave(extent, tier)
        self.counters[f"evicted_{tier.value}_extents"] += len(picked)
        return drops

    def _victims(self, tier: Tier) -> Iterator[Extent]:
        for extent_id in self._superseded:
            yield self._extents[extent_id]
        for extent_id in self._policies[tier].victims():
            yield self._extents[extent_id]

    def _may_evict(self, extent: Extent, tier: Tier, picked: dict[str, Extent]) -> bool:
        if extent.num_leases or extent.is_writing or not extent.is_in(tier):
            return False
        if tier is Tier.DRAM and (extent.is_handoff or not self._may_leave_dram(extent)):
            return False
        return not any(
            child_id not in picked and self._extents[child_id].is_in(tier)
            for h in extent.header.block_hashes
            for child_id in self._by_parent.get(h, ())
        )

    def _may_leave_dram(self, extent: Extent) -> bool:
        return extent.is_superseded or not extent.needs_write or not self.disk_accepts_writes

    def _leave(self, extent: Extent, tier: Tier) -> list[Drop]:
        extent_id = extent.extent_id
        self._policies[tier].remove(extent_id)
        if tier is Tier.DRAM:
            self._discharge_dram(extent)
            extent.in_dram = False
            if not extent.is_writing:
                extent.needs_write = False
                self._dirty.pop(extent_id, None)
        else:
            self.used_bytes[Tier.DISK] -= extent.image_bytes
            extent.on_disk = False
        if not extent.is_transient:
            self._publish(ExtentRemoved(extent_id, tier))
        if not (extent.in_dram or extent.on_disk or extent.is_writing or extent.is_promoting):
            self._remove(extent)
        return [Drop(extent_id, tier)]

    def _discharge_dram(self, extent: Extent) -> None:
        if extent.is_handoff:
            self.handoff_bytes -= extent.image_bytes
            extent.is_handoff = False
        else:
            self.used_bytes[Tier.DRAM] -= extent.image_bytes

    def _remove(self, extent: Extent) -> None:
        header = extent.header
        siblings = self._by_parent[header.parent_hash]
        siblings.discard(extent.extent_id)
        if not siblings:
            del self._by_parent[header.parent_hash]
        for h in header.block_hashes:
            if self._places[h].extent is extent:
                del self._places[h]
                self._index.remove(h)
        self._superseded.pop(extent.extent_id, None)
        del self._extents[extent.extent_id]

    # -- looking ------------------------------------------------------------------------------------

    @property
    def num_blocks(self) -> int:
        return len(self._places)

    @property
    def num_extents(self) -> int:
        return len(self._extents)

    @property
    def dirty_bytes(self) -> int:
        return sum(self._extents[i].image_bytes for i in self._dirty)

    @property
    def has_dirty(self) -> bool:
        return bool(self._dirty) or any(e.is_writing for e in self._extents.values())

    def find(self, extent_id: str) -> Extent | None:
        return self._extents.get(extent_id)

    def snapshot(self) -> list[Event]:
        """All holdings as events, for a reader that starts anew."""
        events: list[Event] = []
        for extent in self._extents.values():
            packed = pack_hashes(extent.header.block_hashes)
            for tier in (Tier.DRAM, Tier.DISK):
                if not extent.is_prepared and not extent.is_transient and extent.is_in(tier):
                    events.append(ExtentStored(extent.extent_id, tier, packed))
        return events

    def disk_order(self) -> list[str]:
        """Extents on disk, least recently used first."""
        return [i for i in self._policies[Tier.DISK].victims() if self._extents[i].on_disk]

    def check_integrity(self) -> None:
        """Raise AssertionError if a sum or a link is off."""
        self._index.check_integrity()
        extents = self._extents.values()
        charged = [e for e in extents if e.in_dram or e.is_prepared or e.is_promoting]
        handoff = sum(e.image_bytes for e in charged if e.is_handoff)
        dram = sum(e.image_bytes for e in charged if not e.is_handoff)
        disk = sum(e.image_bytes for e in extents if e.on_disk or e.is_writing)
        assert (handoff, dram, disk) == (self.handoff_bytes, self.used_bytes[Tier.DRAM], self.used_bytes[Tier.DISK])
        assert dram <= self.budgets.dram_bytes
        assert handoff <= self.budgets.handoff_bytes
        leased = Counter[str]()
        for lease in self._leases.values():
            leased.update(lease.extents)
        assert all(e.num_leases == leased[e.extent_id] for e in extents if e.num_leases or leased[e.extent_id])
        visible = {h for e in extents if not e.is_prepared for h in e.header.block_hashes}
        assert visible == set(self._places), "places and visible extents disagree"
        assert len(self._index) == len(self._places)
