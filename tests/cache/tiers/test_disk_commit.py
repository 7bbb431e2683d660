"""Extents that are made durable together, on a file system that fails at any step or loses what was not synced."""

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cache.errors import FolderError
from cache.tiers.disk import FileTier
from cache.tiers.files import Files
from tests.cache.chains import sealed_image
from tests.cache.tiers.folders import HEADERS, A, B, C, files, ids, recovered, write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "warehouse"


class Steps(Files):
    """Keeps a list of what was done to what, and fails at one of the steps from `fail_at` on."""

    def __init__(self) -> None:
        self.done: list[tuple[str, str]] = []
        self.fail_at: int | None = None

    def step(self, verb: str, path: Path) -> None:
        if self.fail_at is not None and len(self.done) >= self.fail_at:
            self.fail_at = None
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        self.done.append((verb, path.stem if path.suffix == ".kv" else path.name.split(".")[0]))

    def write(self, path: Path, content: bytes | memoryview) -> None:
        self.step("write", path)
        super().write(path, content)

    def sync(self, path: Path) -> None:
        self.step("sync folder" if path.is_dir() else "sync", path)
        super().sync(path)

    def rename(self, source: Path, target: Path) -> None:
        self.step("rename", target)
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        self.step("unlink", path)
        super().unlink(path)

    def make_folder(self, path: Path) -> bool:
        self.step("make folder", path)
        return super().make_folder(path)


def put_down(tier: FileTier) -> None:
    for header in (B, C):
        tier.write(header, sealed_image(header))


def test_nothing_is_visible_before_the_commit(folder: Path) -> None:
    tier = FileTier(folder)
    put_down(tier)
    assert files(folder) == []
    assert not tier.holds(B.extent_id)
    with pytest.raises(FileNotFoundError):
        tier.read(B.extent_id)
    assert tier.commit() == ids(B, C)
    assert tier.commit() == [], "each is committed once"
    assert tier.holds(B.extent_id)
    assert np.array_equal(tier.read(C.extent_id), sealed_image(C))
    assert list((folder / "tmp").iterdir()) == []
    tier.close()
    assert recovered(folder) == ids(B, C)


def test_what_is_not_committed_is_gone_after_a_close(folder: Path) -> None:
    tier = FileTier(folder)
    write(tier, A)
    put_down(tier)
    tier.close()
    assert recovered(folder) == ids(A)


def test_content_before_names_and_names_before_their_folders(folder: Path) -> None:
    steps = Steps()
    tier = FileTier(folder, files=steps)
    put_down(tier)
    steps.done.clear()
    tier.commit()
    order = [verb for verb, _ in steps.done if verb != "make folder"]
    assert order[:4] == ["sync", "sync", "rename", "rename"]
    assert set(order[4:]) == {"sync folder"}
    for header in (B, C):
        changed = {header.extent_id[2:4], header.extent_id[:2], "extents"}
        assert changed <= {name for verb, name in steps.done if verb == "sync folder"}
    tier.close()


def test_without_fsync_nothing_is_synced(folder: Path) -> None:
    steps = Steps()
    tier = FileTier(folder, files=steps, fsync=False)
    steps.done.clear()
    put_down(tier)
    tier.commit()
    tier.close()
    assert not [verb for verb, _ in steps.done if verb.startswith("sync")]
    assert recovered(folder) == ids(B, C)


def failing_steps(tmp_path: Path, tier_of: list[FileTier]) -> Iterator[tuple[int, Path]]:
    """A fresh folder with A in it, once for each step that can fail, until none is left to fail."""
    for fail_at in range(100):
        steps = Steps()
        folder = tmp_path / str(fail_at)
        tier = FileTier(folder, files=steps)
        write(tier, A)
        steps.done.clear()
        steps.fail_at = fail_at
        tier_of[:] = [tier]
        yield fail_at, folder
        if steps.fail_at is not None:
            return
    raise AssertionError("there is no end of steps")


def test_a_failure_at_any_step_leaves_what_was_durable_and_all_or_nothing_of_the_rest(tmp_path: Path) -> None:
    tiers: list[FileTier] = []
    num_failures = 0
    for _, folder in failing_steps(tmp_path, tiers):
        (tier,) = tiers
        try:
            put_down(tier)
            tier.commit()
            expected = ids(A, B, C)
        except OSError:
            tier.abandon()
            num_failures += 1
            expected = ids(A)
        assert sorted(path.stem for path in files(folder)) == sorted(expected)
        assert list((folder / "tmp").iterdir()) == []
        tier.close()
        assert recovered(folder) == expected
    assert num_failures > 10


def test_after_a_failure_at_any_step_the_same_extents_can_be_written(tmp_path: Path) -> None:
    tiers: list[FileTier] = []
    for _, folder in failing_steps(tmp_path, tiers):
        (tier,) = tiers
        try:
            put_down(tier)
            tier.commit()
        except OSError:
            tier.abandon()
            put_down(tier)
            assert tier.commit() == ids(B, C)
        tier.close()
        assert recovered(folder) == ids(A, B, C)


@pytest.mark.parametrize("verb", ["delete", "quarantine"])
def test_a_late_deletion_spares_the_copy_that_is_being_written(folder: Path, verb: str) -> None:
    tier = FileTier(folder)
    write(tier, A)
    tier.write(A, sealed_image(A))
    tier.delete(A.extent_id) if verb == "delete" else tier.quarantine(A.extent_id)
    assert files(folder) == []
    assert tier.commit() == ids(A)
    tier.close()
    assert recovered(folder) == ids(A)


