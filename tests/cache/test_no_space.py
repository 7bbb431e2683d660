"""A disk without room, a disk that may not be written or fails, and a clock that jumps: serving goes on.

The store says what is wrong and comes back by itself; what was durable before stays readable to the bit.
"""

import os
import re
import resource
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from cache.errors import FolderError
from cache.events import Tier
from cache.messages import PurgeQuery
from cache.node_store import NodeStore
from cache.tiers.disk import FileTier
from cache.tiers.memory import MemoryTier
from tests.cache.chains import BLOCK_SIZE, IMAGE_BYTES, budgets, offer, query, store_chain, store_config
from tests.cache.failing_files import FailingFiles
from tests.cache.stores import OTHER, TOKENS, counter, extent_files, in_thread, open_store, read, wait_until


def mount(*arguments: str) -> bool:
    return not subprocess.run(["mount", *arguments], check=False, capture_output=True).returncode


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if not mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)):
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nothing in the folder can be changed, by anybody."""
    assert mount("--bind", str(folder), str(folder))
    assert mount("-o", "remount,bind,ro", str(folder))
    yield
    subprocess.run(["umount", str(folder)], check=True)


def chain(number: int) -> list[int]:
    return [number * 1000 + i for i in range(3 * BLOCK_SIZE)]


def fill_up(folder: Path) -> Path:
    """Take all room that is left."""
    hog = folder / "hog"
    with hog.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    return hog


class Unaware(FileTier):
    """Does not look how much room there is, so that it runs into the end of it."""

    def free_bytes(self) -> int:
        return 1 << 40


def is_well(store: NodeStore) -> bool:
    return store.flush(0.1) and store.stats().state == "ok"


# -- no room -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval_s", [0.0, 0.01])
@pytest.mark.parametrize(
    ("make_tier", "reason"), [(FileTier, "free on the file system"), (Unaware, "No space left on device|disk is full")]
)
def test_a_file_system_that_is_full_is_said_and_survived(
    small_disk: Path, make_tier: type[FileTier], reason: str, interval_s: float
) -> None:
    folder = small_disk / "w"
    config = store_config(budgets(disk=1 << 30), retry_s=0.05, commit_interval_s=interval_s)
    with NodeStore(config, MemoryTier(), make_tier(folder)) as store:
        assert store_chain(store, TOKENS)
        assert store.flush()
        hog = fill_up(small_disk)
        for number in range(1, 6):
            assert store_chain(store, chain(number))
            assert read(store, chain(number)) == (12, {Tier.DRAM})
        wait_until(lambda: store.stats().state != "ok")
        assert re.search(reason, store.stats().state)
        assert not store.flush(0.5)
        assert read(store, TOKENS)[0] == 30
        store.check_integrity()
        hog.unlink()
        wait_until(lambda: is_well(store))
        store.check_integrity()
    with open_store(folder, config) as store:
        assert read(store, TOKENS) == (30, {Tier.DISK})
        for number in range(1, 6):
            assert read(store, chain(number)) == (12, {Tier.DISK}), "all of it was written when there was room"
        assert sum(path.stat().st_size for path in extent_files(folder)) == store.stats().disk_bytes


def test_a_store_that_outgrows_its_file_system_goes_on_from_dram(small_disk: Path) -> None:
    """The budget promises more than there is: nobody makes room from outside."""
    folder, hog = small_disk / "w", small_disk / "hog"
    hog.write_bytes(bytes(300 << 10))
    # Who stores waits for the disk, as long as that takes more.
    config = store_config(budgets(dram=100 * IMAGE_BYTES, disk=1 << 30), retry_s=0.02, store_wait_s=30.0)
    with open_store(folder, config) as store:
        for number in range(1, 150):
            assert store_chain(store, chain(number))
            assert read(store, chain(number))[0] == 12
        assert store.stats().state.startswith("degraded: ")
        durable = [number for number in range(1, 150) if read(store, chain(number)) == (12, {Tier.DISK})]
        assert durable
        store.check_integrity()
    hog.unlink()
    with open_store(folder, config) as store:
        assert all(read(store, chain(number))[0] == 12 for number in durable)
        assert list((folder / "tmp").iterdir()) == []
        store.check_integrity()


def test_the_space_that_must_stay_free_stays_free(small_disk: Path) -> None:
    folder = small_disk / "w"
    config = store_config(budgets(disk=1 << 30), retry_s=0.02, min_free_bytes=1 << 19)
    with open_store(folder, config) as store:
        for number in range(1, 80):
            assert store_chain(store, chain(number))
        wait_until(lambda: store.stats().state != "ok")
        assert "free on the file system" in store.stats().state
        room = os.statvfs(small_disk)
        assert room.f_bavail * room.f_frsize > (1 << 19) - 16 * IMAGE_BYTES, "but for the index"
        store.check_integrity()


def test_a_full_file_system_can_be_purged(small_disk: Path) -> None:
    folder = small_disk / "w"
    with open_store(folder, store_config(budgets(disk=1 << 30), retry_s=0.02)) as store:
        assert store_chain(store, TOKENS)
        assert store.flush()
        fill_up(small_disk)
        receipt = store.purge(PurgeQuery(tenant=""))
        assert (receipt.num_extents, receipt.num_left) == (8, 0)
        assert extent_files(folder) == []
        assert read(store, TOKENS)[0] == 0
        store.check_integrity()


def test_a_folder_on_a_full_file_system_says_so_and_keeps_its_index(small_disk: Path) -> None:
    folder = small_disk / "w"
    with open_store(folder) as store:
        assert store_chain(store, TOKENS)
    hog = fill_up(small_disk)
    index = (folder / "index.sqlite").read_bytes()
    with pytest.raises(FolderError, match=r"its file system is full .* Make room there"):
        open_store(folder)
    assert (folder / "index.sqlite").read_bytes() == index
    hog.unlink()
    with open_store(folder) as store:
        assert read(store, TOKENS) == (30, {Tier.DISK})


# -- not to be written -------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["tmp", "extents"])
def test_a_disk_that_becomes_read_only_is_said_and_survived(small_disk: Path, part: str) -> None:
    folder = small_disk / "w"
    config = store_config(budgets(dram=12 * IMAGE_BYTES), retry_s=0.05, store_wait_s=20.0)
    with open_store(folder, config) as store:
        assert store_chain(store, TOKENS)
        assert store.flush()
        with read_only(folder / part):
            assert store_chain(store, OTHER)
            wait_until(lambda: store.stats().state != "ok")
            assert store.stats().state.startswith("degraded: ")
            assert [read(store, tokens)[0] for tokens in (TOKENS, OTHER)] == [30, 12]
            assert store_chain(store, chain(1))
            store.check_integrity()
        wait_until(lambda: is_well(store))
        store.check_integrity()
    with open_store(folder) as store:
        assert read(store, OTHER) == (12, {Tier.DISK})
        assert list((folder / "tmp").iterdir()) == []


# -- a disk that fails -------------------------------------------------------------------------------


@pytest.mark.parametrize("interval_s", [0.0, 0.01])
@pytest.mark.parametrize("verb", ["write", "sync", "rename", "unlink", "make_folder"])
def test_an_io_error_at_any_verb_is_said_and_survived(tmp_path: Path, verb: str, interval_s: float) -> None:
    files, folder = FailingFiles(), tmp_path / "w"
    config = store_config(budgets(disk=12 * IMAGE_BYTES), retry_s=0.05, commit_interval_s=interval_s, store_wait_s=20.0)
    with open_store(folder, config, files) as store:
        assert store_chain(store, TOKENS)
        assert store.flush()
        files.fails = verb
        assert store_chain(store, OTHER)
        wait_until(lambda: store.stats().state != "ok")
        assert "Input/output error" in store.stats().state
        assert [read(store, tokens)[0] for tokens in (TOKENS, OTHER)] == [30, 12]
        store.check_integrity()
        files.fails = None
        wait_until(lambda: is_well(store))
        assert store_chain(store, chain(1)), "evicts"
        assert store.flush()
        store.check_integrity()
        wait_until(lambda: len(extent_files(folder)) == 12)
    with open_store(folder) as store:
        assert [read(store, tokens)[0] for tokens in (OTHER, chain(1))] == [12, 12]
        assert list((folder / "tmp").iterdir()) == []


def test_a_file_that_can_not_be_read_is_a_miss_and_can_be_stored_again(tmp_path: Path) -> None:
    """A folder in its place: reading it is an error that is no lack of a file."""
    folder = tmp_path / "w"
    with open_store(folder) as store:
        for number in range(1, 9):
            assert store_chain(store, chain(number)[:4])
    for path in extent_files(folder):
        path.unlink()
        path.mkdir()
        (path / "inside").write_bytes(b"something")
    with open_store(folder, store_config(retry_s=0.05)) as store:
        for number in range(1, 9):
            assert read(store, chain(number)[:4])[0] == 0
        wait_until(lambda: counter(store, "quarantined_extents") == 8)
        wait_until(lambda: is_well(store) and not store._worker._removals)
        for number in range(1, 9):
            assert store_chain(store, chain(number)[:4])
        wait_until(lambda: is_well(store))
        assert store.purge(PurgeQuery(tenant="")).num_left == 0
        store.check_integrity()
    with open_store(folder) as store:
        assert store.stats().num_extents == 0


@contextmanager
def no_more_files() -> Iterator[None]:
    """This process may open none."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_reader_that_may_open_no_more_files_spoils_none(tmp_path: Path) -> None:
    folder = tmp_path / "w"
    with open_store(folder) as store:
        assert store_chain(store, TOKENS)
    with open_store(folder) as store:
        with no_more_files():
            assert read(store, TOKENS)[0] == 0
        assert counter(store, "quarantined_extents") == 0
        assert read(store, TOKENS) == (30, {Tier.DISK})


