"""What moves between the tiers by itself: promotions, bad images, batched writes, and a disk that fails."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cache.events import Tier
from cache.node_store import NodeStore
from cache.tiers.disk import FileTier
from cache.tiers.memory import MemoryTier
from tests.cache.chains import BLOCK_SIZE, IMAGE_BYTES, budgets, header_of, query, store_chain, store_config
from tests.cache.failing_files import FailingFiles
from tests.cache.stores import (
    OTHER,
    TOKENS,
    Clock,
    HangingFiles,
    counter,
    damage,
    extent_files,
    open_store,
    read,
    wait_until,
)

# -- promotion --------------------------------------------------------------------------------------


def test_the_second_hit_promotes(tmp_path: Path) -> None:
    with open_store(tmp_path / "w") as store:
        store_chain(store, TOKENS)
    with open_store(tmp_path / "w") as store:
        assert read(store, TOKENS) == (30, {Tier.DISK})
        assert counter(store, "promoted_extents") == 0
        assert read(store, TOKENS) == (30, {Tier.DISK})
        wait_until(lambda: counter(store, "promoted_extents") == 8)
        assert read(store, TOKENS) == (30, {Tier.DRAM})
        store.check_integrity()


def test_a_bad_file_is_not_promoted_but_quarantined(tmp_path: Path) -> None:
    with open_store(tmp_path / "w") as store:
        store_chain(store, OTHER)
    header = header_of(OTHER[:4])
    with open_store(tmp_path / "w") as store:
        store.prepare_load(query(OTHER[:4]))
        damage(tmp_path / "w", header.extent_id)
        store.prepare_load(query(OTHER[:4]))
        wait_until(lambda: counter(store, "quarantined_extents") == 1)
        assert read(store, OTHER)[0] == 0
        store.complete_load("reader")
        store.check_integrity()


def test_no_room_in_dram_is_no_harm(tmp_path: Path) -> None:
    with open_store(tmp_path / "w") as store:
        store_chain(store, TOKENS)
    with open_store(tmp_path / "w", store_config(budgets(dram=100))) as store:
        for _ in range(4):
            assert read(store, TOKENS) == (30, {Tier.DISK})
        store.check_integrity()


# -- bad images -------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [-1, 30, 4096], ids=["last byte", "header", "first byte"])
def test_a_bad_file_is_a_miss_is_quarantined_and_counted(
    tmp_path: Path, at: int, caplog: pytest.LogCaptureFixture
) -> None:
    with open_store(tmp_path / "w") as store:
        store_chain(store, OTHER)
    bad = header_of(OTHER[:8], first=1).extent_id
    damage(tmp_path / "w", bad, at)
    with open_store(tmp_path / "w") as store, caplog.at_level(logging.WARNING):
        assert read(store, OTHER) == (4, {Tier.DISK})
        assert read(store, OTHER) == (4, {Tier.DISK})
        assert counter(store, "quarantined_extents") == 1
        wait_until(lambda: (tmp_path / "w" / "quarantine" / f"{bad}.kv").exists())
        assert f"quarantined extent {bad} in disk" in caplog.text
        assert store_chain(store, OTHER), "and can be stored again"
        assert read(store, OTHER)[0] == 12
        assert store.flush()
        store.check_integrity()
    with open_store(tmp_path / "w") as store:
        assert read(store, OTHER) == (12, {Tier.DISK})


def test_a_file_that_is_gone_or_cut_is_a_miss(tmp_path: Path) -> None:
    with open_store(tmp_path / "w") as store:
        store_chain(store, OTHER)
        store_chain(store, TOKENS)
    for tokens, cut in ((OTHER, True), (TOKENS, False)):
        (path,) = (tmp_path / "w").glob(f"extents/*/*/{header_of(tokens[:4]).extent_id}.kv")
        path.write_bytes(path.read_bytes()[:4200]) if cut else path.unlink()
    with open_store(tmp_path / "w") as store:
        assert read(store, OTHER)[0] == read(store, TOKENS)[0] == 0
        assert counter(store, "quarantined_extents") == 2
        store.check_integrity()


def test_a_bad_image_in_dram_falls_back_to_disk(tmp_path: Path) -> None:
    with open_store(tmp_path / "w") as store:
        store_chain(store, OTHER)
        assert store.flush()
        store.report_bad(header_of(OTHER[:4]).extent_id, Tier.DRAM, "a test says so")
        assert read(store, OTHER) == (12, {Tier.DRAM, Tier.DISK})
        store.report_bad("unknown", Tier.DRAM, "nobody knows it")
        assert counter(store, "quarantined_extents") == 1


# -- trouble with the disk --------------------------------------------------------------------------


def test_a_disk_that_fails_degrades_and_comes_back_by_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "w"
    with open_store(folder, store_config(retry_s=0.05)) as store, caplog.at_level(logging.WARNING):
        shutil.rmtree(folder / "tmp")
        store_chain(store, TOKENS)
        wait_until(lambda: store.stats().state.startswith("degraded: "))
        assert "No such file" in store.stats().state
        assert read(store, TOKENS) == (30, {Tier.DRAM}), "serving goes on"
        assert not store.flush(timeout_s=0.2)
        store.check_integrity()
        (folder / "tmp").mkdir()
        wait_until(lambda: store.stats().state == "ok")
        assert store.flush()
        assert store.stats().disk_bytes == store.stats().dram_bytes
        assert caplog.text.count("is degraded") == 1, "one line says so"
        assert caplog.text.count("works again") == 1


def test_while_the_disk_is_down_dram_goes_on_as_a_cache(tmp_path: Path) -> None:
    config = store_config(budgets(dram=3 * IMAGE_BYTES), retry_s=1000.0)
    with open_store(tmp_path / "w", config) as store:
        shutil.rmtree(tmp_path / "w" / "tmp")
        store_chain(store, OTHER[:4])
        wait_until(lambda: store.stats().state != "ok")
        for number in range(5):
            tokens = [number * 1000 + i for i in range(BLOCK_SIZE)]
            assert store_chain(store, tokens)
            assert read(store, tokens) == (4, {Tier.DRAM})
        store.check_integrity()


def test_free_space_below_the_limit_stops_growth_not_service(tmp_path: Path) -> None:
    config = store_config(min_free_bytes=1 << 60)
    with open_store(tmp_path / "w", config) as store:
        store_chain(store, OTHER)
        wait_until(lambda: store.stats().state.startswith("degraded: less than 1099511627776 MiB free"))
        assert store.stats().dirty_bytes == store.stats().dram_bytes, "all of it waits for room"
        assert read(store, OTHER) == (12, {Tier.DRAM})
        assert list((tmp_path / "w").glob("extents/*/*/*")) == []
        store.check_integrity()


@pytest.mark.parametrize("is_disk_bad", [False, True])
def test_a_file_that_cannot_be_read_is_set_aside_only_if_it_fails_alone(tmp_path: Path, is_disk_bad: bool) -> None:
    folder, files = tmp_path / "w", FailingFiles()
    with open_store(folder) as store:
        store_chain(store, OTHER[:4])
    with open_store(folder, store_config(retry_s=0.05), files) as store:
        (path,) = extent_files(folder)
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(path)  # reading it is an error, other than that it is not there
        files.fails = "write" if is_disk_bad else None
        assert read(store, OTHER[:4])[0] == 0
        if not is_disk_bad:
            wait_until(lambda: counter(store, "quarantined_extents") == 1)
            assert store.stats().state == "ok"
            return
        wait_until(lambda: store.stats().state != "ok")
        (tmp_path / "elsewhere").replace(path)
        files.fails = None
        wait_until(lambda: store.stats().state == "ok")
        assert read(store, OTHER[:4]) == (4, {Tier.DISK})
        assert counter(store, "quarantined_extents") == 0


def test_a_file_that_was_unreadable_for_a_moment_stays(tmp_path: Path) -> None:
    with open_store(tmp_path / "w") as store:
        store_chain(store, OTHER[:4])
        assert store.flush()
        store.report_unreadable(header_of(OTHER[:4]).extent_id)
        wait_until(lambda: not store._worker._suspects and store._worker._busy_since is None)
        assert read(store, OTHER[:4])[0] == 4
        assert counter(store, "quarantined_extents") == 0


def test_a_deletion_that_fails_is_tried_again(tmp_path: Path) -> None:
    folder, files = tmp_path / "w", FailingFiles()
    with open_store(folder, store_config(budgets(disk=IMAGE_BYTES), retry_s=0.05), files) as store:
        first, second = OTHER[:4], TOKENS[:4]
        store_chain(store, first)
        assert store.flush()
        files.fails = "unlink"
        store_chain(store, second)
        wait_until(lambda: store.stats().state != "ok")
        files.fails = None
        wait_until(lambda: store.flush(0.1) and not store._worker._removals)
        store.check_integrity()
    with open_store(folder) as store:
        assert store.stats().num_recovered_blocks == 1
        assert [read(store, tokens)[0] for tokens in (first, second)] == [0, 4]


def test_a_late_removal_spares_what_was_written_again(tmp_path: Path) -> None:
    folder, extent_id = tmp_path / "w", header_of(OTHER[:4]).extent_id
    with open_store(folder, store_config(retry_s=0.05)) as store:
        store_chain(store, OTHER[:4])
        assert store.flush()
        (folder / "quarantine").rmdir()  # setting a file aside fails
        store.report_bad(extent_id, Tier.DISK, "a test says so")
        wait_until(lambda: store.stats().disk_bytes == IMAGE_BYTES and store.flush(0.1))
        (folder / "quarantine").mkdir()
        wait_until(lambda: not store._worker._removals)
        assert list((folder / "quarantine").iterdir()) == []
        assert read(store, OTHER[:4]) == (4, {Tier.DRAM})
        store_chain(store, TOKENS)
        wait_until(lambda: store.flush(0.1))
        store.check_integrity()
    with open_store(folder) as store:
        assert [read(store, tokens)[0] for tokens in (OTHER[:4], TOKENS)] == [4, 30]


def test_a_budget_for_a_disk_that_is_not_there_means_nothing() -> None:
    with open_store(None) as store:
        assert store_chain(store, OTHER)
        assert store.flush()
        assert (store.stats().disk_budget_bytes, store.stats().directory) == (0, None)


# -- writes that are made durable together ----------------------------------------------------------


class CountedTier(FileTier):
    """Keeps a list of how many were committed together."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, fsync=False)
        self.commits: list[int] = []
        self.free: int | None = None
        """Bytes free on the file system, if not what is true."""

    def free_bytes(self) -> int:
        return super().free_bytes() if self.free is None else self.free

    def commit(self) -> list[str]:
        committed = super().commit()
        self.commits.append(len(committed))
        return committed


