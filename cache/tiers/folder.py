"""A warehouse's folder: its layout, its one owner, its format version.

<directory>/
  format.json            format version of the folder; if something in it is encrypted, the id of the key
  lock                   held (flock) by the owner
  index.sqlite           rows `prepared`, then `complete`; can be rebuilt from the files' headers
  extents/ab/cd/<id>.kv  images as `cache.extent` describes them
  tmp/                   files being written; emptied at start
  quarantine/            the last bad files
"""

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cache.errors import FolderError, FolderInUse
from cache.tiers.files import Files

FOLDER_VERSION = 2
LOCK_WAIT_S = 10.0
"""A killed owner's lock can outlive it by seconds."""
INDEX_NAME = "index.sqlite"
_FORMAT = "format.json"
_OWN_FOLDERS = ("extents", "tmp", "quarantine")
_OWN_NAMES = {"lock", INDEX_NAME, f"{INDEX_NAME}-wal", f"{INDEX_NAME}-shm", *_OWN_FOLDERS, "lost+found"}


class Folder:
    """An owned folder, from the constructor to `close`."""

    def __init__(
        self,
        directory: Path,
        files: Files,
        report: Callable[[str], None],
        lock_wait_s: float = LOCK_WAIT_S,
        key_id: str | None = None,
    ) -> None:
        """`key_id`: of the key with which new files are encrypted.

        Raises FolderError if the folder can't be used, FolderInUse if another process owns it.
        """
        self.directory = directory
        self._key_id = key_id
        self._extents = str(directory / "extents")
        self._files = files
        self._report = report
        with translated_errors(directory):
            self._make_folders()
            self._lock_fd: int | None = self._take_lock(lock_wait_s)
            try:
                self._check_format()
                for leftover in (directory / "tmp").iterdir():
                    self._files.unlink(leftover)
            except (OSError, FolderError):
                self.close()
                raise

    def __repr__(self) -> str:
        return f"<Folder {self.directory}>"

    @property
    def index(self) -> Path:
        return self.directory / INDEX_NAME

    def extent(self, extent_id: str) -> str:
        """Where an extent's file is, or would be."""
        return f"{self._extents}/{extent_id[:2]}/{extent_id[2:4]}/{extent_id}.kv"

    def temporary(self, name: str) -> Path:
        """A place for a file that is being written."""
        return self.directory / "tmp" / f"{name}.{os.getpid()}"

    def is_intact(self) -> bool:
        """False if somebody has taken the folder away, or put another one in its place, or it was given up."""
        if self._lock_fd is None:
            return False
        try:
            held, there = os.fstat(self._lock_fd), (self.directory / "lock").stat()
            return (held.st_dev, held.st_ino) == (there.st_dev, there.st_ino) and self.index.exists()
        except OSError:
            return False

    def close(self) -> None:
        """Give the folder up. Safe to call twice."""
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def _make_folders(self) -> None:
        new = [path for path in (self.directory, *self.directory.parents) if not path.exists()]
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in new:
            self._files.sync(path.parent)
        if not (self.directory / _FORMAT).exists():
            foreign = sorted(path.name for path in self.directory.iterdir() if path.name not in _OWN_NAMES)
            if foreign:  # its mode is about to change, and nothing of ours belongs between a user's files
                raise FolderError(
                    f"warehouse folder {self.directory} holds other files ({foreign[0]}). "
                    "Choose an empty or a new folder with --warehouse."
                )
        self.directory.chmod(0o700)
        for name in _OWN_FOLDERS:
            self._files.make_folder(self.directory / name)

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

    def _check_format(self) -> None:
        path = self.directory / _FORMAT
        if not path.exists():
            self._write_format()
            return
        try:
            description = json.loads(path.read_bytes())
            version, key_id = int(description["format"]), description.get("key")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise FolderError(f"{path} is no description of a warehouse; is this the right folder?") from None
        if version > FOLDER_VERSION:
            raise FolderError(
                f"warehouse folder {self.directory} has format {version}, this program reads format {FOLDER_VERSION}. "
                "Choose another folder with --warehouse."
            )
        if version < FOLDER_VERSION:
            self._leave_behind(version)
        elif self._key_id not in (None, key_id):
            self._take_key(key_id)
        self._files.sync(self.directory)  # whoever made all this may have died before

    def _take_key(self, old: str | None) -> None:
        if old is not None:
            raise FolderError(
                f"warehouse folder {self.directory} is encrypted with another key, {old}; the one that is given is "
                f"{self._key_id}. Give the right one, choose another folder with --warehouse, or empty this one with "
                "`tokenloft warehouse purge --all`."
            )
        self._write_format()

    def forget_key(self) -> None:
        """Nothing encrypted is left: the next owner may come with another key."""
        self._key_id = None
        self._write_format()

    def _leave_behind(self, version: int) -> None:
        """Blocks in an older format can't be read; left where they are they would take room for ever."""
        old = extent_files(self.directory)
        self._report(
            f"warehouse folder {self.directory} has format {version}, this program writes format {FOLDER_VERSION}: "
            f"its {len(old)} extents are removed and will be computed again"
        )
        for path in (*old, self.index, *(self.index.with_name(INDEX_NAME + end) for end in ("-wal", "-shm"))):
            path.unlink(missing_ok=True)
        self._write_format()

    def _write_format(self) -> None:
        temporary = self.temporary(_FORMAT)
        temporary.unlink(missing_ok=True)
        key = {"key": self._key_id} if self._key_id is not None else {}
        self._files.write(temporary, json.dumps({"format": FOLDER_VERSION} | key).encode())
        self._files.sync(temporary)
        self._files.rename(temporary, self.directory / _FORMAT)
        self._files.sync(self.directory)


@contextmanager
def translated_errors(directory: Path) -> Iterator[None]:
    """Turn what goes wrong while a folder is opened into a FolderError that says what to do."""
    try:
        yield
    except PermissionError as error:
        raise FolderError(
            f"warehouse folder {directory} can't be written: {error.strerror} ({error.filename}). "
            "Give this user access to it or choose another one with --warehouse."
        ) from error
    except (FileExistsError, NotADirectoryError) as error:
        raise FolderError(f"warehouse folder {directory}: {error.filename} is no folder") from error
    except OSError as error:
        raise FolderError(f"warehouse folder {directory} can't be opened: {error}") from error


def is_warehouse(directory: Path) -> bool:
    """Some node store has had this folder."""
    return (directory / _FORMAT).is_file()


def extent_files(directory: Path) -> list[Path]:
    """All extents in a warehouse's folder, whether its index knows them or not."""
    return list(directory.glob("extents/*/*/*.kv"))
