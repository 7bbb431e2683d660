"""The ledger's decisions, one law at a time. `test_node_store_machine.py` mixes them all."""

import pytest

from cache.events import ExtentRemoved, ExtentStored, Tier
from cache.occupancy import Drop
from tests.cache.books import Books, chain, last_extent
from tests.cache.chains import BLOCK_SIZE, IMAGE_BYTES, budgets, header_of, query

DRAM, DISK = Tier.DRAM, Tier.DISK


# -- storing ----------------------------------------------------------------------------------------


def test_a_block_is_invisible_until_it_is_complete() -> None:
    books = Books()
    decision = books.prepare(chain(1))
    assert books.found(chain(1)) == 0
    assert books.ledger.complete_store(decision.granted[0].extent_id, 0.0)
    assert books.found(chain(1)) == BLOCK_SIZE
    assert [type(event) for event in books.events] == [ExtentStored]


def test_only_missing_blocks_are_granted() -> None:
    books = Books(dram=9)
    books.store(chain(1, 2))
    assert not books.prepare(chain(1, 2)).granted
    granted = books.prepare(chain(1, 4, tail=2)).granted
    assert [header.num_tokens for header in granted] == [4, 4, 2]
    assert granted[0].parent_hash == last_extent(chain(1, 2)).block_hash(0)


def test_a_hole_in_a_chain_is_filled() -> None:
    books = Books(dram=9)
    books.store(chain(1, 3))
    hole = header_of(chain(1, 2), first=1)
    books.drops += books.ledger.discard(hole.extent_id, DRAM)
    assert books.found(chain(1, 3)) == BLOCK_SIZE
    assert [header.extent_id for header in books.prepare(chain(1, 3)).granted] == [hole.extent_id]
    books.ledger.complete_store(hole.extent_id, 0.0)
    assert books.found(chain(1, 3)) == 3 * BLOCK_SIZE


def test_a_tail_that_any_stored_block_contains_is_not_stored() -> None:
    books = Books(dram=9)
    books.store(chain(1, 2))
    assert not books.prepare(chain(1, 1, tail=3)).granted
    assert len(books.prepare([*chain(1, 1), 7]).granted) == 1


def test_a_long_offer_is_granted_piecemeal() -> None:
    books = Books(limits=budgets(blocks=2, extents=2))
    decision = books.prepare(chain(1, 9))
    assert [header.num_blocks for header in decision.granted] == [2, 2]
    assert decision.has_more
    for header in decision.granted:
        books.ledger.complete_store(header.extent_id, 0.0)
    assert books.store(chain(1, 9))
    assert books.found(chain(1, 9)) == 9 * BLOCK_SIZE


def test_the_second_writer_of_a_block_waits_and_takes_over_on_abort() -> None:
    books = Books(dram=9)
    first = books.prepare(chain(1, 2))
    assert books.prepare(chain(1, 2)).is_busy
    assert books.prepare(chain(1, 1)).is_busy
    books.ledger.complete_store(first.granted[0].extent_id, 0.0)
    books.ledger.abort_store(first.granted[1].extent_id)
    assert [h.extent_id for h in books.prepare(chain(1, 2)).granted] == [first.granted[1].extent_id]


def test_the_second_writer_of_a_tail_waits_too() -> None:
    books = Books()
    books.prepare(chain(1, 0, tail=2))
    assert books.prepare(chain(1, 0, tail=2)).is_busy


def test_an_abort_frees_the_room_and_may_come_twice() -> None:
    books = Books(dram=1)
    extent_id = books.prepare(chain(1)).granted[0].extent_id
    assert books.prepare(chain(2)).is_full
    books.ledger.abort_store(extent_id)
    books.ledger.abort_store(extent_id)
    books.ledger.abort_store("never granted")
    assert not books.ledger.complete_store(extent_id, 0.0)
    assert books.store(chain(2))
    assert books.ledger.counters["aborted_extents"] == 1


def test_what_is_larger_than_the_whole_budget_is_said_to_be() -> None:
    books = Books(dram=0, handoff=0)
    assert books.prepare(chain(1)).is_too_big
    assert books.prepare(chain(1), handoff_owner="request").is_too_big
    assert not Books(dram=1).prepare(chain(1)).is_too_big


# -- eviction ---------------------------------------------------------------------------------------


def test_the_least_recently_used_chain_goes_first() -> None:
    books = Books(dram=3)
    for number in (1, 2, 3):
        books.store(chain(number))
    books.found(chain(1))
    books.store(chain(4))
    assert [books.found(chain(number)) for number in (1, 2, 3, 4)] == [4, 0, 4, 4]
    assert books.ledger.counters["evicted_dram_extents"] == 1
    assert books.drops == [Drop(header_of(chain(2)).extent_id, DRAM)]
    assert ExtentRemoved(header_of(chain(2)).extent_id, DRAM) in books.events