# -- a clock that jumps ------------------------------------------------------------------------------


class JumpingClock:
    """Goes on as time does, except for jumps."""

    def __init__(self) -> None:
        self.offset_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.offset_s


@pytest.mark.parametrize("interval_s", [0.0, 0.2])
@pytest.mark.parametrize("jump_s", [-3600.0, 86_400.0])
def test_a_clock_that_jumps_neither_hangs_the_store_nor_loses_what_is_durable(
    tmp_path: Path, jump_s: float, interval_s: float
) -> None:
    clock, folder, files = JumpingClock(), tmp_path / "w", FailingFiles()
    config = store_config(
        budgets(dram=20 * IMAGE_BYTES), retry_s=0.1, commit_interval_s=interval_s, store_wait_s=0.5, lease_ttl_s=0.5
    )
    with NodeStore(config, MemoryTier(), FileTier(folder, files=files), clock=clock) as store:
        assert store_chain(store, TOKENS[:12])
        clock.offset_s += jump_s  # within a batch
        wait_until(lambda: counter(store, "written_extents") == 3)
        files.fails = "sync"
        assert store_chain(store, OTHER)
        wait_until(lambda: store.stats().state != "ok")
        files.fails = None
        clock.offset_s += jump_s  # while it waits for the next try
        wait_until(lambda: counter(store, "written_extents") == 6)
        assert store.stats().state == "ok"
        header = store.prepare_store(offer(chain(1))).extents[0]
        thread, refusals = in_thread(lambda: store.prepare_store(offer(chain(1))).refusal)
        clock.offset_s += jump_s  # while somebody waits
        thread.join(30.0)
        assert refusals == ["another writer is busy with these blocks"]
        store.abort_store((header.extent_id,))
        store.prepare_load(query(OTHER, "dead reader"))
        clock.offset_s += jump_s  # while a lease runs
        wait_until(lambda: counter(store, "expired_leases") >= 1)
        assert store_chain(store, chain(1))
        wait_until(store.flush)
        store.check_integrity()
    with open_store(folder) as store:
        for tokens in (TOKENS[:12], OTHER, chain(1)):
            assert read(store, tokens) == (12, {Tier.DISK})
