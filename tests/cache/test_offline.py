"""A folder that no server uses: checked, indexed anew, purged; and left alone where one does."""

import time
from pathlib import Path

import pytest

from cache.client import WarehouseClient
from cache.errors import FolderError, FolderInUse
from cache.extent import Origin
from cache.messages import PurgeQuery
from cache.offline import purge_everything, purge_folder, rebuild_index, verify_folder
from tests.cache.chains import BLOCK_SIZE, IMAGE_BYTES, fill, header_of, offer, store_chain
from tests.cache.stores import OTHER, TOKENS, damage, extent_files, open_store, read

FAST = 1e12
ANNA, BERT = Origin("acme", "anna"), Origin("acme", "bert")


def silent(message: str) -> None:
    return


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What anna and bert have stored."""
    with open_store(tmp_path / "w") as store:
        assert WarehouseClient(store).store(offer(TOKENS, origin=ANNA), fill)
        assert WarehouseClient(store).store(offer(OTHER, origin=BERT), fill)
    return tmp_path / "w"


def test_whole_files_are_whole(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    verified = verify_folder(folder, FAST, silent, lambda *done: seen.append(done))
    num_bytes = sum(path.stat().st_size for path in extent_files(folder))
    assert (verified.num_extents, verified.num_bytes, verified.bad) == (11, num_bytes, ())
    assert (len(seen), seen[-1]) == (11, (num_bytes, num_bytes))


def test_bad_files_are_set_aside_and_lost_ones_forgotten(folder: Path) -> None:
    bad, lost = header_of(TOKENS[:4]).extent_id, header_of(OTHER[:4]).extent_id
    damage(folder, bad)
    next(folder.glob(f"extents/*/*/{lost}.kv")).unlink()
    verified = verify_folder(folder, FAST, silent, lambda *done: None)
    assert verified.is_quarantined
    assert {each.extent_id: each.reason for each in verified.bad} == {
        bad: f"extent {bad}: checksum of block 0 does not match",
        lost: "its file is gone",
    }
    assert [path.stem for path in (folder / "quarantine").iterdir()] == [bad]
    assert verify_folder(folder, FAST, silent, lambda *done: None).bad == ()
    with open_store(folder) as store:
        assert store.stats().num_extents == 9
        assert (read(store, TOKENS)[0], read(store, OTHER)[0]) == (0, 0)


def test_beside_a_server_bad_files_are_only_told(folder: Path) -> None:
    bad = header_of(TOKENS[:4]).extent_id
    damage(folder, bad)
    with open_store(folder) as store:
        verified = verify_folder(folder, FAST, silent, lambda *done: None)
        assert (verified.is_quarantined, [each.extent_id for each in verified.bad]) == (False, [bad])
        assert (len(extent_files(folder)), store.stats().num_extents) == (11, 11)


def test_reading_keeps_to_its_rate(folder: Path) -> None:
    started = time.monotonic()
    verify_folder(folder, 11 * IMAGE_BYTES / 0.2, silent, lambda *done: None)
    assert time.monotonic() - started >= 0.19


@pytest.mark.parametrize("index", ["whole", "damaged", "gone"])
def test_the_index_is_made_of_the_files(folder: Path, index: str) -> None:
    if index == "damaged":
        (folder / "index.sqlite").write_bytes(b"no database" * 100)
    if index == "gone":
        (folder / "index.sqlite").unlink()
    damage(folder, header_of(OTHER[:12], first=2).extent_id, at=30)
    reports: list[str] = []
    rebuilt = rebuild_index(folder, reports.append)
    assert (rebuilt.num_extents, rebuilt.num_blocks, rebuilt.num_bad) == (10, 10, 1)
    assert "checking 11 extents" in reports[0]
    with open_store(folder) as store:
        assert (read(store, TOKENS)[0], read(store, OTHER)[0]) == (30, 8)
        assert store.purge(PurgeQuery("acme", "bert")).num_blocks == 2


def test_a_purge_is_the_node_stores(folder: Path) -> None:
    receipt = purge_folder(folder, PurgeQuery("acme", "anna"), silent)
    assert (receipt.num_blocks, receipt.num_tokens, receipt.num_files, receipt.num_left) == (8, 30, 8, 0)
    assert purge_folder(folder, PurgeQuery("acme", "anna"), silent).num_blocks == 0
    with open_store(folder) as store:
        assert (read(store, TOKENS)[0], read(store, OTHER)[0]) == (0, 12)


def test_everything_can_go(folder: Path) -> None:
    num_bytes = sum(path.stat().st_size for path in extent_files(folder))
    receipt = purge_everything(folder, silent)
    assert (receipt.num_extents, receipt.num_tokens, receipt.disk_bytes) == (11, 42, num_bytes)
    assert (receipt.num_files, receipt.num_left, extent_files(folder)) == (11, 0, [])
    with open_store(folder) as store:
        assert store.stats().num_extents == 0
        store_chain(store, OTHER)
        assert read(store, OTHER)[0] == len(OTHER) // BLOCK_SIZE * BLOCK_SIZE


def test_a_folder_in_use_is_not_touched(folder: Path) -> None:
    with open_store(folder) as store:
        for act in (
            lambda: rebuild_index(folder, silent),
            lambda: purge_everything(folder, silent),
            lambda: purge_folder(folder, PurgeQuery(""), silent),
        ):
            with pytest.raises(FolderInUse):
                act()
        assert read(store, TOKENS)[0] == 30


def test_where_no_warehouse_is_none_is_made(tmp_path: Path) -> None:
    for act in (
        lambda: rebuild_index(tmp_path, silent),
        lambda: purge_everything(tmp_path, silent),
        lambda: purge_folder(tmp_path, PurgeQuery(""), silent),
        lambda: verify_folder(tmp_path, FAST, silent, lambda *done: None),
    ):
        with pytest.raises(FolderError, match="there is no warehouse in"):
            act()
    assert list(tmp_path.iterdir()) == []
