"""Holdings: picking victims against the plain definition, and extents that come and go."""

from hypothesis import given
from hypothesis import strategies as st

from cache.events import ExtentStored, Tier
from cache.eviction import LruPolicy
from cache.extent_tree import Extent, Run
from cache.hashing import pack_hashes
from cache.holdings import Holdings
from tests.cache.chains import header_of

# A forest of extents: each a path of branch numbers, stored with all its ancestors.
PATHS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple), min_size=1, max_size=8)
Path = tuple[int, ...]


def hold(held: Holdings, path: Path, *, in_dram: bool = True, on_disk: bool = False) -> Extent:
    """Enter the extent of the last block of `path`, whose blocks are `[branch] * 4` each."""
    tokens = [branch for branch in path for _ in range(4)]
    header = header_of(tokens, first=len(path) - 1)
    extent = Extent(header, 1, in_dram=in_dram, on_disk=on_disk)
    held.add(extent, held.tree.find_first(header.parent_hash))
    held.show(extent)
    for tier in (Tier.DRAM, Tier.DISK):
        if extent.is_in(tier):
            held.policies[tier].add(extent.extent_id)
    return extent


def forest(held: Holdings, paths: list[Path]) -> dict[Path, Extent]:
    extents: dict[Path, Extent] = {}
    for path in paths:
        for end in range(1, len(path) + 1):
            if path[:end] not in extents:
                extents[path[:end]] = hold(held, path[:end])
    held.check_integrity()
    return extents


def evictable(extents: dict[Path, Extent], pinned: set[Path]) -> set[Path]:
    """All that could go at most: again and again whatever is unpinned and has no descendant left."""
    left = set(extents)
    while True:
        leaves = {p for p in left - pinned if not any(q[: len(p)] == p and q != p for q in left)}
        if not leaves:
            return set(extents) - left
        left -= leaves


@given(paths=PATHS, num_bytes=st.integers(-1, 12), data=st.data())
def test_victims_are_leaves_first_and_found_whenever_there_are_enough(
    paths: list[Path], num_bytes: int, data: st.DataObject
) -> None:
    held = Holdings(LruPolicy)
    extents = forest(held, paths)
    used = data.draw(st.lists(st.sampled_from(sorted(extents))))
    held.note_use([Run(extents[path], 0, 0, 0) for path in used])
    pinned = set(data.draw(st.lists(st.sampled_from(sorted(extents)), max_size=3)))
    picked = held.pick_victims(Tier.DRAM, num_bytes, lambda extent: extent not in {extents[p] for p in pinned})
    most = evictable(extents, pinned)
    assert (picked is None) == (num_bytes > len(most))
    if picked is not None:
        names = [path for extent in picked for path, e in extents.items() if e is extent]
        assert len(names) == max(0, num_bytes), "no more than needed"
        assert set(names) <= most
        for at, path in enumerate(names):
            below = {q for q in extents if q[: len(path)] == path and q != path}
            assert below <= set(names[:at]), "descendants go before"


def test_descendants_in_the_other_tier_do_not_hold_an_ancestor_back() -> None:
    held = Holdings(LruPolicy)
    parent = hold(held, (0,), on_disk=True)
    hold(held, (0, 1), in_dram=False, on_disk=True)
    assert held.pick_victims(Tier.DRAM, 1, lambda extent: True) == [parent]
    assert held.pick_victims(Tier.DISK, 1, lambda extent: extent is parent) is None


def test_a_child_that_is_being_made_holds_its_parent() -> None:
    held = Holdings(LruPolicy)
    parent = hold(held, (0,))
    child = Extent(header_of([0] * 8, first=1), 1)
    held.add(child, parent)
    held.check_integrity()
    assert child.is_prepared
    assert held.pick_victims(Tier.DRAM, 1, lambda extent: True) is None
    held.remove(child)
    held.check_integrity()
    assert held.pick_victims(Tier.DRAM, 1, lambda extent: True) == [parent]


def test_ancestors_are_those_that_are_there() -> None:
    held = Holdings(LruPolicy)
    first, second, third = (hold(held, (0,) * depth) for depth in (1, 2, 3))
    assert held.ancestors(third) == {first, second}
    held.policies[Tier.DRAM].remove(second.extent_id)
    held.remove(second)
    assert held.ancestors(third) == set()
    assert held.ancestors(first) == set()


@given(paths=PATHS, data=st.data())
def test_removing_in_any_order_leaves_nothing(paths: list[Path], data: st.DataObject) -> None:
    held = Holdings(LruPolicy)
    extents = forest(held, paths)
    assert held.num_blocks == len(held) == len(extents)
    for path in data.draw(st.permutations(sorted(extents))):
        held.policies[Tier.DRAM].remove(extents[path].extent_id)
        held.remove(extents[path])
        held.check_integrity()
    assert repr(held) == "<Holdings 0 extents, 0 blocks>"


def test_the_snapshot_names_each_tier_and_hides_what_is_transient() -> None:
    held = Holdings(LruPolicy)
    both, hidden = hold(held, (0,), on_disk=True), hold(held, (1,))
    hidden.is_transient = True
    packed = pack_hashes(both.header.block_hashes)
    assert held.snapshot() == [ExtentStored(both.extent_id, tier, packed) for tier in (Tier.DRAM, Tier.DISK)]


def recovered(tokens: list[int], first: int = 0) -> Extent:
    return Extent(header_of(tokens, first=first), 1, on_disk=True)


def recover(held: Holdings, extents: list[Extent]) -> list[Extent]:
    """As the ledger does: those that stay come into the policy."""
    left_out = held.add_recovered(extents)
    for extent in extents:
        if extent not in left_out:
            held.policies[Tier.DISK].add(extent.extent_id)
    held.check_integrity()
    return left_out


@given(order=st.permutations(range(4)))
def test_what_a_folder_held_hangs_together_and_superseded_tails_go_first(order: list[int]) -> None:
    held = Holdings(LruPolicy)
    first, second = recovered([0] * 4), recovered([0] * 12, first=1)
    inside, at_the_end = recovered([0] * 10, first=2), recovered([0] * 13, first=3)
    extents = [first, second, inside, at_the_end]
    assert recover(held, [extents[at] for at in order]) == []
    assert (second.parent, inside.parent, at_the_end.parent) == (first, second, second)
    assert (held.num_blocks, inside.is_superseded, at_the_end.is_superseded) == (5, True, False)
    assert held.pick_victims(Tier.DISK, 1, lambda extent: True) == [inside]


def test_what_is_held_already_stays_and_the_folders_copy_is_left_out() -> None:
    held = Holdings(LruPolicy)
    there = hold(held, (0, 1))
    again = Extent(there.header, 1, on_disk=True)
    around = recovered([0, 0, 0, 0, 1, 1, 1, 1])
    assert recover(held, [again]) == [again]
    assert recover(held, [around]) == [around], "its second block lies in the one that is there"
    assert list(held) == [there]
    assert there.parent is None