def batched(folder: Path, clock: Callable[[], float], **times: float) -> tuple[NodeStore, CountedTier]:
    tier = CountedTier(folder)
    return NodeStore(store_config(None, **times), MemoryTier(), tier, clock=clock), tier


def put_down(folder: Path, num_extents: int) -> None:
    wait_until(lambda: len(list((folder / "tmp").iterdir())) == num_extents)


def test_writes_wait_for_each_other_and_are_visible_together(tmp_path: Path) -> None:
    clock, folder = Clock(), tmp_path / "w"
    store, tier = batched(folder, clock, commit_interval_s=2.0)
    with store:
        store_chain(store, OTHER)
        put_down(folder, 3)
        clock.now += 1.9
        store_chain(store, TOKENS[:8])
        put_down(folder, 5)
        assert (extent_files(folder), counter(store, "written_extents")) == ([], 0)
        assert store.stats().dirty_bytes == 5 * IMAGE_BYTES, "they are not durable yet"
        clock.now += 0.1
        wait_until(lambda: counter(store, "written_extents") == 5)
        assert len(extent_files(folder)) == 5
        assert (tier.commits, store.stats().dirty_bytes) == ([5], 0)
        store_chain(store, TOKENS[:12])
        put_down(folder, 1)
        clock.now += 1.9
        assert tier.commits == [5], "the time begins anew with the first write after a commit"
        store.check_integrity()


