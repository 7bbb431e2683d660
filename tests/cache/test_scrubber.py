"""What the background check finds, what it leaves alone, and that it keeps to its rate."""

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from cache.events import Tier
from cache.extent import Image
from cache.node_store import NodeStore, NodeStoreConfig
from cache.scrubber import Scrubber, pause_s
from cache.tiers.disk import FileTier
from cache.tiers.memory import MemoryTier
from tests.cache.chains import IMAGE_BYTES, budgets, header_of, store_chain, store_config
from tests.cache.stores import OTHER, TOKENS, Clock, counter, damage, extent_files, open_store, read, wait_until

FAST = 1e9
SCRUBBING = store_config(scrub_bytes_per_s=FAST)


def stored(folder: Path, *chains: list[int]) -> None:
    with open_store(folder) as store:
        for chain in chains:
            store_chain(store, chain)


def wait_for_round(store: NodeStore) -> None:
    wait_until(lambda: counter(store, "scrub_rounds") == 1)


def test_a_round_reads_everything_once_and_then_rests(tmp_path: Path) -> None:
    stored(tmp_path / "w", TOKENS, OTHER)
    with open_store(tmp_path / "w", SCRUBBING) as store:
        wait_for_round(store)
        files = extent_files(tmp_path / "w")
        assert counter(store, "scrubbed_extents") == len(files) == 11
        assert counter(store, "scrubbed_bytes") == sum(path.stat().st_size for path in files)
        assert store.stats().num_extents_to_scrub == 0
        assert counter(store, "quarantined_extents") == 0
        assert read(store, TOKENS)[0] == 30


def test_a_bad_file_is_set_aside_and_a_miss(tmp_path: Path) -> None:
    stored(tmp_path / "w", TOKENS, OTHER)
    bad = header_of(OTHER[:8], first=1).extent_id
    damage(tmp_path / "w", bad)
    with open_store(tmp_path / "w", SCRUBBING) as store:
        wait_for_round(store)
        assert counter(store, "quarantined_extents") == 1
        wait_until(lambda: (tmp_path / "w" / "quarantine" / f"{bad}.kv").exists())
        assert (read(store, OTHER)[0], read(store, TOKENS)[0]) == (4, 30)
        store.check_integrity()


def test_a_file_that_is_not_there_is_forgotten(tmp_path: Path) -> None:
    stored(tmp_path / "w", OTHER)
    (lost,) = (tmp_path / "w").glob(f"extents/*/*/{header_of(OTHER[:4]).extent_id}.kv")
    lost.unlink()
    with open_store(tmp_path / "w", SCRUBBING) as store:
        wait_for_round(store)
        assert (counter(store, "quarantined_extents"), store.stats().num_extents) == (1, 2)


class FailingTier(FileTier):
    """Files that can't be read, and something that happens before each read."""

    def __init__(self, directory: Path, failing: set[str], before: Callable[[str], None]) -> None:
        super().__init__(directory, fsync=False)
        self.failing = failing
        self.before = before

    def read(self, extent_id: str) -> Image:
        self.before(extent_id)
        if extent_id in self.failing:
            raise OSError(5, os.strerror(5))
        return super().read(extent_id)


def scrubber_of(store: NodeStore, disk: FileTier) -> Scrubber:
    return Scrubber(FAST, store._ledger, store._changed, disk, store._worker, Clock())


def open_failing(
    folder: Path, *, num_failing: int, before: Callable[[str], None] = lambda extent_id: None
) -> tuple[NodeStore, FailingTier]:
    disk = FailingTier(folder, set(), before)
    store = NodeStore(store_config(retry_s=1000.0), MemoryTier(), disk)
    disk.failing = {extent.extent_id for extent in list(store._ledger.held)[:num_failing]}
    return store, disk


def test_one_file_that_can_not_be_read_is_bad(tmp_path: Path) -> None:
    stored(tmp_path / "w", OTHER)
    store, disk = open_failing(tmp_path / "w", num_failing=1)
    with store:
        scrubber_of(store, disk)._run_round()
        assert (counter(store, "quarantined_extents"), counter(store, "scrubbed_extents")) == (1, 2)
        assert store.stats().state == "ok"


def test_a_disk_that_can_not_be_read_loses_no_more_than_one(tmp_path: Path) -> None:
    stored(tmp_path / "w", TOKENS, OTHER)
    store, disk = open_failing(tmp_path / "w", num_failing=11)
    with store:
        scrubber_of(store, disk)._run_round()
        assert (counter(store, "quarantined_extents"), counter(store, "scrub_rounds")) == (1, 0)
        assert store.stats().state == "degraded: [Errno 5] Input/output error"
        assert store.stats().num_extents == 10


def test_a_folder_that_was_taken_away_is_not_a_folder_of_bad_files(tmp_path: Path) -> None:
    stored(tmp_path / "w", OTHER)
    store, disk = open_failing(tmp_path / "w", num_failing=0)
    with store:
        shutil.rmtree(tmp_path / "w")
        scrubber_of(store, disk)._run_round()
        assert counter(store, "quarantined_extents") == 0
        assert store.stats().state.startswith("degraded: ")


def test_what_leaves_while_it_is_read_is_not_bad(tmp_path: Path) -> None:
    stored(tmp_path / "w", OTHER)
    present: list[NodeStore] = []
    store, disk = open_failing(
        tmp_path / "w", num_failing=2, before=lambda extent_id: present[0].report_bad(extent_id, Tier.DISK, "found")
    )
    present.append(store)
    with store:
        scrubber_of(store, disk)._run_round()
        assert (counter(store, "quarantined_extents"), counter(store, "scrub_rounds")) == (3, 1)
        assert store.stats().state == "ok"


def test_closing_does_not_wait_for_the_round(tmp_path: Path) -> None:
    stored(tmp_path / "w", TOKENS)
    slow = NodeStoreConfig(budgets(), SCRUBBING.disk, store_wait_s=0.0, scrub_bytes_per_s=1.0)
    store = open_store(tmp_path / "w", slow)
    wait_until(lambda: counter(store, "scrubbed_extents") == 1)
    assert store.stats().num_extents_to_scrub == 7
    store.close()
    assert not any(thread.name == "tokenloft-scrub" for thread in threading.enumerate())


def test_the_pause_after_a_read_keeps_the_rate() -> None:
    assert pause_s(IMAGE_BYTES, IMAGE_BYTES / 2, 0.5) == 1.5
    assert pause_s(IMAGE_BYTES, IMAGE_BYTES / 2, 3.0) == 0.0
