"""Deleting on a user's order: what is meant, what stays for others, and that nothing of it is left anywhere."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from cache.client import WarehouseClient
from cache.events import ExtentRemoved, Tier
from cache.extent import Origin
from cache.hashing import TOKEN_BYTES, BlockHash, as_token_ids
from cache.messages import PurgeQuery, PurgeReceipt
from cache.node_store import NodeStore
from cache.occupancy import Drop
from tests.cache.books import Books, chain
from tests.cache.chains import (
    IMAGE_BYTES,
    ROOT,
    budgets,
    fill,
    header_of,
    offer,
    query,
    root_of,
    sealed_image,
    store_config,
)
from tests.cache.failing_files import FailingFiles
from tests.cache.stores import counter, damage, extent_files, in_thread, open_store, read, wait_until

DRAM, DISK = Tier.DRAM, Tier.DISK
ANNA, BERT = Origin("acme", "anna"), Origin("acme", "bert")
ANNAS, BERTS = PurgeQuery(session="anna"), PurgeQuery(session="bert")


def test_a_purge_of_nothing_in_particular_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a tenant, a session or a fingerprint"):
        PurgeQuery()


@pytest.mark.parametrize(
    ("asked", "is_meant"),
    [
        (PurgeQuery(tenant="acme"), True),
        (PurgeQuery(session="anna"), True),
        (PurgeQuery(root_hash=ROOT), True),
        (PurgeQuery("acme", "anna", ROOT), True),
        (PurgeQuery("acme", "bert"), False),
        (PurgeQuery("other", "anna"), False),
        (PurgeQuery(session="anna", root_hash=root_of("others")), False),
        (PurgeQuery(tenant=""), False),
    ],
)
def test_everything_that_is_given_must_apply(asked: PurgeQuery, *, is_meant: bool) -> None:
    assert asked.means(replace(header_of(range(4)), origin=ANNA)) == is_meant


def test_receipts_of_several_node_stores_add_up() -> None:
    assert PurgeReceipt.sum_of([]) == PurgeReceipt()
    receipts = [PurgeReceipt(1, 2, 3, 4, 5, 6, 7, 8), PurgeReceipt(10, 20, 30, 40, 50, 60, 70, 80)]
    assert PurgeReceipt.sum_of(receipts) == PurgeReceipt(11, 22, 33, 44, 55, 66, 77, 88)


# -- the ledger -------------------------------------------------------------------------------------


def put(books: Books, tokens: Sequence[int], origin: Origin, root: BlockHash = ROOT) -> None:
    assert books.store_offer(offer(tokens, root=root, origin=origin))


def test_a_session_goes_and_others_stay() -> None:
    books = Books(dram=9, disk=9)
    put(books, chain(1, 2, tail=2), ANNA)
    put(books, chain(2, 2), BERT)
    assert len(books.write_behind()) == 5
    receipt = books.purge(ANNAS)
    in_bytes = 2 * IMAGE_BYTES + header_of(chain(1, 2, tail=2), first=2).image_bytes
    assert receipt == PurgeReceipt(3, 3, 10, in_bytes, in_bytes, num_files=3)
    assert (books.found(chain(1, 2, tail=2)), books.found(chain(2, 2))) == (0, 8)
    assert len(books.drops) == 6
    assert sum(isinstance(event, ExtentRemoved) for event in books.events) == 6
    assert books.purge(ANNAS) == PurgeReceipt()


def test_what_only_one_tier_holds_is_counted_for_that_one() -> None:
    books = Books(dram=1, disk=9)
    put(books, chain(1), ANNA)
    books.write_behind()
    put(books, chain(2), ANNA)
    receipt = books.purge(ANNAS)
    assert (receipt.num_extents, receipt.dram_bytes, receipt.disk_bytes) == (2, IMAGE_BYTES, IMAGE_BYTES)
    assert (receipt.num_files, receipt.num_tokens) == (1, 8)
    assert books.write_behind() == [], "what was dirty is not written any more"


def test_a_tenant_and_a_fingerprint_go_whole() -> None:
    books = Books(dram=9)
    other = root_of("others")
    put(books, chain(1, 2), ANNA)
    put(books, chain(1, 3), BERT)
    put(books, chain(1, 2), ANNA, root=other)
    put(books, chain(2), Origin("globex", "anna"))
    assert books.purge(PurgeQuery("acme", root_hash=other)).num_extents == 2
    assert books.found(chain(1, 3)) == 12
    receipt = books.purge(PurgeQuery("acme"))
    assert (receipt.num_extents, receipt.num_kept_blocks) == (3, 0), "a tenant's sessions do not keep each other's"
    assert (books.found(chain(1, 3)), books.found(chain(2))) == (0, 4)
    assert books.purge(PurgeQuery(root_hash=ROOT)).num_extents == 1
    assert len(books.ledger.held) == 0


def test_a_block_that_is_history_of_another_session_is_kept_and_counted() -> None:
    books = Books(dram=9)
    put(books, chain(1, 3), ANNA)
    put(books, [*chain(1, 2), 7, 7, 7, 7], BERT)
    receipt = books.purge(ANNAS)
    assert (receipt.num_blocks, receipt.num_kept_blocks) == (1, 2)
    assert books.found([*chain(1, 2), 7, 7, 7, 7]) == 12
    assert books.found(chain(1, 3)) == 8
    assert books.purge(BERTS).num_blocks == 1
    receipt = books.purge(ANNAS)
    assert (receipt.num_blocks, receipt.num_kept_blocks) == (2, 0), "nobody needs them any more"
    assert len(books.ledger.held) == 0


def test_an_extent_on_whose_middle_another_session_hangs_is_kept_whole() -> None:
    books = Books(limits=budgets(blocks=4))
    put(books, chain(1, 4), ANNA)
    put(books, [*chain(1, 1), 7, 7, 7, 7], BERT)
    receipt = books.purge(ANNAS)
    assert (receipt.num_extents, receipt.num_kept_blocks) == (0, 4)


def test_history_is_kept_for_what_another_session_is_just_making() -> None:
    books = Books(dram=9)
    put(books, chain(1, 2), ANNA)
    granted = books.offer(offer(chain(1, 3), origin=BERT)).granted
    assert books.purge(ANNAS).num_kept_blocks == 2
    assert books.ledger.complete_store(granted[0].extent_id, 0.0)
    assert books.found(chain(1, 3)) == 12


def test_what_is_read_is_purged_and_its_lease_ends_in_peace() -> None:
    books = Books(dram=1, handoff=4)
    assert books.store_offer(offer(chain(1, 2), handoff_owner="request", origin=ANNA))
    assert books.found(chain(1, 2), "reader", release=False) == 8
    assert books.purge(ANNAS).num_extents == 2
    assert books.ledger.room.handoff_bytes == 0
    assert books.store(chain(1)), "and may come again under the old lease"
    books.release("reader")
    books.release("request")
    assert books.store(chain(2))
    books.ledger.check_integrity()


def test_what_is_being_made_can_not_be_completed() -> None:
    books = Books(dram=9)
    header = books.offer(offer(chain(1), origin=ANNA)).granted[0]
    assert books.purge(ANNAS).num_extents == 1
    assert not books.ledger.complete_store(header.extent_id, 0.0)
    books.ledger.abort_store(header.extent_id)
    assert len(books.ledger.held) == 0
    assert books.store(chain(1))


@pytest.mark.parametrize("ends", ["written", "failed", "given up"])
def test_what_is_being_written_leaves_no_file(ends: str) -> None:
    books = Books(dram=9, disk=9)
    put(books, chain(1), ANNA)
    header = books.begin_write()
    assert header is not None
    receipt = books.purge(ANNAS)
    assert (receipt.num_extents, receipt.num_files, receipt.dram_bytes) == (1, 0, IMAGE_BYTES)
    assert books.found(chain(1)) == 0
    if ends == "written":
        assert books.ledger.disk.written(header.extent_id) == [Drop(header.extent_id, DISK)]
    else:
        books.ledger.disk.write_failed([header.extent_id], retry=ends == "failed")
    books.ledger.check_integrity()
    assert len(books.ledger.held) == 0
    assert books.write_behind() == []


@pytest.mark.parametrize("succeeded", [True, False])
def test_what_is_being_promoted_does_not_come_up(*, succeeded: bool) -> None:
    books = Books(dram=9, disk=9)
    header = replace(header_of(chain(1)), origin=ANNA)
    books.ledger.disk.recover([header])
    assert books.ledger.disk.prepare_promote(header.extent_id) == []
    assert books.purge(ANNAS).num_files == 1
    assert books.drops == [Drop(header.extent_id, DISK)]
    assert not books.ledger.disk.complete_promote(header.extent_id, succeeded=succeeded)
    books.ledger.check_integrity()
    assert (len(books.ledger.held), books.ledger.room.used_bytes[DRAM]) == (0, 0)


# -- the node store ---------------------------------------------------------------------------------

# Ids that are found in no file by chance.
ANNA_TOKENS = [0x5EC23700 + i for i in range(14)]
BERT_TOKENS = [0x0BE27700 + i for i in range(14)]


def store_for(store: NodeStore, tokens: list[int], origin: Origin) -> None:
    assert WarehouseClient(store).store(offer(tokens, origin=origin), fill)


def places_with(folder: Path, tokens: list[int]) -> list[str]:
    """Files in which some of the tokens' ids stand, in either order of bytes."""
    wanted = [as_token_ids(tokens[at : at + 2]) for at in range(len(tokens) - 1)]
    patterns = [ids.astype(form).tobytes() for ids in wanted for form in ("<i4", ">i4")]
    assert all(len(pattern) == 2 * TOKEN_BYTES for pattern in patterns)
    found: list[str] = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and any(pattern in path.read_bytes() for pattern in patterns):
            found.append(path.name if path.suffix != ".kv" else "extent")
    return found


