"""What is written next, what a failure costs, what comes up again and what a folder held."""

from dataclasses import replace

from cache.events import Tier
from cache.occupancy import Drop
from tests.cache.books import Books, chain
from tests.cache.chains import BLOCK_SIZE, IMAGE_BYTES, budgets, header_of

DRAM, DISK = Tier.DRAM, Tier.DISK


# -- writing ----------------------------------------------------------------------------------------


def test_what_is_dirty_does_not_leave_dram() -> None:
    books = Books(dram=1, disk=4)
    books.store(chain(1))
    assert books.prepare(chain(2)).is_full
    books.write_behind()
    assert books.store(chain(2))
    assert books.found(chain(1)) == BLOCK_SIZE
    assert books.ledger.room.dirty_bytes == IMAGE_BYTES


def test_unless_the_disk_takes_nothing() -> None:
    books = Books(dram=1, disk=4)
    books.ledger.room.disk_accepts_writes = False
    books.store(chain(1))
    assert books.store(chain(2))
    assert len(books.ledger.held) == 1


def test_a_failed_write_is_tried_again_or_given_up() -> None:
    books = Books(disk=4)
    books.store(chain(1))
    for retry in (True, False):
        header = books.begin_write()
        assert header is not None
        assert books.ledger.has_dirty
        books.ledger.disk.write_failed([header.extent_id], retry=retry)
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
    header = books.begin_write()
    assert header is not None
    books.drops += books.ledger.discard(header.extent_id, DRAM)
    assert books.found(chain(1)) == 0
    assert books.ledger.disk.written(header.extent_id) == [Drop(header.extent_id, DISK)]
    books.ledger.check_integrity()
    assert books.store(chain(1))


def test_and_a_failed_write_of_it_leaves_nothing() -> None:
    books = Books(disk=4)
    books.store(chain(1))
    header = books.begin_write()
    assert header is not None
    books.ledger.discard(header.extent_id, DRAM)
    books.ledger.disk.write_failed([header.extent_id], retry=True)
    books.ledger.check_integrity()
    assert len(books.ledger.held) == 0


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
        drops = books.ledger.disk.prepare_promote(extent_id)
        assert drops is not None
        books.ledger.check_integrity()
        assert books.ledger.disk.prepare_promote(extent_id) is None
        books.ledger.disk.complete_promote(extent_id, succeeded=succeeded)
        books.ledger.check_integrity()
    assert books.ledger.held.find(extent_id).in_dram  # type: ignore[union-attr]
    assert books.ledger.disk.prepare_promote("never seen") is None


def test_a_promotion_whose_file_turns_out_bad_leaves_nothing() -> None:
    books = Books(dram=1, disk=4)
    header = header_of(chain(1))
    assert books.ledger.disk.recover([header]) == []
    assert books.ledger.disk.prepare_promote(header.extent_id) == []
    books.ledger.discard(header.extent_id, DISK)
    assert books.found(chain(1)) == 0
    books.ledger.disk.complete_promote(header.extent_id, succeeded=False)
    books.ledger.check_integrity()
    assert len(books.ledger.held) == 0


def test_what_is_being_promoted_stays_on_disk() -> None:
    books = Books(dram=9, disk=1)
    header = header_of(chain(1))
    assert books.ledger.disk.recover([header]) == []
    assert books.ledger.disk.prepare_promote(header.extent_id) == []
    books.store(chain(2))
    assert books.write_behind() == []
    books.ledger.disk.complete_promote(header.extent_id, succeeded=True)


# -- recovery ---------------------------------------------------------------------------------------


def test_recovered_extents_are_found_and_superseded_tails_go_first() -> None:
    books = Books(disk=3)
    headers = (header_of(chain(1)), header_of(chain(1, 0, tail=2)), header_of(chain(2)))
    assert books.ledger.disk.recover(headers) == []
    books.ledger.check_integrity()
    assert books.found(chain(1)) == BLOCK_SIZE
    books.store(chain(3))
    books.write_behind()
    assert books.drops == [Drop(header_of(chain(1, 0, tail=2)).extent_id, DISK)]


def test_a_block_that_lies_in_two_files_is_recovered_once() -> None:
    books = Books(disk=9)
    twice = header_of(chain(1, 3), first=1)
    assert books.ledger.disk.recover([header_of(chain(1, 2)), twice]) == [Drop(twice.extent_id, DISK)]
    books.ledger.check_integrity()
    books.ledger.discard(header_of(chain(1, 2)).extent_id, DISK)
    books.ledger.check_integrity()
    assert len(books.ledger.held) == 0


def test_a_smaller_disk_budget_shrinks_what_was_recovered_leaf_first() -> None:
    books = Books(disk=1)
    drops = books.ledger.disk.recover(header_of(chain(1, first + 1), first) for first in range(3))
    assert [drop.extent_id for drop in drops] == [header_of(chain(1, end), end - 1).extent_id for end in (3, 2)]
    books.ledger.check_integrity()


