"""The disk tier: layout, damage, and what is left after every kind of crash."""

import errno
import json
import os
import resource
import signal
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from cache.errors import ExtentCorrupt, FolderError
from cache.extent import ExtentHeader, KVShape, seal
from cache.tiers.disk import MAX_QUARANTINED, FileTier
from cache.tiers.extent_file import read_all, read_sealed_header
from cache.tiers.index_db import IndexDb
from tests.cache.chains import sealed_image
from tests.cache.tiers.folders import HEADERS, A, B, C, files, ids, kill, recovered, spawn, write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "warehouse"


def forget_close(folder: Path) -> None:
    """As if the last owner had not closed the index."""
    with sqlite3.connect(folder / "index.sqlite") as db:
        db.execute(f"PRAGMA user_version = {db.execute('PRAGMA user_version').fetchone()[0] & ~1}")
    db.close()


# -- layout -----------------------------------------------------------------------------------------


def test_an_extent_is_one_file_named_by_its_content(folder: Path) -> None:
    tier = FileTier(folder)
    write(tier, A)
    extent_id = A.extent_id
    assert files(folder) == [folder / "extents" / extent_id[:2] / extent_id[2:4] / f"{extent_id}.kv"]
    assert tier.path(extent_id) == str(files(folder)[0])
    assert np.array_equal(tier.read(extent_id), sealed_image(A))
    assert files(folder)[0].stat().st_size == A.image_bytes
    assert json.loads((folder / "format.json").read_text()) == {"format": 2}
    assert repr(tier) == f"<FileTier {folder}>"
    tier.close()


def test_nobody_else_may_look_whatever_the_umask(folder: Path) -> None:
    before = os.umask(0)
    try:
        tier = FileTier(folder)
        write(tier, A)
    finally:
        os.umask(before)
    for path in [folder, *folder.rglob("*")]:
        expected = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == expected, path
    tier.close()


def test_delete_removes_file_and_row_and_open_readers_keep_reading(folder: Path) -> None:
    tier = FileTier(folder)
    write(tier, A, B)
    with Path(tier.path(A.extent_id)).open("rb") as reader:
        tier.delete(A.extent_id)
        tier.delete(A.extent_id)
        assert reader.read() == sealed_image(A).tobytes()
    with pytest.raises(FileNotFoundError):
        tier.read(A.extent_id)
    tier.close()
    assert recovered(folder) == ids(B)


def test_writing_again_replaces(folder: Path) -> None:
    tier = FileTier(folder)
    write(tier, A, A)
    tier.close()
    assert recovered(folder) == ids(A)


def test_the_order_of_use_survives(folder: Path) -> None:
    tier = FileTier(folder)
    write(tier, A, B, C)
    tier.save_order(ids(C, A, B))
    tier.close()
    assert recovered(folder) == ids(C, A, B)
    tier = FileTier(folder)
    write(tier, HEADERS[3])
    tier.close()
    assert recovered(folder) == ids(C, A, B, HEADERS[3])


def test_quarantine_keeps_the_last_few(folder: Path) -> None:
    tier = FileTier(folder)
    for header in HEADERS:
        write(tier, header)
        tier.quarantine(header.extent_id)
        time.sleep(0.01)
    kept = {path.stem for path in (folder / "quarantine").iterdir()}
    assert kept == set(ids(*HEADERS[-MAX_QUARANTINED:]))
    tier.quarantine("never there")
    tier.close()
    assert recovered(folder) == []


def test_a_header_larger_than_a_page_is_read_from_the_file(folder: Path) -> None:
    shape = KVShape(1, 1, 1, "bfloat16")
    ids = np.arange(400_000, dtype="<i4")
    header = ExtentHeader.make(A.root_hash, A.root_hash, [A.root_hash] * 12_500, ids, 32, shape)
    image = np.zeros(header.image_bytes, np.uint8)
    seal(header, image)
    tier = FileTier(folder, fsync=False)
    tier.write(header, image)
    tier.commit()
    fd = os.open(tier.path(header.extent_id), os.O_RDONLY)
    assert header.payload_offset > 1 << 20
    assert read_sealed_header(fd).header.extent_id == header.extent_id
    os.close(fd)
    tier.close()