@pytest.mark.parametrize("when", ["dirty", "durable", "restarted", "promoted"])
def test_nothing_is_found_and_nothing_is_left(tmp_path: Path, when: str) -> None:
    folder = tmp_path / "w"
    store = open_store(folder)
    store_for(store, BERT_TOKENS, BERT)
    store_for(store, ANNA_TOKENS, ANNA)
    if when != "dirty":
        assert store.flush()
        assert "extent" in places_with(folder, ANNA_TOKENS), "what is looked for can be seen"
    if when in ("restarted", "promoted"):
        store.close()
        assert "index.sqlite" in places_with(folder, ANNA_TOKENS)
        store = open_store(folder)
    if when == "promoted":
        for _ in range(2):
            read(store, ANNA_TOKENS)
        wait_until(lambda: counter(store, "promoted_extents") == 4)
    with store:
        receipt = store.purge(ANNAS)
        assert (receipt.num_extents, receipt.num_blocks, receipt.num_tokens) == (4, 4, 14)
        assert (receipt.num_left, receipt.num_kept_blocks) == (0, 0)
        assert WarehouseClient(store).lookup(query(ANNA_TOKENS)).pieces == ()
        assert places_with(folder, ANNA_TOKENS) == [], "not even before the store is closed"
        assert read(store, BERT_TOKENS)[0] == 14
        store.check_integrity()
    assert places_with(folder, ANNA_TOKENS) == []
    with open_store(folder) as store:
        assert (read(store, ANNA_TOKENS)[0], read(store, BERT_TOKENS)[0]) == (0, 14)


