"""A folder that is taken away while it is in use, and a disk that hangs: serving goes on, and all comes back."""

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cache.events import ReplicaLoad, Tier
from cache.messages import PurgeQuery
from cache.node_store import NodeStore
from cache.tiers.disk import FileTier
from cache.tiers.memory import MemoryTier
from tests.cache.chains import BLOCK_SIZE, IMAGE_BYTES, budgets, query, store_chain, store_config
from tests.cache.stores import (
    OTHER,
    TOKENS,
    Clock,
    HangingFiles,
    counter,
    extent_files,
    in_thread,
    open_store,
    read,
    wait_until,
)

# -- a folder that is taken away --------------------------------------------------------------------


def test_a_folder_that_is_removed_is_made_again_and_filled_from_dram(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "w"
    with open_store(folder, store_config(retry_s=0.05)) as store, caplog.at_level(logging.WARNING):
        store_chain(store, TOKENS)
        assert store.flush()
        shutil.rmtree(folder)
        store_chain(store, OTHER)
        assert read(store, TOKENS) == (30, {Tier.DRAM})
        wait_until(lambda: store.flush(0.1) and store.stats().state == "ok")
        assert caplog.text.count("is degraded") == 1
        assert caplog.text.count("was taken away: a new one is in its place") == 1
        assert store.stats().disk_bytes == store.stats().dram_bytes
        assert len(extent_files(folder)) == 8 + 3
        store.check_integrity()
    with open_store(folder) as store:
        assert [read(store, tokens) for tokens in (TOKENS, OTHER)] == [(30, {Tier.DISK}), (12, {Tier.DISK})]


def test_what_was_only_in_a_removed_folder_is_a_miss_and_can_be_stored_again(tmp_path: Path) -> None:
    folder = tmp_path / "w"
    with open_store(folder) as store:
        store_chain(store, TOKENS)
    with open_store(folder, store_config(retry_s=0.05)) as store:
        shutil.rmtree(folder)
        assert read(store, TOKENS)[0] == 0
        store_chain(store, OTHER)
        wait_until(lambda: store.flush(0.1) and store.stats().state == "ok")
        assert (store.stats().num_extents, store.stats().disk_bytes) == (3, 3 * IMAGE_BYTES)
        assert store_chain(store, TOKENS)
        assert store.flush()
        store.check_integrity()
    with open_store(folder) as store:
        assert [read(store, tokens)[0] for tokens in (TOKENS, OTHER)] == [30, 12]


def test_a_folder_with_something_in_its_way_is_tried_until_the_way_is_free(tmp_path: Path) -> None:
    folder = tmp_path / "w"
    with open_store(folder, store_config(retry_s=0.02)) as store:
        shutil.rmtree(folder)
        folder.write_text("in the way")
        store_chain(store, OTHER)
        wait_until(lambda: store.stats().state != "ok")
        time.sleep(0.2)  # several tries
        assert store.stats().state.startswith("degraded: ")
        assert read(store, OTHER) == (12, {Tier.DRAM})
        folder.unlink()
        wait_until(lambda: store.flush(0.1) and store.stats().state == "ok")
        store.check_integrity()
    with open_store(folder) as store:
        assert read(store, OTHER)[0] == 12


def test_a_store_whose_folder_never_comes_back_can_be_closed(tmp_path: Path) -> None:
    folder = tmp_path / "w"
    store = open_store(folder, store_config(retry_s=0.02))
    shutil.rmtree(folder)
    folder.write_text("in the way")
    store_chain(store, OTHER)
    wait_until(lambda: store.stats().state != "ok")
    store.close()
    store.close()
    assert folder.read_text() == "in the way"


# -- a disk that hangs ------------------------------------------------------------------------------


def hung_store(
    folder: Path, clock: Callable[[], float], dram: int = 3, **times: float
) -> tuple[NodeStore, HangingFiles]:
    """A store whose disk has been asked to make `OTHER[:4]` durable and does not answer."""
    files = HangingFiles()
    tier = FileTier(folder, files=files)
    store = NodeStore(store_config(budgets(dram * IMAGE_BYTES), **times), MemoryTier(), tier, clock=clock)
    files.hang()
    store_chain(store, OTHER[:4])
    assert files.is_asked.wait(30.0)
    return store, files


def test_while_the_disk_hangs_everything_else_goes_on_and_then_it_comes_back(tmp_path: Path) -> None:
    clock = Clock()
    store, files = hung_store(tmp_path / "w", clock, write_timeout_s=10.0)
    with store:
        clock.now += 10.0
        assert store.stats().state == "ok", "a slow one is no hung one"
        clock.now += 0.1
        assert store.stats().state == "degraded: the disk has not answered for 10 s"
        for number in range(5):
            tokens = [number * 1000 + i for i in range(BLOCK_SIZE)]
            assert store_chain(store, tokens)
            assert read(store, tokens) == (4, {Tier.DRAM})
        assert read(store, OTHER[:4]) == (4, {Tier.DRAM}), "what is being written stays until it is"
        assert not store.flush()
        store.check_integrity()
        files.answers.set()
        wait_until(lambda: store.stats().state == "ok")
        assert store.flush()
        assert counter(store, "written_extents") == 3, "the first one, and what dram still holds of the others"
        store.check_integrity()
    with open_store(tmp_path / "w") as store:
        assert read(store, OTHER[:4]) == (4, {Tier.DISK})


def test_a_store_that_waits_for_room_does_not_wait_for_a_hung_disk(tmp_path: Path) -> None:
    store, files = hung_store(tmp_path / "w", time.monotonic, dram=2, write_timeout_s=0.3, store_wait_s=300.0)
    with store:
        assert store_chain(store, TOKENS[:4])
        thread, answers = in_thread(lambda: store_chain(store, [1, 2, 3, 4]))
        thread.join(60.0)
        assert answers == [True], "it takes the place of what can't be written"
        assert store.stats().state != "ok"
        files.answers.set()


def test_leases_and_engines_of_the_dead_lapse_all_the_same(tmp_path: Path) -> None:
    clock = Clock()
    store, files = hung_store(tmp_path / "w", clock, write_timeout_s=10.0, lease_ttl_s=60.0, replica_ttl_s=60.0)
    with store:
        store.prepare_load(query(OTHER[:4], "dead reader"))
        store.report_engine(ReplicaLoad("dead engine", "decode", 0, 0, 0, 0.0, 0.0), None)
        clock.now += 61.0
        store.stats()
        assert counter(store, "expired_leases") == 1
        assert ReplicaLoad not in {type(event) for event in store.read_events(None, 0).events}
        files.answers.set()


def test_closing_does_not_wait_for_a_hung_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store, files = hung_store(tmp_path / "w", time.monotonic, write_timeout_s=0.2)
    thread, _ = in_thread(store.close)
    thread.join(60.0)
    assert not thread.is_alive()
    assert "the warehouse's disk hangs: its folder is left as it is" in caplog.text
    files.answers.set()
    store._worker._thread.join(30.0)
    assert not store._worker._thread.is_alive(), "what was left behind ends by itself"
    assert isinstance(store._disk, FileTier)
    store._disk.close()


def test_a_purge_says_what_a_hung_disk_still_holds(tmp_path: Path) -> None:
    store, files = hung_store(tmp_path / "w", time.monotonic, write_timeout_s=0.2)
    with store:
        receipt = store.purge(PurgeQuery(tenant=""), wait_s=0.3)
        assert (receipt.num_extents, receipt.num_left) == (1, 1)
        assert read(store, OTHER[:4])[0] == 0
        files.answers.set()
        wait_until(lambda: store.purge(PurgeQuery(tenant="")).num_left == 0 and extent_files(tmp_path / "w") == [])
        store.check_integrity()
