"""The disk tier: one file per extent in a folder of its own (`cache.tiers.folder`), an index beside them.

A write is: row `prepared`, temp file; and, for one or several of them together, `commit`: fsync of each file,
rename, fsync of the folders, rows `complete`. Nothing is visible before. A delete unlinks first and updates
the index after: a full disk has no room for rows. After an owner that did not close, rows and files are
compared: the few files without a complete row are checked, rows without a file and temp files are removed.
Nothing is ever pickled.
"""

import os
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from cache.collector import paused_collector
from cache.errors import ExtentCorrupt, FolderError
from cache.extent import ALIGNMENT, ExtentHeader, Image, SealedHeader, aligned_empty, front_bytes, parse_header
from cache.tiers.files import Files
from cache.tiers.folder import LOCK_WAIT_S, Folder, extent_files, translated_errors
from cache.tiers.index_db import IndexDamaged, IndexDb

MAX_QUARANTINED = 4
"""They are outside the disk budget."""
MAX_SYNCED_AT_CLOSE = 256
"""Folders with deletions that closing waits for; with more, the next start compares rows and files."""
_REPORT_EVERY = 1000
"""Extents between two lines of progress."""


class FileTier:
    """Extents as files in one folder, which this object owns until `close`."""

    def __init__(
        self,
        directory: Path,
        *,
        fsync: bool = True,
        report: Callable[[str], None] = lambda message: None,
        lock_wait_s: float = LOCK_WAIT_S,
        files: Files | None = None,
    ) -> None:
        """Raises FolderError if the folder can't be used, FolderInUse if another process owns it.

        Without `fsync` a commit survives the process's death and not a power cut; what such a cut tears is
        noticed by its checksum.
        """
        self.directory = directory
        self._fsync = fsync
        self._report = report
        self._lock_wait_s = lock_wait_s
        self._files = files or Files()
        self._guard = threading.Lock()
        self._written: dict[str, Path] = {}
        self._rooted: set[str] = set()
        """Folders of files, as `abcd`, whose own names are on the disk for certain."""
        self._thinned: set[Path] = set()
        """Folders from which names have gone that a power cut could bring back."""
        self._open()

    def __repr__(self) -> str:
        return f"<FileTier {self.directory}>"

    # -- opening ------------------------------------------------------------------------------------

    def _open(self) -> None:
        self._folder = Folder(self.directory, self._files, self._report, self._lock_wait_s)
        try:
            with translated_errors(self.directory), paused_collector():
                self._db, self._recovered = self._open_index()
        except FolderError:
            self._folder.close()
            raise

    def _open_index(self) -> tuple[IndexDb, list[ExtentHeader]]:
        """The index, and what is durable by it."""
        try:
            return self._read_index()
        except IndexDamaged as damage:
            self._report(f"the index of {self.directory} is damaged ({damage}): rebuilding it from the extents")
        IndexDb.remove(self._folder.index)
        try:
            return self._read_index()
        except IndexDamaged as damage:
            raise FolderError(f"the index {self._folder.index} can't be made: {damage}") from damage

    def _read_index(self) -> tuple[IndexDb, list[ExtentHeader]]:
        db = IndexDb(self._folder.index)
        try:
            if not db.was_closed:
                self._reconcile(db)
            return db, db.complete_headers()
        except (IndexDamaged, OSError):
            db.close()
            raise

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
        unknown.sort(key=lambda path: path.stat().st_mtime)
        for start in range(0, len(unknown), _REPORT_EVERY):
            if start:
                self._report(f"checked {start} of {len(unknown)} extents")
            self._enter_unknown(db, unknown[start : start + _REPORT_EVERY])
        db.remove_rows(states.keys() - {path.stem for path in files})

    def _enter_unknown(self, db: IndexDb, paths: list[Path]) -> None:
        whole: list[ExtentHeader] = []
        for path in paths:
            header = whole_header(path)
            if header is None:
                self._set_aside(path)
                db.remove_row(path.stem)
            else:
                whole.append(header)
        db.add_complete(whole)

    def recover(self) -> list[ExtentHeader]:
        recovered, self._recovered = self._recovered, []
        return recovered

    def is_intact(self) -> bool:
        return self._folder.is_intact()

    def reopen(self) -> None:
        with self._guard:
            self._db.close()
            self._folder.close()
            self._written.clear()
            self._rooted.clear()
            self._thinned.clear()
            self._open()

    # -- images -------------------------------------------------------------------------------------

    def path(self, extent_id: str) -> str:
        return self._folder.extent(extent_id)

    def write(self, header: ExtentHeader, image: Image) -> None:
        with self._guard:
            self._db.prepare(header)
        temporary = self._folder.temporary(header.extent_id)
        self._written[header.extent_id] = temporary
        self._files.unlink(temporary)
        self._files.write(temporary, image.data)

    def commit(self) -> list[str]:
        """The files' content first, then their names, then the rows: each step vouches for the one before."""
        folders: dict[Path, None] = {}
        for extent_id, temporary in self._written.items():
            folders.update(dict.fromkeys(self._make_parents(extent_id)))
            if self._fsync:
                self._files.sync(temporary)
        for extent_id, temporary in self._written.items():
            self._files.rename(temporary, Path(self.path(extent_id)))
        if self._fsync:
            for folder in folders:
                self._files.sync(folder)
            self._rooted.update(extent_id[:4] for extent_id in self._written)
        committed = list(self._written)
        with self._guard:
            self._thinned.difference_update(folders)
            self._db.complete(committed)
        self._written.clear()
        return committed

    def _make_parents(self, extent_id: str) -> list[Path]:
        """The folders whose list of names changes when the extent's file comes into being.

        A folder that is there already may be in memory only: its maker may have failed or died before the sync.
        """
        parent = Path(self.path(extent_id)).parent
        changed = [parent]
        for folder in (parent.parent, parent):
            if self._files.make_folder(folder) or extent_id[:4] not in self._rooted:
                changed.append(folder.parent)
        return changed

    def abandon(self) -> None:
        written, self._written = self._written, {}
        for extent_id, temporary in written.items():
            # What can't be taken away now is swept or checked at the next start.
            with suppress(OSError):
                self._files.unlink(temporary)
            with suppress(OSError):
                self.delete(extent_id)

    def read(self, extent_id: str) -> Image:
        return read_image(Path(self.path(extent_id)))

    def delete(self, extent_id: str) -> None:
        path = Path(self.path(extent_id))
        self._files.unlink(path)
        self._note_gone(path)
        self._remove_row(extent_id)

    def quarantine(self, extent_id: str) -> None:
        self._set_aside(Path(self.path(extent_id)))
        self._remove_row(extent_id)

    def _remove_row(self, extent_id: str) -> None:
        if extent_id not in self._written:  # else it is the row of a new copy, about to be committed
            with self._guard:
                self._db.remove_row(extent_id)

    def _note_gone(self, path: Path) -> None:
        if self._fsync:
            with self._guard:
                self._thinned.add(path.parent)

    def _set_aside(self, path: Path) -> None:
        aside = self.directory / "quarantine"
        if path.exists():
            self._files.rename(path, aside / path.name)
            self._note_gone(path)
            os.utime(aside / path.name)  # the age of the finding counts, not the file's
        for old in sorted(aside.iterdir(), key=lambda p: p.stat().st_mtime)[:-MAX_QUARANTINED]:
            self._files.unlink(old)

    def probe(self) -> None:
        temporary = self._folder.temporary("probe")
        self._files.unlink(temporary)
        self._files.write(temporary, bytes(ALIGNMENT))
        self._files.sync(temporary)
        self._files.unlink(temporary)

    def holds(self, extent_id: str) -> bool:
        return Path(self.path(extent_id)).exists()

    def forget_deleted(self) -> None:
        for path in (self.directory / "quarantine").iterdir():
            self._files.unlink(path)
            self._note_gone(path)
        self._sync_deletions()
        with self._guard:
            self._db.forget_deleted()

    def _sync_deletions(self) -> None:
        """Deleted names stay deleted whatever happens; a commit need not wait for that."""
        with self._guard:
            thinned, self._thinned = self._thinned, set()
        try:
            for folder in list(thinned):
                with suppress(FileNotFoundError):  # gone as a whole
                    self._files.sync(folder)
                thinned.discard(folder)
        finally:
            with self._guard:
                self._thinned |= thinned

    def save_order(self, extent_ids: list[str]) -> None:
        with self._guard:
            self._db.save_order(extent_ids)

    def free_bytes(self) -> int:
        return shutil.disk_usage(self.directory).free

    def close(self) -> None:
        if len(self._thinned) <= MAX_SYNCED_AT_CLOSE:
            with suppress(OSError):
                self._sync_deletions()
        with self._guard:
            self._db.close(vouches=not self._thinned)
        self._folder.close()


def read_image(path: Path) -> Image:
    """An extent's whole file, unverified. Raises OSError."""
    with path.open("rb", buffering=0) as file:
        image = aligned_empty(os.fstat(file.fileno()).st_size)
        read_all(file.fileno(), image, 0)
        return image


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


def whole_header(path: Path) -> ExtentHeader | None:
    """The header of a file that is by its size and its header the extent that its name says; None if it is not."""
    try:
        with path.open("rb") as file:
            header = read_sealed_header(file.fileno()).header
            size = os.fstat(file.fileno()).st_size
    except (OSError, ExtentCorrupt):
        return None
    return header if header.extent_id == path.stem and header.image_bytes == size else None