def test_bad_images_that_were_set_aside_go_too(tmp_path: Path) -> None:
    folder = tmp_path / "w"
    with open_store(folder) as store:
        store_for(store, ANNA_TOKENS, ANNA)
    bad = header_of(ANNA_TOKENS[:4]).extent_id
    damage(folder, bad)
    with open_store(folder) as store:
        read(store, ANNA_TOKENS)
        wait_until(lambda: (folder / "quarantine" / f"{bad}.kv").exists())
        assert store.purge(ANNAS).num_extents == 3
        assert list((folder / "quarantine").iterdir()) == []
        assert places_with(folder, ANNA_TOKENS) == []


def test_a_purge_in_the_middle_of_a_store_ends_it(tmp_path: Path) -> None:
    with open_store(tmp_path / "w") as store:
        header = store.prepare_store(offer(ANNA_TOKENS[:4], origin=ANNA)).extents[0]
        assert store.purge(ANNAS).num_extents == 1
        assert not store.complete_store(header.extent_id, sealed_image(header))
        assert read(store, ANNA_TOKENS)[0] == 0
        assert store.stats().dram_bytes == 0


def test_the_other_sessions_history_stays_readable(tmp_path: Path) -> None:
    fork = [*ANNA_TOKENS[:8], *BERT_TOKENS[:4]]
    with open_store(tmp_path / "w") as store:
        store_for(store, ANNA_TOKENS, ANNA)
        store_for(store, fork, BERT)
        receipt = store.purge(ANNAS)
        assert (receipt.num_blocks, receipt.num_kept_blocks, receipt.num_left) == (2, 2, 0)
        assert read(store, fork)[0] == 12
        assert store.flush()
        assert len(extent_files(tmp_path / "w")) == 3


