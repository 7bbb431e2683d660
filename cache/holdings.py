"""What a node holds: the extents, and in which order they go.

Pure records without budgets, leases' owners or a clock; `cache.ledger` decides with them. An extent is known
from its reservation on (`add`), its blocks can be found once it is whole (`show`), and it is forgotten when
it has left its last tier (`remove`).
"""

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator

from cache.events import Event, ExtentStored, Tier
from cache.eviction import EvictionPolicy
from cache.extent_tree import Extent, ExtentTree, Run


class Holdings:
    """See the module's docstring."""

    def __init__(self, make_policy: Callable[[], EvictionPolicy]) -> None:
        self.policies = {Tier.DRAM: make_policy(), Tier.DISK: make_policy()}
        self.tree = ExtentTree()
        self.num_blocks = 0
        """Of the extents that can be found."""
        self._extents: dict[str, Extent] = {}
        self._superseded: OrderedDict[str, Extent] = OrderedDict()
        self._used: list[Collection[Run]] = []
        """Chains that were used since the policies were told last."""

    def __len__(self) -> int:
        return len(self._extents)

    def __iter__(self) -> Iterator[Extent]:
        return iter(self._extents.values())

    def __repr__(self) -> str:
        return f"<Holdings {len(self._extents)} extents, {self.num_blocks} blocks>"

    def find(self, extent_id: str) -> Extent | None:
        return self._extents.get(extent_id)

    def ancestors(self, extent: Extent) -> set[Extent]:
        """The extents that its chain goes through before it, as far as they are known."""
        found: set[Extent] = set()
        above = extent.parent
        while above is not None:
            found.add(above)
            above = above.parent
        return found

    # -- changing -----------------------------------------------------------------------------------

    def add(self, extent: Extent, parent: Extent | None) -> None:
        """Enter an extent, which cannot be read before `show`. `parent` holds the block before its first one."""
        self._extents[extent.extent_id] = extent
        self.tree.add(extent, parent)

    def add_recovered(self, extents: list[Extent]) -> list[Extent]:
        """Enter and show what a folder held. Returns those that are left out: their blocks lie in another one."""
        left_out = self.tree.add_all(extents)
        gone = set(left_out)
        tails: list[Extent] = []
        for extent in extents:
            if extent in gone:
                continue
            extent.is_prepared = False
            header = extent.header
            self._extents[header.extent_id] = extent
            self.num_blocks += header.num_blocks
            if header.is_tail:
                tails.append(extent)
        for tail in tails:
            if self.tree.is_contained(tail):
                self._supersede(tail)
        return left_out

    def show(self, extent: Extent) -> None:
        """The extent is whole: its blocks can be found, and tails that it contains are superseded."""
        extent.is_prepared = False
        self.num_blocks += extent.header.num_blocks
        if extent.header.is_tail and self.tree.is_contained(extent):
            self._supersede(extent)
        for tail in self.tree.tails_within(extent):
            self._supersede(tail)

    def remove(self, extent: Extent) -> None:
        """Forget an extent, prepared or visible."""
        if not extent.is_prepared:
            self.num_blocks -= extent.header.num_blocks
        self._superseded.pop(extent.extent_id, None)
        del self._extents[extent.extent_id]
        self.tree.remove(extent)

    def note_use(self, chain: Collection[Run]) -> None:
        """A chain was used. The policies are told later: a lookup does not wait for them."""
        self._used.append(chain)

    def settle_uses(self) -> None:
        """Tell the policies, of each chain the last first, so that an ancestor is younger than its descendants."""
        dram, disk = self.policies[Tier.DRAM], self.policies[Tier.DISK]
        for chain in self._used:
            for extent in reversed([run.extent for run in chain]):
                if extent.in_dram:
                    dram.touch(extent.header.extent_id)
                if extent.on_disk:
                    disk.touch(extent.header.extent_id)
        self._used.clear()

    def enter_tier(self, extent: Extent, tier: Tier) -> None:
        """The extent has come into a tier: its policy orders it from now on, before its ancestors."""
        self.settle_uses()
        policy, header = self.policies[tier], extent.header
        policy.add(header.extent_id, header.shape.bytes_per_token)
        above = extent.parent
        while above is not None:
            policy.refresh(above.header.extent_id)
            above = above.parent

    def _supersede(self, tail: Extent) -> None:
        if not tail.is_prepared:
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
                candidate = candidate.parent
        return list(picked) if left <= 0 else None

    def _is_victim(
        self, extent: Extent, tier: Tier, picked: Collection[Extent], may_evict: Callable[[Extent], bool]
    ) -> bool:
        return (
            extent not in picked
            and extent.is_in(tier)
            and may_evict(extent)
            and not any(child.takes_room_in(tier) and child not in picked for child in self.tree.children(extent))
        )

    def victims(self, tier: Tier) -> Iterator[str]:
        """Ids of all extents in a tier, the one to evict first at the front."""
        self.settle_uses()
        return self.policies[tier].victims()

    def _eviction_order(self, tier: Tier) -> Iterator[Extent]:
        yield from self._superseded.values()
        for extent_id in self.victims(tier):
            yield self._extents[extent_id]

    # -- looking ------------------------------------------------------------------------------------

    def snapshot(self) -> list[Event]:
        """All holdings as events, for a reader that starts anew."""
        events: list[Event] = []
        for extent in self:
            for tier in (Tier.DRAM, Tier.DISK):
                if extent.is_in(tier) and not extent.is_transient:
                    events.append(ExtentStored(extent.extent_id, tier, extent.header.packed_hashes))
        return events

    def check_integrity(self) -> None:
        """Raise AssertionError if a link is off."""
        self.tree.check_integrity()
        assert set(self.tree) == set(self), "the tree and the extents disagree"
        assert self.num_blocks == sum(e.header.num_blocks for e in self if not e.is_prepared), "blocks are miscounted"
        assert all(self._extents.get(i) is e for i, e in self._superseded.items()), "a superseded tail is left over"
        for tier, policy in self.policies.items():
            held = {e.extent_id for e in self if e.is_in(tier)}
            assert set(policy.victims()) == held, f"the policy of {tier.value} disagrees"
