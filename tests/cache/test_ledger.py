"""The ledger's decisions, one law at a time. `test_ledger_machine.py` mixes them all."""

from collections.abc import Sequence

import pytest

from cache.events import Event, ExtentRemoved, ExtentStored, Tier
from cache.extent import ExtentHeader
from cache.ledger import Budgets, Drop, Ledger, StoreDecision
from tests.cache.chains import BLOCK_SIZE, IMAGE_BYTES, budgets, header_of, offer, query

DRAM, DISK = Tier.DRAM, Tier.DISK


class Books:
    """A ledger of extents of one block, with the verbs of its caller and a clock that is told the time."""

    def __init__(self, dram: int = 4, disk: int = 0, handoff: int = 4, limits: Budgets | None = None) -> None:
        sizes = (number * IMAGE_BYTES for number in (dram, disk, handoff))
        self.events: list[Event] = []
        self.ledger = Ledger(limits or budgets(*sizes), self.events.append, lease_ttl_s=60.0)
        self.now = 0.0
        self.drops: list[Drop] = []

    def prepare(
        self, tokens: Sequence[int], handoff_owner: str | None = None, transient: bool = False
    ) -> StoreDecision:
        decision = self.ledger.prepare_store(
            offer(tokens, handoff_owner=handoff_owner, is_transient=transient), self.now
        )
        self.drops += decision.drops
        self.ledger.check_integrity()
        return decision

    def store(self, tokens: Sequence[int], handoff_owner: str | None = None, transient: bool = False) -> bool:
        """Offer and complete until all is stored; False if some was refused."""
        while True:
            decision = self.prepare(tokens, handoff_owner, transient)
            for header in decision.granted:
                assert self.ledger.complete_store(header.extent_id, self.now)
                self.ledger.check_integrity()
            if not decision.granted or not decision.has_more:
                return not (decision.is_full or decision.is_busy)

    def write_behind(self) -> list[str]:
        """Write everything that is dirty; the ids written."""
        written: list[str] = []
        while True:
            header, drops = self.ledger.next_write()
            self.drops += drops
            self.ledger.check_integrity()
            if header is None:
                return written
            self.drops += self.ledger.written(header.extent_id)
            self.ledger.check_integrity()
            written.append(header.extent_id)

    def found(self, tokens: Sequence[int], owner: str = "reader", *, release: bool = True) -> int:
        _, num_tokens = self.ledger.prepare_load(query(tokens, owner), self.now)
        self.ledger.check_integrity()
        if release:
            self.release(owner)
        return num_tokens

    def release(self, owner: str) -> None:
        self.drops += self.ledger.complete_load(owner)
        self.ledger.check_integrity()

    def expire(self) -> None:
        self.drops += self.ledger.expire(self.now)
        self.ledger.check_integrity()


def chain(number: int, num_blocks: int = 1, tail: int = 0) -> list[int]:
    return [number * 1000 + i for i in range(num_blocks * BLOCK_SIZE + tail)]


