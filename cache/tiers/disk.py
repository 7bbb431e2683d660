"""The disk tier: one file per extent, an index beside them, one owner per folder.

    <directory>/
      format.json            format version of the folder
      lock                   held (flock) by the owner
      index.sqlite           rows `prepared`, then `complete`; can be rebuilt from the files' headers
      extents/ab/cd/<id>.kv  images as `cache.extent` describes them
      tmp/                   files being written; emptied at start
      quarantine/            the last bad files

A write is: row `prepared`, temp file, fsync, rename, fsync of the folder, row `complete`. A delete unlinks
first and updates the index after: a full disk has no room for rows. After an owner that did not close, rows
and files are compared: the few files without a complete row are checked, rows without a file and temp files
are removed. Nothing is ever pickled.
"""

import errno
import fcntl
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cache.errors import ExtentCorrupt, FolderError, FolderInUse
from cache.extent import ALIGNMENT, ExtentHeader, Image, SealedHeader, aligned_empty, front_bytes, parse_header
from cache.tiers.index_db import IndexDamaged, IndexDb

FOLDER_VERSION = 1
LOCK_WAIT_S = 10.0
"""A killed owner's lock can outlive it by seconds."""
MAX_QUARANTINED = 4
"""They are outside the disk budget."""
INDEX_NAME = "index.sqlite"
_FORMAT = "format.json"
_OWN_NAMES = {
    "lock",
    INDEX_NAME,
    f"{INDEX_NAME}-wal",
    f"{INDEX_NAME}-shm",
    "extents",
    "tmp",
    "quarantine",
    "lost+found",
}