def test_who_stored_it_survives_a_restart_and_the_loss_of_the_index(tmp_path: Path) -> None:
    folder = tmp_path / "w"
    with open_store(folder) as store:
        store_for(store, ANNA_TOKENS, ANNA)
    (folder / "index.sqlite").unlink()
    with open_store(folder) as store:
        assert store.purge(PurgeQuery("acme", "bert")).num_extents == 0
        assert store.purge(PurgeQuery("acme", "anna")).num_files == 4
        assert extent_files(folder) == []


def test_a_file_that_can_not_be_deleted_is_said_to_be_left(tmp_path: Path) -> None:
    files = FailingFiles()
    with open_store(tmp_path / "w", store_config(retry_s=0.05), files) as store:
        store_for(store, ANNA_TOKENS[:4], ANNA)
        assert store.flush()
        files.fails = "unlink"
        receipt = store.purge(ANNAS, wait_s=0.3)
        assert (receipt.num_extents, receipt.num_files, receipt.num_left) == (1, 1, 1)
        assert WarehouseClient(store).lookup(query(ANNA_TOKENS)).pieces == (), "but is not found"
        files.fails = None
        wait_until(lambda: not store._worker._removals)
        assert store.purge(ANNAS).num_left == 0
        store.check_integrity()


def test_a_purge_waits_for_writes_that_are_to_be_made_durable_together(tmp_path: Path) -> None:
    with open_store(tmp_path / "w", store_config(commit_interval_s=1000.0)) as store:
        store_for(store, ANNA_TOKENS, ANNA)
        wait_until(lambda: len(list((tmp_path / "w" / "tmp").iterdir())) == 4)
        thread, answers = in_thread(lambda: store.purge(ANNAS, wait_s=60.0))
        thread.join(20.0)
        assert [receipt.num_left for receipt in answers if isinstance(receipt, PurgeReceipt)] == [0]
        assert (extent_files(tmp_path / "w"), places_with(tmp_path / "w", ANNA_TOKENS)) == ([], [])


def test_dram_alone_can_be_purged_too() -> None:
    with open_store(None) as store:
        store_for(store, ANNA_TOKENS, ANNA)
        receipt = store.purge(ANNAS)
        assert (receipt.num_blocks, receipt.num_files, receipt.disk_bytes, receipt.num_left) == (4, 0, 0, 0)
        assert read(store, ANNA_TOKENS)[0] == 0
