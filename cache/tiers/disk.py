"""The disk tier: one file per extent in a folder of its own (`cache.tiers.folder`), an index beside them.

A write is: row `prepared`, temp file; and, for one or several of them together, `commit`: fsync of each file,
rename, fsync of the folders, rows `complete`. Nothing is visible before. A delete unlinks first and updates
the index after: a full disk has no room for rows. After an owner that did not close, rows and files are
compared: the few files without a complete row are checked, rows without a file and temp files are removed.
Nothing is ever pickled.

With a vault, what is written is encrypted and has a name of the vault's; what was written before stays as it is, and
can be read. Without its key an encrypted extent is no more than something that takes room (`recover_locked`).
"""

import os
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from cache.collector import paused_collector
from cache.encryption import Vault
from cache.errors import ExtentCorrupt, ExtentLocked, FolderError
from cache.extent import ALIGNMENT, ExtentHeader, Image, aligned_empty
from cache.locked import LockedExtent
from cache.tiers.extent_file import find_extent, read_extent
from cache.tiers.files import Files
from cache.tiers.folder import LOCK_WAIT_S, Folder, extent_files, translated_errors
from cache.tiers.index_db import IndexDamaged, IndexDb

MAX_QUARANTINED = 4
"""They are outside the disk budget."""
MAX_SYNCED_AT_CLOSE = 256
"""Folders with deletions that closing waits for; with more, the next start compares rows and files."""
INDEX_ROOM_BYTES = 256 << 10
"""With less than this free on the file system, an index that can't be opened is no damaged one."""
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
        vault: Vault | None = None,
    ) -> None:
        """Raises FolderError if the folder can't be used, FolderInUse if another process owns it.

        `vault` encrypts what is written, and decrypts what is read.

        Without `fsync` a commit survives the process's death and not a power cut; what such a cut tears is
        noticed by its checksum.
        """
        self.directory = directory
        self._fsync = fsync
        self._report = report
        self._lock_wait_s = lock_wait_s
        self._files = files or Files()
        self._vault = vault
        self._guard = threading.Lock()
        self._written: dict[str, Path] = {}
        self._encrypted = aligned_empty(0)
        """What is written is encrypted in here."""
        self._rooted: set[str] = set()
        """Folders of files, as `abcd`, whose own names are on the disk for certain."""
        self._thinned: set[Path] = set()
        """Folders from which names have gone that a power cut could bring back."""
        self._open()

    def __repr__(self) -> str:
        return f"<FileTier {self.directory}>"

    # -- opening ------------------------------------------------------------------------------------

    def _open(self) -> None:
        key_id = self._vault.key_id if self._vault is not None else None
        self._folder = Folder(self.directory, self._files, self._report, self._lock_wait_s, key_id)
        self._named_as_is: set[str] = set()
        """With a vault: the extents whose file has not the vault's name for them."""
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
            if self.free_bytes() < INDEX_ROOM_BYTES:
                raise FolderError(
                    f"warehouse folder {self.directory} can't be opened: its file system is full ({damage}). "
                    "Make room there or choose another folder with --warehouse."
                ) from damage
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
            if self._vault is not None:
                self._note_plain(db, self._vault)
            self._locked = self._read_locked(db)
            return db, db.complete_headers(self._vault)
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
        whole: list[ExtentHeader | LockedExtent] = []
        for path in paths:
            found = find_extent(path, self._vault)
            if found is None:
                self._set_aside(path)
                db.remove_row(path.stem)
            else:
                whole.append(found.stored)
        db.add_complete(whole)

    def _note_plain(self, db: IndexDb, vault: Vault) -> None:
        """Note what was written without a key. Where an encrypted copy was committed too, that one is the newer."""
        plain = db.plain_ids()
        states = db.states() if plain else {}
        for extent_id in [each for each in plain if states.get(vault.name_of(each))]:
            self._files.unlink(Path(self._folder.extent(extent_id)))
            db.remove_row(extent_id)
            plain.remove(extent_id)
        self._named_as_is |= plain

    def _read_locked(self, db: IndexDb) -> list[LockedExtent]:
        locked = db.locked_extents(self._vault)
        if locked:
            self._report(
                f"{len(locked)} extents in {self.directory} are encrypted, and their key is not given: "
                "they are left alone until their room is needed"
            )
        if self._vault is not None:
            self._named_as_is.update(each.name for each in locked)
        return locked

    def recover(self) -> list[ExtentHeader]:
        recovered, self._recovered = self._recovered, []
        return recovered

    def recover_locked(self) -> list[LockedExtent]:
        locked, self._locked = self._locked, []
        return locked

    def forget_key(self) -> None:
        """Nothing encrypted is left: the next owner may come with another key."""
        self._folder.forget_key()

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

    def name_of(self, extent_id: str) -> str:
        """What the extent's file is called, without its ending."""
        if self._vault is None or extent_id in self._named_as_is:
            return extent_id
        return self._vault.name_of(extent_id)

    def _new_name(self, extent_id: str) -> str:
        """What the file is called if it is written now."""
        return extent_id if self._vault is None else self._vault.name_of(extent_id)

    def path(self, extent_id: str) -> str:
        return self._folder.extent(extent_id if self._vault is None else self.name_of(extent_id))

    def write(self, header: ExtentHeader, image: Image) -> None:
        row: ExtentHeader | LockedExtent = header
        if self._vault is not None:
            row, image = self._encrypt(self._vault, header, image)
        with self._guard:
            self._db.prepare(row)
        temporary = self._folder.temporary(self._new_name(header.extent_id))
        self._written[header.extent_id] = temporary
        self._files.unlink(temporary)
        self._files.write(temporary, image.data)

    def _encrypt(self, vault: Vault, header: ExtentHeader, image: Image) -> tuple[LockedExtent, Image]:
        """What is to be written instead, good until the next write."""
        if len(self._encrypted) < len(image):
            self._encrypted = aligned_empty(len(image))
        target = self._encrypted[: len(image)]
        return vault.encrypt(header, image, target), target

    def commit(self) -> list[str]:
        """The files' content first, then their names, then the rows: each step vouches for the one before."""
        folders: dict[Path, None] = {}
        names = {extent_id: self._new_name(extent_id) for extent_id in self._written}
        for extent_id, temporary in self._written.items():
            folders.update(dict.fromkeys(self._make_parents(extent_id)))
            if self._fsync:
                self._files.sync(temporary)
        for extent_id, temporary in self._written.items():
            self._files.rename(temporary, Path(self._folder.extent(names[extent_id])))
        if self._fsync:
            for folder in folders:
                self._files.sync(folder)
            self._rooted.update(name[:4] for name in names.values())
        committed = list(self._written)
        with self._guard:
            self._thinned.difference_update(folders)
            self._db.complete(names.values())
        self._written.clear()
        for extent_id in self._named_as_is.intersection(committed):
            with suppress(OSError):  # the next start will see to it
                self.delete(extent_id)  # the plain copy of what has been encrypted now
        return committed

    def _make_parents(self, extent_id: str) -> list[Path]:
        """The folders whose list of names changes when the extent's file comes into being.

        A folder that is there already may be in memory only: its maker may have failed or died before the sync.
        """
        name = self._new_name(extent_id)
        parent = Path(self._folder.extent(name)).parent
        changed = [parent]
        for folder in (parent.parent, parent):
            if self._files.make_folder(folder) or name[:4] not in self._rooted:
                changed.append(folder.parent)
        return changed

    def abandon(self) -> None:
        written, self._written = self._written, {}
        for extent_id, temporary in written.items():
            # What can't be taken away now is swept or checked at the next start.
            with suppress(OSError):
                self._files.unlink(temporary)
            with suppress(OSError):
                self._delete(self._new_name(extent_id))

    def read(self, extent_id: str) -> Image:
        try:
            return read_extent(Path(self.path(extent_id)), self._vault)
        except ExtentLocked as error:  # not what was there when the folder was opened
            raise ExtentCorrupt(str(error)) from error

    def delete(self, extent_id: str) -> None:
        self._delete(self.name_of(extent_id))

    def _delete(self, name: str) -> None:
        path = Path(self._folder.extent(name))
        self._files.unlink(path)
        self._note_gone(path)
        self._remove_row(name)
        self._named_as_is.discard(name)

    def quarantine(self, extent_id: str) -> None:
        self.set_aside(self.name_of(extent_id))

    def set_aside(self, name: str) -> None:
        """Quarantine a file by its name."""
        self._set_aside(Path(self._folder.extent(name)))
        self._remove_row(name)
        self._named_as_is.discard(name)

    def _remove_row(self, name: str) -> None:
        if name not in map(self._new_name, self._written):  # else it is the row of a new copy, about to be committed
            with self._guard:
                self._db.remove_row(name)

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
            self._db.save_order([self.name_of(each) for each in extent_ids])

    def free_bytes(self) -> int:
        return shutil.disk_usage(self.directory).free

    def close(self) -> None:
        if len(self._thinned) <= MAX_SYNCED_AT_CLOSE:
            with suppress(OSError):
                self._sync_deletions()
        with self._guard:
            self._db.close(vouches=not self._thinned)
        self._folder.close()
