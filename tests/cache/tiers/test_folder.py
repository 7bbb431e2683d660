"""A warehouse's folder: its layout, its one owner, its version, and folders that are none."""

import json
import os
import re
import shutil
import stat
from pathlib import Path

import pytest

from cache.errors import FolderError, FolderInUse
from cache.tiers.disk import FileTier
from cache.tiers.files import Files
from cache.tiers.folder import FOLDER_VERSION, Folder
from tests.cache.tiers.folders import A, ids, kill, recovered, spawn, write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "warehouse"


# -- layout ----------------------------------------------------------------------------------------


def test_a_folder_open_to_others_is_closed_to_them(folder: Path) -> None:
    folder.mkdir(mode=0o755)
    FileTier(folder).close()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


# -- one owner --------------------------------------------------------------------------------------


def test_a_second_owner_is_told_who_has_it(folder: Path) -> None:
    tier = FileTier(folder)
    with pytest.raises(FolderInUse, match=f"{re.escape(str(folder))} is in use by process {os.getpid()}"):
        FileTier(folder, lock_wait_s=0.2)
    tier.close()
    FileTier(folder, lock_wait_s=0.0).close()


OWN = """
import sys, time
from pathlib import Path
from cache.tiers.disk import FileTier
tier = FileTier(Path(sys.argv[1]))
print("ready", flush=True)
time.sleep(60)
"""


def test_a_killed_owners_folder_is_taken_over(folder: Path) -> None:
    owner = spawn(OWN, folder)
    with pytest.raises(FolderInUse, match=f"process {owner.pid}"):
        FileTier(folder, lock_wait_s=0.1)
    kill(owner)
    FileTier(folder, lock_wait_s=5.0).close()


def test_opening_waits_for_an_owner_that_is_on_its_way_out(folder: Path) -> None:
    owner = spawn(OWN.replace("time.sleep(60)", "time.sleep(0.5)"), folder)
    FileTier(folder, lock_wait_s=30.0).close()
    kill(owner)


def test_a_folder_that_can_not_be_opened_is_not_kept_locked(folder: Path) -> None:
    FileTier(folder).close()
    (folder / "format.json").write_text('{"format": 3}')
    for _ in range(2):
        with pytest.raises(FolderError, match="has format 3, this program reads format 2"):
            FileTier(folder, lock_wait_s=0.0)


# -- folders that are none --------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "{}", "[1]", "no json"])
def test_a_broken_description_is_refused(folder: Path, content: str) -> None:
    FileTier(folder).close()
    (folder / "format.json").write_text(content)
    with pytest.raises(FolderError, match="is this the right folder"):
        FileTier(folder)


@pytest.mark.parametrize("name", ["", "extents", "tmp", "quarantine"])
def test_a_file_in_place_of_a_folder_is_named(folder: Path, name: str) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    with pytest.raises(FolderError, match=f"{re.escape(str(path))} is no folder"):
        FileTier(folder)


def test_a_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FolderError, match="is no folder"):
        FileTier(tmp_path / "file" / "warehouse")


def test_a_folder_with_foreign_files_is_left_alone(folder: Path) -> None:
    folder.mkdir(mode=0o755)
    (folder / "thesis.tex").write_text("mine")
    with pytest.raises(FolderError, match=r"holds other files \(thesis.tex\)"):
        FileTier(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


def test_a_place_where_no_folder_can_be_made_is_refused() -> None:
    with pytest.raises(FolderError, match="/proc/tokenloft can't be opened"):
        FileTier(Path("/proc/tokenloft"))


# -- versions ---------------------------------------------------------------------------------------


def of_version(folder: Path, version: int) -> Path:
    """A folder as an older program left it: its extents and its index are nothing that this one can read."""
    FileTier(folder).close()
    (folder / "format.json").write_text(json.dumps({"format": version}))
    path = folder / "extents" / "ab" / "cd" / f"abcd{version}.kv"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"blocks of another format")
    (folder / "index.sqlite").write_bytes(b"rows of another format")
    return path


@pytest.mark.parametrize("version", [0, 1])
def test_a_folder_of_an_older_format_is_emptied_with_a_message(folder: Path, version: int) -> None:
    old = of_version(folder, version)
    said: list[str] = []
    tier = FileTier(folder, report=said.append)
    assert said == [
        f"warehouse folder {folder} has format {version}, this program writes format {FOLDER_VERSION}: "
        "its 1 extents are removed and will be computed again"
    ]
    assert not old.exists()
    assert tier.recover() == []
    write(tier, A)
    tier.close()
    assert json.loads((folder / "format.json").read_text()) == {"format": FOLDER_VERSION}
    assert recovered(folder) == ids(A)
    tier = FileTier(folder, report=said.append)
    assert len(said) == 1, "once"
    tier.close()


def test_a_folder_of_a_newer_format_is_refused_and_left_as_it_is(folder: Path) -> None:
    newer = of_version(folder, FOLDER_VERSION + 1)
    index = (folder / "index.sqlite").read_bytes()
    with pytest.raises(FolderError, match=r"has format 3, this program reads format 2\. Choose another folder"):
        FileTier(folder)
    assert newer.read_bytes() == b"blocks of another format"
    assert (folder / "index.sqlite").read_bytes() == index


# -- a folder that is taken away --------------------------------------------------------------------


def intact(path: Path) -> Folder:
    opened = Folder(path, Files(), lambda message: None)
    opened.index.touch()
    assert opened.is_intact()
    return opened


def test_a_folder_that_is_removed_or_moved_is_not_intact(folder: Path) -> None:
    opened = intact(folder)
    folder.rename(folder.with_name("elsewhere"))
    assert not opened.is_intact()
    folder.with_name("elsewhere").rename(folder)
    assert opened.is_intact(), "and is again when it comes back"
    shutil.rmtree(folder)
    assert not opened.is_intact()
    opened.close()


def test_another_folder_in_its_place_is_another_one(folder: Path) -> None:
    opened = intact(folder)
    folder.rename(folder.with_name("elsewhere"))
    another = intact(folder)
    assert not opened.is_intact()
    another.close()
    opened.close()


def test_a_folder_without_its_index_is_not_intact(folder: Path) -> None:
    opened = intact(folder)
    opened.index.unlink()
    assert not opened.is_intact()
    opened.close()


def test_a_folder_may_be_given_up_twice(folder: Path) -> None:
    opened = intact(folder)
    opened.close()
    with (folder / "anything").open("w") as other:  # may get the number of the descriptor that was closed
        opened.close()
        assert not opened.is_intact()
        other.write("still open")