class FileTier:
    """Extents as files in one folder, which this object owns until `close`."""

    def __init__(
        self,
        directory: Path,
        *,
        fsync: bool = True,
        report: Callable[[str], None] = lambda message: None,
        lock_wait_s: float = LOCK_WAIT_S,
    ) -> None:
        """Raises FolderError if the folder can't be used, FolderInUse if another process owns it."""
        self.directory = directory
        self._fsync = fsync
        self._report = report
        self._guard = threading.Lock()
        try:
            self._make_folders()
            self._lock_fd = self._take_lock(lock_wait_s)
            try:
                self._db = self._open_folder()
            except (OSError, FolderError):
                os.close(self._lock_fd)
                raise
        except PermissionError as error:
            raise FolderError(
                f"warehouse folder {directory} can't be written: {error.strerror} ({error.filename}). "
                "Give this user access to it or choose another one with --warehouse."
            ) from error
        except (FileExistsError, NotADirectoryError) as error:
            raise FolderError(f"warehouse folder {directory}: {error.filename} is no folder") from error
        except OSError as error:
            raise FolderError(f"warehouse folder {directory} can't be opened: {error}") from error

    def __repr__(self) -> str:
        return f"<FileTier {self.directory}>"

    # -- opening ------------------------------------------------------------------------------------

    def _make_folders(self) -> None:
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not (self.directory / _FORMAT).exists():
            foreign = sorted(path.name for path in self.directory.iterdir() if path.name not in _OWN_NAMES)
            if foreign:  # its mode is about to change, and nothing of ours belongs between a user's files
                raise FolderError(
                    f"warehouse folder {self.directory} holds other files ({foreign[0]}). "
                    "Choose an empty or a new folder with --warehouse."
                )
        self.directory.chmod(0o700)
        for name in ("extents", "tmp", "quarantine"):
            (self.directory / name).mkdir(mode=0o700, exist_ok=True)

    def _take_lock(self, wait_s: float) -> int:
        fd = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
                return fd
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    owner = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
                    os.close(fd)
                    raise FolderInUse(
                        f"warehouse folder {self.directory} is in use by process {owner}. "
                        "Stop that server or choose another folder with --warehouse."
                    ) from None
                time.sleep(0.1)
            except OSError:
                os.close(fd)
                raise

    def _open_folder(self) -> IndexDb:
        self._check_version()
        for leftover in (self.directory / "tmp").iterdir():
            leftover.unlink()
        db = self._open_index()
        if not db.was_closed:
            self._reconcile(db)
        return db

    def _check_version(self) -> None:
        path = self.directory / _FORMAT
        if not path.exists():
            self._replace(path, json.dumps({"format": FOLDER_VERSION}).encode())
            return
        try:
            version = json.loads(path.read_bytes())["format"]
        except (ValueError, KeyError, TypeError):
            raise FolderError(f"{path} is no description of a warehouse; is this the right folder?") from None
        if version != FOLDER_VERSION:
            raise FolderError(
                f"warehouse folder {self.directory} has format {version}, this program reads format {FOLDER_VERSION}. "
                "Choose another folder with --warehouse."
            )

    def _open_index(self) -> IndexDb:
        path = self.directory / INDEX_NAME
        try:
            return IndexDb(path)
        except IndexDamaged as damage:
            self._report(f"the index of {self.directory} is damaged ({damage}): rebuilding it from the extents")
        IndexDb.remove(path)
        try:
            return IndexDb(path)
        except IndexDamaged as damage:
            raise FolderError(f"the index {path} can't be made: {damage}") from damage

    def _reconcile(self, db: IndexDb) -> None:
        """Make rows and files agree after a crash, a power cut or the loss of the index.

        Reads the headers of those files only that have no complete row, oldest first. A file that is whole
        is kept: the rename made it so. A row without a file goes.
        """
        states = db.states()
        files = extent_files(self.directory)
        unknown = [path for path in files if not states.get(path.stem)]
        if unknown:
            self._report(f"checking {len(unknown)} extents that the index of {self.directory} does not vouch for")
        for path in sorted(unknown, key=lambda path: path.stat().st_mtime):
            header = self._whole_header(path)
            if header is None:
                self._set_aside(path)
                db.remove_row(path.stem)
            else:
                db.prepare(header)
                db.complete(header.extent_id)
        for extent_id in states.keys() - {path.stem for path in files}:
            db.remove_row(extent_id)

    def _whole_header(self, path: Path) -> ExtentHeader | None:
        try:
            with path.open("rb") as file:
                header = read_sealed_header(file.fileno()).header
                size = os.fstat(file.fileno()).st_size
        except (OSError, ExtentCorrupt):
            return None
        return header if header.extent_id == path.stem and header.image_bytes == size else None

    def recover(self) -> Iterator[ExtentHeader]:
        return self._db.complete_headers()

    # -- images -------------------------------------------------------------------------------------

    def path(self, extent_id: str) -> str:
        return str(self.directory / "extents" / extent_id[:2] / extent_id[2:4] / f"{extent_id}.kv")

    def write(self, header: ExtentHeader, image: Image) -> None:
        extent_id = header.extent_id
        with self._guard:
            self._db.prepare(header)
        try:
            self._replace(Path(self.path(extent_id)), image.data)
            with self._guard:
                self._db.complete(extent_id)
        except OSError:
            self.delete(extent_id)
            raise

    def _replace(self, path: Path, content: bytes | memoryview) -> None:
        temporary = self.directory / "tmp" / f"{path.name}.{os.getpid()}.{threading.get_ident()}"
        for folder in (path.parent.parent, path.parent):
            if not folder.exists():
                folder.mkdir(mode=0o700, exist_ok=True)
                self._sync_folder(folder.parent)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            try:
                write_all(fd, content)
                if self._fsync:
                    os.fsync(fd)
            finally:
                os.close(fd)
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        self._sync_folder(path.parent)

    def _sync_folder(self, folder: Path) -> None:
        if not self._fsync:
            return
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def read(self, extent_id: str) -> Image:
        with Path(self.path(extent_id)).open("rb", buffering=0) as file:
            image = aligned_empty(os.fstat(file.fileno()).st_size)
            read_all(file.fileno(), image, 0)
            return image

    def delete(self, extent_id: str) -> None:
        Path(self.path(extent_id)).unlink(missing_ok=True)
        with self._guard:
            self._db.remove_row(extent_id)

    def quarantine(self, extent_id: str) -> None:
        self._set_aside(Path(self.path(extent_id)))
        with self._guard:
            self._db.remove_row(extent_id)

    def _set_aside(self, path: Path) -> None:
        aside = self.directory / "quarantine"
        if path.exists():
            path.replace(aside / path.name)
            os.utime(aside / path.name)  # the age of the finding counts, not the file's
        for old in sorted(aside.iterdir(), key=lambda p: p.stat().st_mtime)[:-MAX_QUARANTINED]:
            old.unlink()

    def save_order(self, extent_ids: list[str]) -> None:
        with self._guard:
            self._db.save_order(extent_ids)

    def free_bytes(self) -> int:
        return shutil.disk_usage(self.directory).free

    def close(self) -> None:
        with self._guard:
            self._db.close()
        os.close(self._lock_fd)


def extent_files(directory: Path) -> list[Path]:
    """All extents in a warehouse's folder, whether its index knows them or not."""
    return list(directory.glob("extents/*/*/*.kv"))


def write_all(fd: int, content: bytes | memoryview) -> None:
    """Write everything; a short write without an error is continued, none at all is ENOSPC."""
    view = memoryview(content).cast("B")
    while len(view):
        written = os.write(fd, view)
        if not written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        view = view[written:]


def read_all(fd: int, target: Image, offset: int) -> None:
    """Fill `target` from `offset` on. Raises ExtentCorrupt if the file ends before."""
    view = target.data
    while len(view):
        num_read = os.preadv(fd, [view], offset)
        if not num_read:
            raise ExtentCorrupt("the file is cut short")
        view, offset = view[num_read:], offset + num_read


def read_sealed_header(fd: int) -> SealedHeader:
    """The header of an open extent file, whose first page nearly always holds it whole."""
    front = os.pread(fd, ALIGNMENT, 0)
    num_bytes = front_bytes(front)
    if num_bytes > len(front):
        front = os.pread(fd, min(num_bytes, os.fstat(fd).st_size), 0)
    return parse_header(front)