# -- a power cut ------------------------------------------------------------------------------------


class Volatile(Files):
    """Remembers what is in memory only, and can forget it as a power cut would."""

    def __init__(self) -> None:
        self.contents: set[Path] = set()
        """Files whose content is not on the disk."""
        self.names: dict[Path, list[Path]] = {}
        """By folder: names that have come into it and are not on the disk."""

    def write(self, path: Path, content: bytes | memoryview) -> None:
        super().write(path, content)
        self.contents.add(path)
        self.names.setdefault(path.parent, []).append(path)

    def sync(self, path: Path) -> None:
        super().sync(path)
        self.contents.discard(path)
        self.names.pop(path, None)

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        if source in self.contents:
            self.contents.remove(source)
            self.contents.add(target)
        self.names.setdefault(target.parent, []).append(target)

    def make_folder(self, path: Path) -> bool:
        is_new = super().make_folder(path)
        if is_new:
            self.names.setdefault(path.parent, []).append(path)
        return is_new

    def cut_power(self, *, keeps_names: bool) -> None:
        """What is not synced: its content is zeros, and its name is gone unless names happen to be kept."""
        for path in self.contents:
            if path.exists():
                path.write_bytes(bytes(path.stat().st_size))
        for path in [] if keeps_names else [each for names in self.names.values() for each in names]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


@pytest.mark.parametrize("is_committed", [False, True])
@pytest.mark.parametrize("keeps_names", [False, True])
def test_what_was_committed_survives_a_power_cut(folder: Path, *, keeps_names: bool, is_committed: bool) -> None:
    volatile = Volatile()
    tier = FileTier(folder, files=volatile)
    write(tier, A)
    put_down(tier)
    if is_committed:
        tier.commit()
    tier._db._db.close()  # nobody closes it
    tier._folder.close()
    volatile.cut_power(keeps_names=keeps_names)
    assert recovered(folder) == (ids(A, B, C) if is_committed else ids(A))


class PowerCut(Exception):
    pass


class VolatileSteps(Volatile):
    """Loses power before one of the steps."""

    def __init__(self, num_steps: int) -> None:
        super().__init__()
        self.left = num_steps

    def step(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise PowerCut

    def sync(self, path: Path) -> None:
        self.step()
        super().sync(path)

    def rename(self, source: Path, target: Path) -> None:
        self.step()
        super().rename(source, target)

    def make_folder(self, path: Path) -> bool:
        self.step()
        return super().make_folder(path)


@pytest.mark.parametrize("keeps_names", [False, True])
def test_a_power_cut_at_any_step_of_a_commit_leaves_whole_extents_only(tmp_path: Path, *, keeps_names: bool) -> None:
    outcomes: list[set[str]] = []
    for num_steps in range(100):
        folder, volatile = tmp_path / str(num_steps), VolatileSteps(1000)
        tier = FileTier(folder, files=volatile)
        write(tier, A)
        put_down(tier)
        volatile.left = num_steps
        try:
            tier.commit()
            break
        except PowerCut:
            tier._db._db.close()
            tier._folder.close()
        volatile.cut_power(keeps_names=keeps_names)
        outcomes.append(set(recovered(folder)))
    assert all(set(ids(A)) <= outcome <= set(ids(A, B, C)) for outcome in outcomes)
    assert outcomes[0] == set(ids(A))
    assert len(outcomes) > 8
    tier.close()


# -- a folder that is taken away --------------------------------------------------------------------


def test_a_folder_that_was_removed_is_owned_anew_and_empty(folder: Path) -> None:
    tier = FileTier(folder)
    write(tier, A)
    put_down(tier)
    shutil.rmtree(folder)
    assert not tier.is_intact()
    tier.reopen()
    assert tier.is_intact()
    assert (tier.recover(), tier.commit()) == ([], [])
    write(tier, B)
    tier.close()
    assert recovered(folder) == ids(B)


def test_a_folder_that_was_swapped_is_taken_as_it_is(folder: Path) -> None:
    other = FileTier(folder.with_name("other"))
    write(other, B, C)
    other.close()
    tier = FileTier(folder)
    write(tier, A)
    folder.rename(folder.with_name("old"))
    folder.with_name("other").rename(folder)
    assert not tier.is_intact()
    tier.reopen()
    assert [header.extent_id for header in tier.recover()] == ids(B, C)
    write(tier, HEADERS[3])
    tier.close()
    assert recovered(folder) == ids(B, C, HEADERS[3])
    assert recovered(folder.with_name("old")) == ids(A)


def test_a_folder_that_can_not_be_owned_anew_is_an_error_each_time_until_it_can(folder: Path) -> None:
    tier = FileTier(folder, lock_wait_s=0.0)
    write(tier, A)
    shutil.rmtree(folder)
    folder.write_text("in the way")
    for _ in range(3):
        with pytest.raises(FolderError, match="is no folder"):
            tier.reopen()
        assert not tier.is_intact()
        with pytest.raises(OSError, match="can't be written"):
            tier.write(B, sealed_image(B))
        tier.abandon()
    folder.unlink()
    tier.reopen()
    assert tier.recover() == []
    write(tier, B)
    tier.close()
    assert recovered(folder) == ids(B)


def test_a_tier_that_lost_its_folder_for_good_can_be_closed(folder: Path) -> None:
    tier = FileTier(folder, lock_wait_s=0.0)
    shutil.rmtree(folder)
    folder.write_text("in the way")
    with pytest.raises(FolderError):
        tier.reopen()
    tier.close()
    tier.close()