def test_nothing_is_counted_as_evicted_before_something_is() -> None:
    books = Books(disk=4)
    books.store(chain(1, 2))
    books.write_behind()
    assert set(books.ledger.counters) == {"stored_blocks", "written_extents"}


def test_descendants_go_before_their_ancestors() -> None:
    books = Books(dram=4)
    books.store(chain(1, 4))
    for number in (2, 3, 4):
        books.store(chain(number))
    evicted = [header_of(chain(1, end), end - 1).extent_id for end in (4, 3, 2)]
    assert [drop.extent_id for drop in books.drops] == evicted
    assert books.found(chain(1, 4)) == BLOCK_SIZE


def test_one_store_may_evict_most_of_a_chain_that_was_stored_root_first() -> None:
    """The root is the oldest and is passed over; an ancestor's turn comes when its descendants are picked."""
    books = Books(limits=budgets(dram=4 * IMAGE_BYTES, disk=0, blocks=40))
    for end in (1, 2, 3, 4):
        books.store(chain(1, end))
    assert len(books.ledger.held) == 4
    assert books.store(chain(2, 20))
    assert books.ledger.counters["evicted_dram_extents"] == 3
    assert books.found(chain(2, 20)) == 20 * BLOCK_SIZE
    assert books.found(chain(1, 4)) == BLOCK_SIZE


def test_a_fork_keeps_the_shared_ancestor_until_both_branches_are_gone() -> None:
    books = Books(dram=3)
    trunk = chain(1)
    books.store([*trunk, *chain(2)])
    books.store([*trunk, *chain(3)])
    books.store(chain(4))
    assert books.found(trunk) == BLOCK_SIZE
    books.store(chain(4, 2))
    books.store(chain(4, 3))
    assert books.found(trunk) == 0


def test_what_is_leased_stays() -> None:
    books = Books(dram=2)
    books.store(chain(1, 2))
    books.found(chain(1, 2), "reader", release=False)
    books.found(chain(1, 1), "other", release=False)
    assert books.prepare(chain(2)).is_full
    books.release("reader")
    assert books.store(chain(2))
    assert books.found(chain(1, 2)) == BLOCK_SIZE, "the other reader's block is still there"


def test_picking_too_little_changes_nothing() -> None:
    books = Books(limits=budgets(dram=2 * IMAGE_BYTES, disk=0, blocks=4))
    books.store(chain(1))
    books.store(chain(2))
    books.found(chain(2), "busy", release=False)
    assert books.prepare(chain(3, 4)).is_full
    assert books.found(chain(1)) == BLOCK_SIZE, "it is not sacrificed for a store that fails anyway"
    assert books.store(chain(3))
    assert books.found(chain(1)) == 0


def test_a_store_does_not_evict_its_own_beginning() -> None:
    books = Books(dram=2)
    assert not books.store(chain(1, 5)), "without a disk a chain larger than dram ends where dram ends"
    assert books.found(chain(1, 5)) == 2 * BLOCK_SIZE


def test_a_chain_larger_than_dram_moves_through_it_to_disk() -> None:
    books = Books(dram=2, disk=9)
    for _ in range(9):
        books.store(chain(1, 5))
        books.write_behind()
    assert books.found(chain(1, 5)) == 5 * BLOCK_SIZE