def test_an_index_that_can_not_be_made_is_refused(folder: Path) -> None:
    folder.mkdir()
    (folder / "index.sqlite").mkdir()
    with pytest.raises(FolderError, match=r"index\.sqlite"):
        FileTier(folder)


# -- damage -----------------------------------------------------------------------------------------


def remove_index(folder: Path) -> None:
    IndexDb.remove(folder / "index.sqlite")


def overwrite_index(folder: Path) -> None:
    (folder / "index.sqlite").write_bytes(b"no database" * 1000)


def empty_index(folder: Path) -> None:
    (folder / "index.sqlite").write_bytes(b"")


def tear_index(folder: Path) -> None:
    content = (folder / "index.sqlite").read_bytes()
    (folder / "index.sqlite").write_bytes(content[:4096] + bytes(len(content) - 4096))


def other_columns(folder: Path) -> None:
    remove_index(folder)
    with sqlite3.connect(folder / "index.sqlite") as db:
        db.execute("CREATE TABLE extents (extent_id TEXT)")
    db.close()


@pytest.mark.parametrize("damage", [remove_index, overwrite_index, empty_index, tear_index, other_columns])
def test_a_lost_or_damaged_index_is_rebuilt_from_the_files(folder: Path, damage: Callable[[Path], None]) -> None:
    said: list[str] = []
    tier = FileTier(folder)
    write(tier, A, B, C)
    for header, mtime in ((B, 1), (C, 2), (A, 3)):
        os.utime(tier.path(header.extent_id), (mtime, mtime))
    tier.close()
    damage(folder)
    tier = FileTier(folder, report=said.append)
    assert [header.extent_id for header in tier.recover()] == ids(B, C, A), "oldest first"
    tier.close()
    assert "checking 3 extents" in said[-1]
    assert recovered(folder) == ids(B, C, A)


def test_a_file_that_is_not_what_its_name_says_is_set_aside(folder: Path) -> None:
    tier = FileTier(folder)
    write(tier, A, B, C)
    Path(tier.path(A.extent_id)).write_bytes(sealed_image(B).tobytes())
    Path(tier.path(B.extent_id)).write_bytes(sealed_image(B).tobytes()[:-1])
    tier.close()
    remove_index(folder)
    assert recovered(folder) == ids(C)
    assert {path.stem for path in (folder / "quarantine").iterdir()} == set(ids(A, B))


def test_files_and_rows_that_lost_each_other_are_matched_after_a_crash(folder: Path) -> None:
    tier = FileTier(folder)
    write(tier, A, B, C)
    tier.close()
    with sqlite3.connect(folder / "index.sqlite") as db:
        db.execute("DELETE FROM extents WHERE extent_id = ?", (A.extent_id,))
    db.close()
    Path(folder / "extents" / B.extent_id[:2] / B.extent_id[2:4] / f"{B.extent_id}.kv").unlink()
    forget_close(folder)
    assert sorted(recovered(folder)) == sorted(ids(A, C))


def test_after_a_proper_close_no_file_is_looked_at(folder: Path) -> None:
    said: list[str] = []
    tier = FileTier(folder)
    write(tier, A)
    tier.close()
    Path(tier.path(A.extent_id)).write_bytes(b"")
    tier = FileTier(folder, report=said.append)
    assert [header.extent_id for header in tier.recover()] == ids(A)
    assert said == []
    tier.close()


def test_leftovers_of_writes_are_removed(folder: Path) -> None:
    FileTier(folder).close()
    (folder / "tmp" / "half.kv.1.2").write_bytes(b"half")
    assert recovered(folder) == []


# -- crashes ----------------------------------------------------------------------------------------

