"""What a node holds: the extents, the blocks in them, how they hang together and in which order they go.

Pure records without budgets, leases' owners or a clock; `cache.ledger` decides with them. An extent is
known from its reservation on (`add`), its blocks can be found once it is whole (`show`), and it is
forgotten when it has left its last tier (`remove`). A block lies in one extent only.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from cache.events import Event, ExtentStored, Tier
from cache.eviction import EvictionPolicy
from cache.extent import ExtentHeader
from cache.hashing import BlockHash, TokenIds, pack_hashes
from cache.prefix_index import PrefixIndex, PrefixMatch


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

    @property
    def is_readable(self) -> bool:
        return self.in_dram or self.on_disk

    def is_in(self, tier: Tier) -> bool:
        return self.in_dram if tier is Tier.DRAM else self.on_disk

    def takes_room_in(self, tier: Tier) -> bool:
        """It is there, or its bytes are on their way."""
        if tier is Tier.DRAM:
            return self.in_dram or self.is_prepared or self.is_promoting
        return self.on_disk or self.is_writing


class Place(NamedTuple):
    """Where a block lies: which block of which extent."""

    extent: Extent
    position: int


class Holdings:
    """See the module's docstring."""

    def __init__(self, make_policy: Callable[[], EvictionPolicy]) -> None:
        self.policies = {Tier.DRAM: make_policy(), Tier.DISK: make_policy()}
        self._index = PrefixIndex()
        self._extents: dict[str, Extent] = {}
        self._places: dict[BlockHash, Place] = {}
        self._by_parent: dict[BlockHash, dict[Extent, None]] = {}
        self._preparing: dict[BlockHash, Extent] = {}
        self._superseded: OrderedDict[str, Extent] = OrderedDict()

    def __len__(self) -> int:
        return len(self._extents)

    def __iter__(self) -> Iterator[Extent]:
        return iter(self._extents.values())

    def __repr__(self) -> str:
        return f"<Holdings {len(self._extents)} extents, {len(self._places)} blocks>"

    @property
    def num_blocks(self) -> int:
        return len(self._places)

    # -- finding ------------------------------------------------------------------------------------

    def find(self, extent_id: str) -> Extent | None:
        return self._extents.get(extent_id)

    def place(self, block_hash: BlockHash) -> Place | None:
        """Where a visible block lies."""
        return self._places.get(block_hash)

    def places(self, block_hashes: Iterable[BlockHash]) -> list[Place]:
        """Where those of the blocks lie that are visible."""
        return [self._places[h] for h in block_hashes if h in self._places]

    def ancestors(self, extent: Extent) -> set[Extent]:
        """The extents that its chain goes through before it, as far as they are visible."""
        found: set[Extent] = set()
        above = self._places.get(extent.header.parent_hash)
        while above is not None:
            found.add(above.extent)
            above = self._places.get(above.extent.header.parent_hash)
        return found

    def is_preparing(self, block_hash: BlockHash) -> bool:
        return block_hash in self._preparing

    def match(
        self, parent_hash: BlockHash, block_hashes: tuple[BlockHash, ...], token_ids: TokenIds, block_size: int
    ) -> PrefixMatch:
        """See `PrefixIndex.match`."""
        return self._index.match(parent_hash, block_hashes, token_ids, block_size)

    # -- changing -----------------------------------------------------------------------------------

    def add(self, extent: Extent) -> None:
        """Enter an extent, unseen by lookups until `show`."""
        self._extents[extent.extent_id] = extent
        self._by_parent.setdefault(extent.header.parent_hash, {})[extent] = None
        if extent.is_prepared:
            self._preparing.update(dict.fromkeys(extent.header.block_hashes, extent))

    def show(self, extent: Extent) -> None:
        """The extent is whole: its blocks can be found, and tails that it contains are superseded."""
        extent.is_prepared = False
        self._forget_preparing(extent)
        header = extent.header
        if header.is_tail and self._is_contained(header):
            self._supersede(extent)
        parent = header.parent_hash
        for position, h in enumerate(header.block_hashes):
            token_ids = header.block_token_ids(position)
            for tail in self.places(self._index.superseded_by(parent, token_ids)):
                self._supersede(tail.extent)
            self._places[h] = Place(extent, position)
            self._index.add(h, parent, token_ids)
            parent = h

    def remove(self, extent: Extent) -> None:
        """Forget an extent, prepared or visible."""
        siblings = self._by_parent[extent.header.parent_hash]
        del siblings[extent]
        if not siblings:
            del self._by_parent[extent.header.parent_hash]
        if extent.is_prepared:
            self._forget_preparing(extent)
        else:
            for h in extent.header.block_hashes:
                del self._places[h]
                self._index.remove(h)
        self._superseded.pop(extent.extent_id, None)
        del self._extents[extent.extent_id]

    def touch_chain(self, extents: Iterable[Extent]) -> None:
        """Count as used, last to first, so that an ancestor is younger than its descendants."""
        for extent in reversed(dict.fromkeys(extents)):
            for policy in self.policies.values():
                policy.touch(extent.extent_id)

    def _forget_preparing(self, extent: Extent) -> None:
        for h in extent.header.block_hashes:
            self._preparing.pop(h, None)

    def _is_contained(self, tail: ExtentHeader) -> bool:
        match = self._index.match(tail.parent_hash, (), tail.token_ids, tail.block_size)
        return match.partial_tokens == tail.num_tokens

    def _supersede(self, tail: Extent) -> None:
        tail.is_superseded = True
        self._superseded[tail.extent_id] = tail

    # -- leaving ------------------------------------------------------------------------------------

    def pick_victims(self, tier: Tier, num_bytes: int, may_evict: Callable[[Extent], bool]) -> list[Extent] | None:
        """Extents to evict for `num_bytes`, descendants before ancestors; None if there are too few.

        Changes nothing. Superseded tails come first, then the policy's order.
        """
        picked: dict[Extent, None] = {}
        passed: set[Extent] = set()
        left = num_bytes
        for extent in self._eviction_order(tier) if left > 0 else ():
            passed.add(extent)
            candidate: Extent | None = extent
            # An ancestor that was passed over may go once its last descendant goes.
            while candidate in passed and self._is_victim(candidate, tier, picked, may_evict):
                picked[candidate] = None
                left -= candidate.image_bytes
                if left <= 0:
                    return list(picked)
                above = self._places.get(candidate.header.parent_hash)
                candidate = above.extent if above else None
        return list(picked) if left <= 0 else None

    def _is_victim(
        self, extent: Extent, tier: Tier, picked: Collection[Extent], may_evict: Callable[[Extent], bool]
    ) -> bool:
        return (
            extent not in picked
            and extent.is_in(tier)
            and may_evict(extent)
            and not any(child.takes_room_in(tier) and child not in picked for child in self._children(extent))
        )

    def _eviction_order(self, tier: Tier) -> Iterator[Extent]:
        yield from self._superseded.values()
        for extent_id in self.policies[tier].victims():
            yield self._extents[extent_id]

    def _children(self, extent: Extent) -> Iterator[Extent]:
        for h in extent.header.block_hashes:
            yield from self._by_parent.get(h, ())

    # -- looking ------------------------------------------------------------------------------------

    def snapshot(self) -> list[Event]:
        """All holdings as events, for a reader that starts anew."""
        events: list[Event] = []
        for extent in self:
            packed = pack_hashes(extent.header.block_hashes)
            for tier in (Tier.DRAM, Tier.DISK):
                if extent.is_in(tier) and not extent.is_transient:
                    events.append(ExtentStored(extent.extent_id, tier, packed))
        return events

    def check_integrity(self) -> None:
        """Raise AssertionError if a link is off."""
        self._index.check_integrity()
        visible = [h for e in self if not e.is_prepared for h in e.header.block_hashes]
        assert len(visible) == len(set(visible)), "a block lies in two extents"
        assert set(visible) == set(self._places), "places and visible extents disagree"
        assert len(self._index) == len(self._places), "index and places disagree"
        assert set(self._preparing.values()) == {e for e in self if e.is_prepared}, "preparing disagrees"
        children = {e for siblings in self._by_parent.values() for e in siblings}
        assert children == set(self), "children and extents disagree"
        assert all(self._extents.get(i) is e for i, e in self._superseded.items()), "a superseded tail is left over"
        for tier, policy in self.policies.items():
            held = {e.extent_id for e in self if e.is_in(tier)}
            assert set(policy.victims()) == held, f"the policy of {tier.value} disagrees"