def test_a_write_does_not_evict_its_own_ancestors_from_disk() -> None:
    books = Books(dram=9, disk=2)
    books.store(chain(1, 4))
    assert len(books.write_behind()) == 2
    assert books.ledger.counters["dropped_writes"] == 2
    assert list(books.ledger.held.victims(DISK)) == [
        header_of(chain(1, 4)[:end], end // 4 - 1).extent_id for end in (8, 4)
    ]


def test_a_chain_that_is_stored_root_first_is_in_the_order_in_which_it_leaves() -> None:
    """No walk over its ancestors to find the one that may go; a store behind them keeps them as it is kept."""
    books = Books(dram=9, disk=9)
    books.store(chain(2))
    books.store(chain(1, 2))
    books.store(chain(3))
    books.store(chain(2, 2))
    books.write_behind()
    one, two, three = chain(1, 2), chain(2, 2), chain(3)
    expected = [header_of(one, 1), header_of(one[:4]), header_of(three), header_of(two, 1), header_of(two[:4])]
    assert list(books.ledger.held.victims(DRAM)) == [header.extent_id for header in expected]


# -- superseded tails -------------------------------------------------------------------------------


def test_superseded_tails_go_first() -> None:
    books = Books(dram=3)
    books.store(chain(1, 0, tail=3))
    books.store(chain(2))
    books.store(chain(1))
    books.found(chain(1, 0, tail=3))
    books.store(chain(3))
    assert books.drops == [Drop(header_of(chain(1, 0, tail=3)).extent_id, DRAM)]
    assert books.found(chain(1, 0, tail=3)) == 3, "the full block serves what the tail did"


def test_a_superseded_tail_is_never_written() -> None:
    books = Books(disk=9)
    books.store(chain(1, 0, tail=3))
    books.store(chain(1))
    assert books.write_behind() == [header_of(chain(1)).extent_id]
    assert len(books.ledger.held) == 1


def test_nor_is_one_that_is_being_read() -> None:
    books = Books(disk=9)
    books.store(chain(1, 0, tail=3))
    books.found(chain(1, 0, tail=3), release=False)
    books.store(chain(1))
    assert books.write_behind() == [header_of(chain(1)).extent_id]
    assert len(books.ledger.held) == 2
    books.release("reader")


def test_a_tail_that_comes_after_the_block_that_contains_it_is_superseded_at_once() -> None:
    books = Books(disk=9)
    tail, full = books.prepare(chain(1, 0, tail=3)).granted[0], books.prepare(chain(1)).granted[0]
    for header in (full, tail):
        books.ledger.complete_store(header.extent_id, 0.0)
    assert books.write_behind() == [full.extent_id]


def test_a_longer_tail_supersedes_a_shorter_one() -> None:
    books = Books(disk=9)
    books.store(chain(1, 1, tail=1))
    books.store(chain(1, 1, tail=3))
    assert len(books.write_behind()) == 2
    assert books.found(chain(1, 1, tail=3)) == BLOCK_SIZE + 3


# -- leases and expiry ------------------------------------------------------------------------------


def test_leases_of_a_dead_owner_lapse() -> None:
    books = Books(dram=1)
    books.store(chain(1))
    books.found(chain(1), release=False)
    books.now = 59.0
    books.expire()
    assert books.prepare(chain(2)).is_full
    books.now = 60.0
    books.expire()
    assert books.store(chain(2))
    assert books.ledger.counters["expired_leases"] == 1


def test_a_renewed_lease_lives_on_and_a_stranger_has_none_to_renew() -> None:
    books = Books(dram=1)
    books.store(chain(1))
    books.found(chain(1), release=False)
    books.now = 59.0
    books.ledger.renew_lease("reader", books.now)
    books.ledger.renew_lease("stranger", books.now)
    books.now = 118.0
    books.expire()
    assert books.prepare(chain(2)).is_full


def test_a_reservation_of_a_dead_writer_lapses() -> None:
    books = Books(dram=1)
    extent_id = books.prepare(chain(1)).granted[0].extent_id
    books.now = 60.0
    books.expire()
    assert not books.ledger.complete_store(extent_id, books.now)
    assert books.store(chain(1))


def test_an_extent_stored_again_under_an_old_lease_is_not_miscounted() -> None:
    books = Books()
    books.store(chain(1))
    books.found(chain(1), "old", release=False)
    books.drops += books.ledger.discard(header_of(chain(1)).extent_id, DRAM)
    books.store(chain(1))
    books.found(chain(1), "new", release=False)
    books.release("old")
    assert books.ledger.held.find(header_of(chain(1)).extent_id).num_leases == 1  # type: ignore[union-attr]
    books.release("new")


def test_ending_a_lease_twice_or_one_that_never_was_is_nothing() -> None:
    books = Books()
    books.store(chain(1))
    books.found(chain(1), release=False)
    books.release("reader")
    books.release("reader")


# -- handoff ----------------------------------------------------------------------------------------


def test_a_handoff_has_a_budget_of_its_own() -> None:
    books = Books(dram=1, handoff=2)
    books.store(chain(1))
    assert books.store(chain(2, 2), handoff_owner="request")
    assert books.prepare(chain(3), handoff_owner="request").is_full
    assert books.found(chain(1)) == BLOCK_SIZE, "and takes nothing from the cache"


def test_a_handoff_becomes_an_ordinary_extent_when_its_reader_is_done() -> None:
    books = Books(dram=2, handoff=2)
    books.store(chain(1, 2), handoff_owner="request")
    assert books.found(chain(1, 2), "request", release=False) == 2 * BLOCK_SIZE
    books.release("request")
    assert (books.ledger.room.handoff_bytes, books.ledger.room.used_bytes[DRAM]) == (0, 2 * IMAGE_BYTES)
    assert books.found(chain(1, 2)) == 2 * BLOCK_SIZE


def test_a_settled_handoff_makes_room_for_itself_or_leaves() -> None:
    books = Books(dram=1, handoff=2)
    books.store(chain(1))
    books.found(chain(1), "busy", release=False)
    books.store(chain(2), handoff_owner="request")
    books.release("request")
    assert books.found(chain(2)) == 0
    assert books.ledger.room.handoff_bytes == 0


def test_a_handoff_is_written_once_it_has_been_read() -> None:
    """Written at the same time, it would arrive later; and only once, however often it is leased again."""
    books = Books(dram=2, disk=4, handoff=2)
    books.store(chain(1), handoff_owner="request")
    books.store(chain(2))
    assert len(books.write_behind()) == 1, "what nobody waits for is"
    books.release("request")
    assert len(books.write_behind()) == 1
    books.found(chain(1))
    assert books.write_behind() == []


def test_a_handoff_that_must_first_be_written_settles_after_it() -> None:
    books = Books(dram=0, disk=4, handoff=2)
    books.store(chain(1), handoff_owner="request")
    books.release("request")
    assert books.ledger.room.handoff_bytes == IMAGE_BYTES
    books.write_behind()
    books.expire()
    assert books.ledger.room.handoff_bytes == 0
    assert books.found(chain(1)) == BLOCK_SIZE, "from disk"


@pytest.mark.parametrize("trouble", ["no room on disk", "the disk is down", "the write is given up"])
def test_a_handoff_that_can_not_be_written_does_not_stay_for_ever(trouble: str) -> None:
    books = Books(dram=0, disk=0, handoff=2, limits=budgets(0, 1 if trouble == "no room on disk" else 1 << 20))
    books.store(chain(1), handoff_owner="request")
    books.release("request")
    assert books.ledger.room.handoff_bytes == IMAGE_BYTES
    if trouble == "the disk is down":
        books.ledger.room.disk_accepts_writes = False
    elif trouble == "the write is given up":
        header = books.begin_write()
        assert header is not None
        books.ledger.disk.write_failed([header.extent_id], retry=False)
    else:
        assert books.write_behind() == []
    books.expire()
    assert books.ledger.room.handoff_bytes == 0
    assert len(books.ledger.held) == 0


def test_blocks_of_a_handoff_that_were_stored_before_are_leased_to_its_reader() -> None:
    books = Books(dram=2)
    books.store(chain(1))
    books.store(chain(1, 2), handoff_owner="request")
    books.store(chain(2))
    assert books.prepare(chain(3)).granted
    assert books.found(chain(1, 2), "request") == 2 * BLOCK_SIZE


def test_a_transient_extent_is_never_written_or_announced_and_goes_with_its_lease() -> None:
    books = Books(disk=9)
    books.store(chain(1), handoff_owner="request", transient=True)
    assert books.found(chain(1), "request", release=False) == BLOCK_SIZE
    assert books.write_behind() == []
    assert books.ledger.held.snapshot() == []
    books.release("request")
    assert books.events == []
    assert len(books.ledger.held) == 0


# -- lookups ----------------------------------------------------------------------------------------


def test_a_reader_that_has_the_beginning_needs_only_the_rest() -> None:
    books = Books(dram=9)
    books.store(chain(1, 3, tail=1))
    for first, expected in ((0, 13), (1, 13), (3, 13)):
        assert books.load(query(chain(1, 3, tail=2), first=first)) == (4 - first, expected)
    books.ledger.discard(header_of(chain(1)).extent_id, DRAM)
    assert books.found(chain(1, 3)) == 0
    assert books.load(query(chain(1, 3), first=1)) == (2, 12)


def test_a_match_may_end_inside_a_block() -> None:
    books = Books()
    books.store(chain(1, 2))
    assert books.found([*chain(1, 2)[:6], 9, 9, 9]) == 6
    assert books.found([*chain(1, 2)[:3], 9]) == 3
    assert books.found([9, *chain(1, 2)]) == 0
    assert books.ledger.counters == {"stored_blocks": 2, "load_hits": 2, "load_misses": 1}


def test_the_state_can_be_read_off() -> None:
    books = Books(dram=2, disk=3)
    books.store(chain(1))
    assert repr(books.ledger) == (
        f"<Ledger 1 extents, dram {IMAGE_BYTES}/{2 * IMAGE_BYTES}, disk 0/{3 * IMAGE_BYTES}, 1 to write, 0 leases>"
    )
    assert books.ledger.held.num_blocks == 1