def last_extent(tokens: Sequence[int]) -> ExtentHeader:
    return header_of(tokens, first=max(0, (len(tokens) - 1) // BLOCK_SIZE))


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
    assert granted[0].parent_hash == last_extent(chain(1, 2)).block_hashes[0]


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
    assert books.ledger.num_extents == 4
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
    assert books.ledger.disk_order() == [header_of(chain(1, 4)[:end], end // 4 - 1).extent_id for end in (4, 8)]


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
    assert books.ledger.num_extents == 1


def test_nor_is_one_that_is_being_read() -> None:
    books = Books(disk=9)
    books.store(chain(1, 0, tail=3))
    books.found(chain(1, 0, tail=3), release=False)
    books.store(chain(1))
    assert books.write_behind() == [header_of(chain(1)).extent_id]
    assert books.ledger.num_extents == 2
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
    assert books.ledger.find(header_of(chain(1)).extent_id).num_leases == 1  # type: ignore[union-attr]
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
    assert (books.ledger.handoff_bytes, books.ledger.used_bytes[DRAM]) == (0, 2 * IMAGE_BYTES)
    assert books.found(chain(1, 2)) == 2 * BLOCK_SIZE


def test_a_settled_handoff_makes_room_for_itself_or_leaves() -> None:
    books = Books(dram=1, handoff=2)
    books.store(chain(1))
    books.found(chain(1), "busy", release=False)
    books.store(chain(2), handoff_owner="request")
    books.release("request")
    assert books.found(chain(2)) == 0
    assert books.ledger.handoff_bytes == 0


def test_a_handoff_that_must_first_be_written_settles_after_it() -> None:
    books = Books(dram=0, disk=4, handoff=2)
    books.store(chain(1), handoff_owner="request")
    books.release("request")
    assert books.ledger.handoff_bytes == IMAGE_BYTES
    books.write_behind()
    books.expire()
    assert books.ledger.handoff_bytes == 0
    assert books.found(chain(1)) == BLOCK_SIZE, "from disk"


@pytest.mark.parametrize("trouble", ["no room on disk", "the disk is down", "the write is given up"])
def test_a_handoff_that_can_not_be_written_does_not_stay_for_ever(trouble: str) -> None:
    books = Books(dram=0, disk=0, handoff=2, limits=budgets(0, 1 if trouble == "no room on disk" else 1 << 20))
    books.store(chain(1), handoff_owner="request")
    books.release("request")
    assert books.ledger.handoff_bytes == IMAGE_BYTES
    if trouble == "the disk is down":
        books.ledger.disk_accepts_writes = False
    elif trouble == "the write is given up":
        header, _ = books.ledger.next_write()
        assert header is not None
        books.ledger.write_failed(header.extent_id, retry=False)
    else:
        assert books.write_behind() == []
    books.expire()
    assert books.ledger.handoff_bytes == 0
    assert books.ledger.num_extents == 0


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
    assert books.ledger.snapshot() == []
    books.release("request")
    assert books.events == []
    assert books.ledger.num_extents == 0


# -- disk -------------------------------------------------------------------------------------------


def test_what_is_dirty_does_not_leave_dram() -> None:
    books = Books(dram=1, disk=4)
    books.store(chain(1))
    assert books.prepare(chain(2)).is_full
    books.write_behind()
    assert books.store(chain(2))
    assert books.found(chain(1)) == BLOCK_SIZE
    assert books.ledger.dirty_bytes == IMAGE_BYTES


def test_unless_the_disk_takes_nothing() -> None:
    books = Books(dram=1, disk=4)
    books.ledger.disk_accepts_writes = False
    books.store(chain(1))
    assert books.store(chain(2))
    assert books.ledger.num_extents == 1


def test_a_failed_write_is_tried_again_or_given_up() -> None:
    books = Books(disk=4)
    books.store(chain(1))
    for retry in (True, False):
        header, _ = books.ledger.next_write()
        assert header is not None
        assert books.ledger.has_dirty
        books.ledger.write_failed(header.extent_id, retry=retry)
        books.ledger.check_integrity()
        assert books.ledger.has_dirty == retry
    assert books.found(chain(1)) == BLOCK_SIZE


def test_an_image_whose_file_was_bad_is_written_again() -> None:
    books = Books(disk=4)
    books.store(chain(1))
    books.write_behind()
    books.drops += books.ledger.discard(header_of(chain(1)).extent_id, DISK)
    books.ledger.check_integrity()
    assert books.write_behind() == [header_of(chain(1)).extent_id]


def test_an_image_found_bad_while_it_is_written_is_not_believed_on_disk() -> None:
    books = Books(disk=4)
    books.store(chain(1))
    header, _ = books.ledger.next_write()
    assert header is not None
    books.drops += books.ledger.discard(header.extent_id, DRAM)
    assert books.found(chain(1)) == 0
    assert books.ledger.written(header.extent_id) == [Drop(header.extent_id, DISK)]
    books.ledger.check_integrity()
    assert books.store(chain(1))


def test_and_a_failed_write_of_it_leaves_nothing() -> None:
    books = Books(disk=4)
    books.store(chain(1))
    header, _ = books.ledger.next_write()
    assert header is not None
    books.ledger.discard(header.extent_id, DRAM)
    books.ledger.write_failed(header.extent_id, retry=True)
    books.ledger.check_integrity()
    assert books.ledger.num_extents == 0


def test_a_full_disk_tier_evicts_by_its_own_order() -> None:
    books = Books(dram=9, disk=2)
    for number in (1, 2, 3):
        books.store(chain(number))
        books.write_behind()
    assert books.drops == [Drop(header_of(chain(1)).extent_id, DISK)]
    assert books.found(chain(1)) == BLOCK_SIZE, "still in dram"


def test_promotion_reserves_and_ends_either_way() -> None:
    books = Books(dram=1, disk=4)
    books.store(chain(1))
    books.write_behind()
    books.store(chain(2))
    books.write_behind()
    extent_id = header_of(chain(1)).extent_id
    for succeeded in (False, True):
        drops = books.ledger.prepare_promote(extent_id)
        assert drops is not None
        books.ledger.check_integrity()
        assert books.ledger.prepare_promote(extent_id) is None
        books.ledger.complete_promote(extent_id, succeeded=succeeded)
        books.ledger.check_integrity()
    assert books.ledger.find(extent_id).in_dram  # type: ignore[union-attr]
    assert books.ledger.prepare_promote("never seen") is None


def test_a_promotion_whose_file_turns_out_bad_leaves_nothing() -> None:
    books = Books(dram=1, disk=4)
    header = header_of(chain(1))
    assert books.ledger.recover(header)
    assert books.ledger.prepare_promote(header.extent_id) == []
    books.ledger.discard(header.extent_id, DISK)
    assert books.found(chain(1)) == 0
    books.ledger.complete_promote(header.extent_id, succeeded=False)
    books.ledger.check_integrity()
    assert books.ledger.num_extents == 0


def test_what_is_being_promoted_stays_on_disk() -> None:
    books = Books(dram=9, disk=1)
    header = header_of(chain(1))
    books.ledger.recover(header)
    assert books.ledger.prepare_promote(header.extent_id) == []
    books.store(chain(2))
    assert books.write_behind() == []
    books.ledger.complete_promote(header.extent_id, succeeded=True)


def test_the_second_hit_earns_a_promotion() -> None:
    books = Books(disk=4)
    books.ledger.recover(header_of(chain(1)))
    extent = books.ledger.find(header_of(chain(1)).extent_id)
    assert extent is not None
    assert [books.ledger.note_disk_hit(extent) for _ in range(3)] == [False, True, True]


# -- recovery ---------------------------------------------------------------------------------------


def test_recovered_extents_are_found_and_superseded_tails_go_first() -> None:
    books = Books(disk=3)
    for header in (header_of(chain(1)), header_of(chain(1, 0, tail=2)), header_of(chain(2))):
        assert books.ledger.recover(header)
    books.ledger.check_integrity()
    assert books.found(chain(1)) == BLOCK_SIZE
    books.store(chain(3))
    books.write_behind()
    assert books.drops == [Drop(header_of(chain(1, 0, tail=2)).extent_id, DISK)]


def test_a_block_that_lies_in_two_files_is_recovered_once() -> None:
    books = Books(disk=9)
    assert books.ledger.recover(header_of(chain(1, 2)))
    assert not books.ledger.recover(header_of(chain(1, 3), first=1))
    books.ledger.check_integrity()
    books.ledger.discard(header_of(chain(1, 2)).extent_id, DISK)
    books.ledger.check_integrity()
    assert books.ledger.num_extents == 0


def test_a_smaller_disk_budget_shrinks_what_was_recovered_leaf_first() -> None:
    books = Books(disk=1)
    for first in range(3):
        books.ledger.recover(header_of(chain(1, first + 1), first))
    assert [drop.extent_id for drop in books.ledger.shrink_disk()] == [
        header_of(chain(1, end), end - 1).extent_id for end in (3, 2)
    ]
    books.ledger.check_integrity()


# -- lookups ----------------------------------------------------------------------------------------


def test_a_reader_that_has_the_beginning_needs_only_the_rest() -> None:
    books = Books(dram=9)
    books.store(chain(1, 3, tail=1))
    for first, expected in ((0, 13), (1, 13), (3, 13)):
        places, num_tokens = books.ledger.prepare_load(query(chain(1, 3, tail=2), first=first), 0.0)
        assert (len(places), num_tokens) == (4 - first, expected)
    books.ledger.discard(header_of(chain(1)).extent_id, DRAM)
    assert books.found(chain(1, 3)) == 0
    places, num_tokens = books.ledger.prepare_load(query(chain(1, 3), first=1), 0.0)
    assert (len(places), num_tokens) == (2, 12)


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
    assert books.ledger.num_blocks == 1
