"""The seam to the file system."""

import multiprocessing
import os
import stat
from pathlib import Path

import numpy as np
import pytest

from cache.tiers.files import Files, write_all


def test_a_short_write_is_continued_and_none_at_all_is_no_space() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, True)
    content = np.arange(200_000, dtype=np.uint32)
    process = multiprocessing.get_context("fork").Process(target=_drain, args=(reader, writer))
    process.start()
    os.close(reader)
    write_all(writer, content.data)
    os.close(writer)
    process.join()
    assert process.exitcode == 0


def _drain(reader: int, writer: int) -> None:
    os.close(writer)
    num_bytes = 0
    while chunk := os.read(reader, 4096):
        num_bytes += len(chunk)
    os._exit(0 if num_bytes == 800_000 else 1)


def test_a_new_file_is_its_owners_alone_and_never_another_ones(tmp_path: Path) -> None:
    path, files = tmp_path / "new", Files()
    before = os.umask(0)
    try:
        files.write(path, np.arange(3, dtype=np.uint8).data)
    finally:
        os.umask(before)
    assert path.read_bytes() == bytes([0, 1, 2])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        files.write(path, b"other")
    assert path.read_bytes() == bytes([0, 1, 2])


def test_files_and_folders_can_be_synced_and_what_is_gone_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    Files().sync(tmp_path / "file")
    Files().sync(tmp_path)
    with pytest.raises(FileNotFoundError):
        Files().sync(tmp_path / "gone")


def test_a_rename_replaces(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"new")
    (tmp_path / "b").write_bytes(b"old")
    Files().rename(tmp_path / "a", tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert (tmp_path / "b").read_bytes() == b"new"


def test_a_name_may_be_taken_away_twice(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    Files().unlink(tmp_path / "a")
    Files().unlink(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_made_once(tmp_path: Path) -> None:
    assert [Files().make_folder(tmp_path / "f") for _ in range(2)] == [True, False]
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o700
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FileExistsError):
        Files().make_folder(tmp_path / "file")
