"""A folder with encrypted extents whose key is not there: they take room, go first, can be purged, and are no error."""

import logging
from pathlib import Path

import pytest

from cache.client import WarehouseClient
from cache.events import Tier
from cache.ledger import Ledger
from cache.messages import PurgeQuery
from cache.node_store import NodeStore
from cache.offline import purge_everything, purge_folder, rebuild_index, verify_folder
from cache.tiers.disk import FileTier
from cache.tiers.memory import MemoryTier
from tests.cache.chains import (
    IMAGE_BYTES,
    ROOT,
    budgets,
    header_of,
    offer,
    query,
    read_and_check,
    root_of,
    sealed_image,
    store_chain,
    store_config,
)
from tests.cache.encrypted import (
    ANNA,
    BERT,
    KEY,
    OF_ANNA,
    OTHER_KEY,
    disk_bytes,
    key_of_folder,
    name_of,
    open_with,
    read,
    stored,
    vault,
)
from tests.cache.stores import OTHER, TOKENS, counter, damage, extent_files, wait_until


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eleven encrypted extents."""
    return stored(tmp_path / "w")


def first_name(tokens: list[int]) -> str:
    """Of the file with the first block of a chain."""
    return name_of(header_of(tokens[:4]).extent_id)


def silent(message: str) -> None:
    return


def no_progress(num_done: int, num_total: int) -> None:
    return


# -- a node store without the key -----------------------------------------------------------------------------


def test_encrypted_extents_are_misses_and_stay(folder: Path) -> None:
    with open_with(folder, None) as store:
        assert (read(store, TOKENS, None)[0], read(store, OTHER, None)[0]) == (0, 0)
        stats = store.stats()
        assert (stats.num_extents, stats.num_locked_extents, stats.disk_bytes) == (0, 11, disk_bytes(folder))
        assert (stats.state, counter(store, "quarantined_extents")) == ("ok", 0)
        store.check_integrity()
    with open_with(folder) as store:
        assert (read(store, TOKENS)[0], read(store, OTHER)[0]) == (len(TOKENS), len(OTHER))


def test_a_reader_without_the_key_of_its_store_misses_and_blames_nothing(folder: Path) -> None:
    """An engine whose process could not read the key file, or reads another one."""
    with open_with(folder) as store:
        for key in (None, OTHER_KEY):
            assert read(store, TOKENS, key) == (0, {Tier.DISK})
        assert (counter(store, "quarantined_extents"), store.stats().num_extents) == (0, 11)
        assert read(store, TOKENS)[0] == len(TOKENS)


def test_an_image_that_memory_has_damaged_is_not_encrypted_but_forgotten(tmp_path: Path) -> None:
    """Its tag would vouch for it; in a plain file its checksum still tells."""
    dram = MemoryTier()
    disk = FileTier(tmp_path / "w", fsync=False, vault=vault())
    header = header_of(OTHER[:4])
    image = sealed_image(header)
    image[-1] ^= 1
    with NodeStore(store_config(), dram, disk) as store:
        (granted,) = store.prepare_store(offer(OTHER[:4])).extents
        assert store.complete_store(granted.extent_id, image)
        wait_until(lambda: counter(store, "quarantined_extents") == 1)
        assert (store.stats().num_extents, store.stats().state, extent_files(tmp_path / "w")) == (0, "ok", [])
        assert store_chain(store, TOKENS)
        assert store.flush()
        store.check_integrity()


def test_what_is_stored_without_the_key_lies_beside_them(folder: Path) -> None:
    with open_with(folder, None) as store:
        assert store_chain(store, OTHER)
        assert store.flush()
        assert len(extent_files(folder)) == 14
        store.check_integrity()
    with open_with(folder, None) as store:
        assert read(store, OTHER, None) == (len(OTHER), {Tier.DISK})
    with open_with(folder) as store:
        assert (read(store, TOKENS)[0], read(store, OTHER)[0]) == (len(TOKENS), len(OTHER))
        assert (len(extent_files(folder)), store.stats().num_extents) == (11, 11), "one copy of each is enough"
        store.check_integrity()


def test_they_go_before_all_others_when_room_is_needed(folder: Path) -> None:
    config = store_config(budgets(disk=12 * IMAGE_BYTES))
    with open_with(folder, None, config) as store:
        assert store_chain(store, OTHER)
        assert store.flush()
        stats = store.stats()
        assert (stats.num_extents, stats.num_locked_extents) == (3, 9)
        assert counter(store, "evicted_disk_extents") == 2
        wait_until(lambda: len(extent_files(folder)) == 12)
        assert stats.disk_bytes == disk_bytes(folder) <= 12 * IMAGE_BYTES
        store.check_integrity()


def test_a_smaller_budget_holds_for_them_at_once(folder: Path) -> None:
    with open_with(folder, None, store_config(budgets(disk=4 * IMAGE_BYTES))) as store:
        assert store.stats().num_locked_extents == 4
        wait_until(lambda: len(extent_files(folder)) == 4)
        store.check_integrity()


def test_a_store_too_small_for_one_more_evicts_nothing_for_it() -> None:
    """All or nothing holds for them too: what does not fit although all of them went pushes none of them out."""
    ledger = Ledger(budgets(disk=3 * IMAGE_BYTES), lambda event: None)
    ledger.disk.recover([], [vault().lock(header_of([number] * 4)) for number in range(3)])
    assert ledger.room.make_room(Tier.DISK, 4 * IMAGE_BYTES) is None
    assert len(ledger.room.locked) == 3
    assert ledger.room.make_room(Tier.DISK, 2 * IMAGE_BYTES) is not None
    assert len(ledger.room.locked) == 1
    ledger.check_integrity()


@pytest.mark.parametrize(
    ("asked", "num_gone"),
    [
        (PurgeQuery(ANNA.tenant), 8),
        (PurgeQuery(BERT.tenant), 3),
        (PurgeQuery("somebody else"), 0),
        (PurgeQuery(root_hash=ROOT), 11),
        (PurgeQuery(ANNA.tenant, root_hash=ROOT), 8),
        (PurgeQuery(root_hash=root_of("another")), 0),
    ],
)
def test_a_purge_by_tenant_or_fingerprint_needs_no_key(folder: Path, asked: PurgeQuery, num_gone: int) -> None:
    num_bytes = disk_bytes(folder)
    with open_with(folder, None) as store:
        receipt = store.purge(asked)
        assert (receipt.num_extents, receipt.num_files, receipt.num_left) == (num_gone, num_gone, 0)
        assert (receipt.disk_bytes, receipt.num_unknown) == (num_bytes - disk_bytes(folder), 0)
        assert (len(extent_files(folder)), store.stats().num_locked_extents) == (11 - num_gone, 11 - num_gone)
        store.check_integrity()
    with open_with(folder) as store:
        assert store.stats().num_extents == 11 - num_gone


def test_a_purge_by_session_says_what_it_cannot_tell(folder: Path) -> None:
    with open_with(folder, None) as store:
        receipt = store.purge(OF_ANNA)
        assert (receipt.num_extents, receipt.num_unknown) == (0, 8), "of her tenant, and perhaps of the session"
    with open_with(folder) as store:
        receipt = store.purge(OF_ANNA)
        assert (receipt.num_extents, receipt.num_unknown, receipt.num_left) == (8, 0, 0)
        assert (read(store, TOKENS)[0], read(store, OTHER)[0]) == (0, len(OTHER))


def test_a_folder_put_in_place_of_another_is_taken_with_its_locked_extents(folder: Path, tmp_path: Path) -> None:
    with open_with(tmp_path / "there", None, store_config(retry_s=0.05)) as store:
        (tmp_path / "there").rename(tmp_path / "away")
        (folder / "tmp").rmdir()  # so that it is noticed
        folder.rename(tmp_path / "there")
        store_chain(store, OTHER)
        wait_until(lambda: store.stats().num_locked_extents == 11)
        store.check_integrity()


def test_it_is_said_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    report = logging.getLogger("tokenloft.warehouse").info
    with caplog.at_level(logging.INFO, "tokenloft.warehouse"):
        disk = FileTier(folder, fsync=False, report=report)
        with NodeStore(store_config(), MemoryTier(), disk) as store:
            for _ in range(3):
                assert read_and_check(WarehouseClient(store), query(TOKENS)).tokens == 0
    assert len([line for line in caplog.messages if "encrypted" in line]) == 1
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


# -- commands -------------------------------------------------------------------------------------------------


def test_verify_looks_inside_with_the_key_only(folder: Path) -> None:
    bad = first_name(TOKENS)
    damage(folder, bad)
    without = verify_folder(folder, 1e12, silent, no_progress)
    assert (without.num_extents, without.num_unverified, without.bad) == (11, 11, ())
    within = verify_folder(folder, 1e12, silent, no_progress, vault())
    assert (within.num_extents, within.num_unverified, within.is_quarantined) == (11, 0, True)
    assert [each.extent_id for each in within.bad] == [bad]
    assert [path.stem for path in (folder / "quarantine").iterdir()] == [bad]
    with open_with(folder) as store:
        assert (store.stats().num_extents, read(store, OTHER)[0]) == (10, len(OTHER))


@pytest.mark.parametrize("key", [KEY, None], ids=["key", "no key"])
def test_a_damaged_header_and_a_lost_file_are_found_without_the_key_too(folder: Path, key: bytes | None) -> None:
    bad, lost = first_name(TOKENS), first_name(OTHER)
    damage(folder, bad, at=40)
    next(folder.glob(f"extents/*/*/{lost}.kv")).unlink()
    opened = vault(key) if key is not None else None
    verified = verify_folder(folder, 1e12, silent, no_progress, opened)
    assert {each.extent_id: each.reason for each in verified.bad}[lost] == "its file is gone"
    assert {each.extent_id for each in verified.bad} == {bad, lost}
    with open_with(folder) as store:
        assert store.stats().num_extents == 9


@pytest.mark.parametrize("key", [KEY, None], ids=["key", "no key"])
def test_an_index_can_be_rebuilt_with_and_without_the_key(folder: Path, key: bytes | None) -> None:
    damage(folder, first_name(TOKENS), at=40)
    rebuilt = rebuild_index(folder, silent, vault(key) if key is not None else None)
    assert (rebuilt.num_extents, rebuilt.num_blocks, rebuilt.num_bad) == (10, 10, 1)
    with open_with(folder) as store:
        assert read(store, OTHER)[0] == len(OTHER)


def test_purges_of_a_folder(folder: Path) -> None:
    assert purge_folder(folder, PurgeQuery(BERT.tenant), silent).num_files == 3
    assert purge_folder(folder, OF_ANNA, silent).num_unknown == 8
    assert purge_folder(folder, OF_ANNA, silent, vault()).num_files == 8


def test_everything_goes_without_the_key_and_then_another_one_will_do(folder: Path) -> None:
    receipt = purge_everything(folder, silent)
    assert (receipt.num_extents, receipt.num_tokens, receipt.num_files, receipt.num_left) == (11, 42, 11, 0)
    assert key_of_folder(folder) is None
    with open_with(folder, OTHER_KEY) as store:
        assert store_chain(store, OTHER)
    assert key_of_folder(folder) == vault(OTHER_KEY).key_id