CRASH = """
import os, signal, sys
from pathlib import Path
from cache.tiers.disk import FileTier
from tests.cache.chains import sealed_image
from tests.cache.tiers.folders import A, B

folder, step = Path(sys.argv[1]), int(sys.argv[2])
tier = FileTier(folder)
tier.write(A, sealed_image(A))
tier.commit()
print("ready", flush=True)
seen = 0

def count(event, arguments):
    global seen
    if event in ("open", "os.rename", "os.mkdir", "os.remove", "sqlite3.connect") or event.startswith("shutil"):
        seen += 1
        if seen > step:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(count)
tier.write(B, sealed_image(B))
tier.commit()
if len(sys.argv) > 3:
    tier.delete(A.extent_id)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_at_any_file_operation_of_a_write_leaves_all_or_nothing(tmp_path: Path) -> None:
    """Killed at the step-th file operation of the second write; what was durable before stays."""
    outcomes = []
    for step in range(8):
        process = spawn(CRASH, tmp_path / str(step), step)
        assert process.wait() == -signal.SIGKILL
        kill(process)
        outcomes.append(recovered(tmp_path / str(step)))
    assert all(left in (ids(A), ids(A, B)) for left in outcomes)
    assert outcomes[0] == ids(A)
    assert outcomes[-1] == ids(A, B)


def test_a_kill_at_the_end_keeps_both(folder: Path) -> None:
    process = spawn(CRASH, folder, 1000)
    process.wait()
    kill(process)
    assert recovered(folder) == ids(A, B)


def test_a_kill_within_a_delete_leaves_all_or_nothing(folder: Path) -> None:
    process = spawn(CRASH, folder, 1000, "delete")
    process.wait()
    kill(process)
    assert recovered(folder) == ids(B)


@pytest.mark.parametrize("has_file", [False, True])
def test_a_prepared_row_is_decided_by_its_file(folder: Path, has_file: bool) -> None:
    tier = FileTier(folder)
    write(tier, A, B)
    tier.close()
    with sqlite3.connect(folder / "index.sqlite") as db:
        db.execute("UPDATE extents SET is_complete = 0 WHERE extent_id = ?", (B.extent_id,))
    db.close()
    forget_close(folder)
    if not has_file:
        Path(tier.path(B.extent_id)).unlink()
    assert recovered(folder) == ids(A, B) if has_file else ids(A)


WRITE_UNTIL_KILLED = """
import itertools, sys
from pathlib import Path
from cache.tiers.disk import FileTier
from tests.cache.chains import header_of, sealed_image
tier = FileTier(Path(sys.argv[1]), fsync=False)
print("ready", flush=True)
for number in itertools.count(1):
    header = header_of([number * 100 + i for i in range(40)])
    tier.write(header, sealed_image(header))
    tier.commit()
    if number % 3 == 0:
        tier.delete(header.extent_id)
"""


def test_kills_at_random_moments_leave_whole_extents_only(folder: Path) -> None:
    before: set[str] = set()
    for pause_s in (0.0, 0.02, 0.05):
        process = spawn(WRITE_UNTIL_KILLED, folder)
        time.sleep(pause_s)
        kill(process)
        after = set(recovered(folder))
        assert before <= after
        before = after


# -- a disk without room ----------------------------------------------------------------------------


def test_a_file_that_ends_early_is_corrupt(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(bytes(10))
    fd = os.open(tmp_path / "short", os.O_RDONLY)
    with pytest.raises(ExtentCorrupt, match="cut short"):
        read_all(fd, np.zeros(11, np.uint8), 0)
    os.close(fd)


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """Let this process write files of at most so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, before)


def test_a_write_that_finds_no_room_leaves_nothing(folder: Path, small_files: Callable[[int], None]) -> None:
    tier = FileTier(folder)
    write(tier, A)
    small_files(5000)
    with pytest.raises(OSError, match=r"File too large|index can't be written") as failure:
        write(tier, B)
    assert failure.value.errno in (errno.EFBIG, None)
    small_files(1 << 30)
    assert files(folder) == [Path(tier.path(A.extent_id))]
    write(tier, C)
    tier.close()
    assert recovered(folder) == ids(A, C)