def test_a_full_batch_does_not_wait(tmp_path: Path) -> None:
    store, tier = batched(tmp_path / "w", Clock(), commit_interval_s=2.0, max_batch_bytes=3 * IMAGE_BYTES)
    with store:
        store_chain(store, OTHER)
        wait_until(lambda: counter(store, "written_extents") == 3)
        assert tier.commits == [3]


def test_a_flush_does_not_wait_for_the_time_of_a_commit(tmp_path: Path) -> None:
    store, tier = batched(tmp_path / "w", Clock(), commit_interval_s=1000.0)
    with store:
        store_chain(store, OTHER)
        assert store.flush()
        assert sum(tier.commits) == 3
        assert len(extent_files(tmp_path / "w")) == 3


def test_nor_does_a_close(tmp_path: Path) -> None:
    store, tier = batched(tmp_path / "w", Clock(), commit_interval_s=1000.0)
    store_chain(store, OTHER)
    store.close()
    assert sum(tier.commits) == 3
    with open_store(tmp_path / "w") as store:
        assert read(store, OTHER) == (12, {Tier.DISK})


def test_a_disk_that_fills_up_within_a_batch_stays_degraded(tmp_path: Path) -> None:
    clock = Clock()
    store, tier = batched(tmp_path / "w", clock, commit_interval_s=2.0)
    with store:
        store_chain(store, OTHER[:4])
        put_down(tmp_path / "w", 1)
        tier.free = 0
        store_chain(store, OTHER)
        wait_until(lambda: store.stats().state.startswith("degraded: less than 0 MiB free"))
        assert counter(store, "written_extents") == 1, "what had been written before is committed first"
        assert store.stats().state.startswith("degraded: less than 0 MiB free")
        tier.free = None
        clock.now += 5.0
        wait_until(lambda: store.stats().state == "ok")
        assert store_chain(store, TOKENS[:4])
        assert store.flush()
        assert counter(store, "written_extents") == 4, "those that found no room too"
        store.check_integrity()


def test_a_failed_commit_is_done_again_with_all_that_was_in_it(tmp_path: Path) -> None:
    files, folder = HangingFiles(), tmp_path / "w"
    with open_store(folder, store_config(commit_interval_s=1000.0, retry_s=0.05), files) as store:
        store_chain(store, OTHER)
        put_down(folder, 3)
        files.num_failures = 1
        store.flush()
        wait_until(lambda: store.flush(0.1) and store.stats().state == "ok")
        assert files.num_failures == 0
        assert counter(store, "written_extents") == 3
        store.check_integrity()
    with open_store(folder) as store:
        assert read(store, OTHER) == (12, {Tier.DISK})