# -- more to write than may wait --------------------------------------------------------------------


def waiting_at_most(num_extents: int) -> Books:
    return Books(limits=replace(budgets(9 * IMAGE_BYTES, 9 * IMAGE_BYTES), dirty_bytes=num_extents * IMAGE_BYTES))


def test_beyond_what_may_wait_new_extents_stay_in_dram_only() -> None:
    books = waiting_at_most(2)
    books.store(chain(1, 4))
    assert books.ledger.room.dirty_bytes == 2 * IMAGE_BYTES
    assert books.ledger.counters["dropped_writes"] == 2
    assert len(books.write_behind()) == 2
    assert books.found(chain(1, 4)) == 4 * BLOCK_SIZE, "and are found all the same"
    books.store(chain(2))
    assert books.write_behind() == [header_of(chain(2)).extent_id], "room again, written again"


def test_what_is_being_written_waits_too_and_what_is_given_up_does_not() -> None:
    books = waiting_at_most(1)
    books.store(chain(1))
    header = books.begin_write()
    assert header is not None
    books.store(chain(2))
    assert books.ledger.counters["dropped_writes"] == 1
    books.ledger.disk.write_failed([header.extent_id], retry=False)
    books.store(chain(3))
    assert books.write_behind() == [header_of(chain(3)).extent_id]


def test_a_write_that_was_dropped_does_not_hold_its_extent_in_dram() -> None:
    books = Books(limits=replace(budgets(2 * IMAGE_BYTES, 9 * IMAGE_BYTES), dirty_bytes=0))
    for number in range(1, 5):
        assert books.store(chain(number))
    assert [books.found(chain(number)) for number in range(1, 5)] == [0, 0, 4, 4]
    assert books.drops == [Drop(header_of(chain(number)).extent_id, DRAM) for number in (1, 2)]


def test_extents_that_failed_together_are_written_again_in_their_order_and_first() -> None:
    books = Books(dram=9, disk=9)
    for number in (1, 2, 3):
        books.store(chain(number))
    failed = [header.extent_id for header in (books.begin_write(), books.begin_write()) if header is not None]
    books.ledger.disk.write_failed(failed, retry=True)
    books.ledger.check_integrity()
    assert books.write_behind() == [header_of(chain(number)).extent_id for number in (1, 2, 3)]


# -- another folder in the place of the one known ---------------------------------------------------


def test_an_empty_folder_gets_what_dram_still_holds() -> None:
    books = Books(dram=2, disk=9)
    for number in (1, 2, 3):
        books.store(chain(number))
        books.write_behind()
    books.drops += books.ledger.disk.replace_disk([])
    books.ledger.check_integrity()
    assert [books.found(chain(number)) for number in (1, 2, 3)] == [0, 4, 4]
    assert books.write_behind() == [header_of(chain(number)).extent_id for number in (2, 3)]


def test_another_folders_extents_are_found_and_copies_of_what_is_in_dram_are_not_kept() -> None:
    books = Books(dram=1, disk=9)
    for number in (1, 2):
        books.store(chain(number))
        books.write_behind()
    books.drops.clear()
    same, foreign = header_of(chain(2)), header_of(chain(3))
    books.drops += books.ledger.disk.replace_disk([same, foreign])
    books.ledger.check_integrity()
    assert Drop(same.extent_id, DISK) in books.drops
    assert Drop(foreign.extent_id, DISK) not in books.drops
    assert [books.found(chain(number)) for number in (1, 2, 3)] == [0, 4, 4]
    assert books.write_behind() == [same.extent_id]


def test_a_folder_whose_extent_covers_a_part_that_is_in_dram_is_not_believed() -> None:
    """Dram holds a chain's second block alone; the new folder holds both in one extent."""
    books = Books(dram=1, disk=9)
    first, second = header_of(chain(1)), header_of(chain(1, 2), first=1)
    books.ledger.disk.recover([first, second])
    assert books.ledger.disk.prepare_promote(second.extent_id) == []
    assert books.ledger.disk.complete_promote(second.extent_id, succeeded=True)
    both = header_of(chain(1, 2))
    assert Drop(both.extent_id, DISK) in books.ledger.disk.replace_disk([both])
    books.ledger.check_integrity()
    assert books.write_behind() == [second.extent_id]


def test_a_promotion_under_way_does_not_survive_its_folder() -> None:
    books = Books(dram=1, disk=9)
    header = header_of(chain(1))
    books.ledger.disk.recover([header])
    assert books.ledger.disk.prepare_promote(header.extent_id) == []
    assert books.ledger.disk.replace_disk([]) == []
    books.ledger.check_integrity()
    assert not books.ledger.disk.complete_promote(header.extent_id, succeeded=True)
    books.ledger.check_integrity()
    assert len(books.ledger.held) == 0
