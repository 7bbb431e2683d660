"""A disk behind a memory that forgets: what a folder may look like after a power cut, at every step of its use.

    files:  write, rename, unlink, make folder --> memory --sync--> disk

Until a file is synced its content is in memory only; until a folder is synced, so is every change of a name in
it. `Memory.cut` makes a copy of the folder lose what is in memory: all of it, all but the names, or a random part.
"""

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from cache.tiers.files import Files, write_all

_PAGE = 4096


class Loss(Enum):
    """What a power cut takes of that which was not synced."""

    NOTHING = "nothing"
    """No power cut at all: the process alone has died."""
    CONTENT = "content"
    """Files' content, while names are kept."""
    ALL = "all"
    SOME = "some"
    """Each by chance."""


@dataclass(frozen=True)
class _Change:
    """A name that has come into a folder, or gone from it; `before` is what it stood for until then."""

    path: Path
    is_new: bool
    before: Path | None = None


class Memory(Files):
    """Calls `on_step` before each change of the folder, and in the middle of each write."""

    def __init__(self, folder: Path, shadow: Path, on_step: Callable[[str], None] = lambda verb: None) -> None:
        """`shadow`: a folder on the same file system for what names stood for."""
        self.on_step = on_step
        self.fail_at: str | None = None
        """The next step of this name is an I/O error."""
        self._folder, self._shadow = folder, shadow
        self._unsynced: set[Path] = set()
        self._changes: list[_Change] = []
        self._num_kept = 0
        shadow.mkdir(exist_ok=True)

    # -- the process' side --------------------------------------------------------------------------

    def write(self, path: Path, content: bytes | memoryview) -> None:
        self._step("write")
        half = len(content) // 2
        super().write(path, content[:half])
        self._unsynced.add(path)
        self._changes.append(_Change(path, is_new=True))
        self._step("rest of a write")
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        try:
            write_all(fd, content[half:])
        finally:
            os.close(fd)

    def sync(self, path: Path) -> None:
        self._step("sync folder" if path.is_dir() else "sync")
        path.stat()  # what is gone can't be synced
        self._unsynced.discard(path)
        self._changes = [each for each in self._changes if each.path.parent != path]

    def rename(self, source: Path, target: Path) -> None:
        self._step("rename")
        new, gone = _Change(target, True, self._keep(target)), _Change(source, False, self._keep(source))
        super().rename(source, target)
        self._changes += [new, gone]
        self._unsynced.discard(target)
        if source in self._unsynced:
            self._unsynced.remove(source)
            self._unsynced.add(target)

    def unlink(self, path: Path) -> None:
        self._step("unlink")
        if path.exists():
            self._changes.append(_Change(path, False, self._keep(path)))
        super().unlink(path)
        self._unsynced.discard(path)

    def make_folder(self, path: Path) -> bool:
        self._step("make folder")
        is_new = super().make_folder(path)
        if is_new:
            self._changes.append(_Change(path, is_new=True))
        return is_new

    def _step(self, verb: str) -> None:
        self.on_step(verb)
        if self.fail_at == verb:
            self.fail_at = None
            raise OSError(5, "Input/output error")

    def _keep(self, path: Path) -> Path | None:
        if not path.is_file():
            return None
        self._num_kept += 1
        kept = self._shadow / str(self._num_kept)
        os.link(path, kept)
        return kept

    # -- the cut ------------------------------------------------------------------------------------

    def cut(self, copy: Path, loss: Loss, rng: random.Random) -> None:
        """Let `copy`, made of the folder just now, lose what a power cut takes."""
        if loss is Loss.NOTHING:
            return
        for path in sorted(self._unsynced):
            if loss is not Loss.SOME or rng.random() < 0.7:
                _tear(self._in(copy, path), rng)
        for change in reversed(self._changes):
            if loss is Loss.ALL or (loss is Loss.SOME and rng.random() < 0.5):
                self._undo(copy, change)

    def _in(self, copy: Path, path: Path) -> Path:
        return copy / path.relative_to(self._folder)

    def _undo(self, copy: Path, change: _Change) -> None:
        path = self._in(copy, change.path)
        if change.is_new:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        if change.before is not None and path.parent.is_dir():
            path.unlink(missing_ok=True)
            shutil.copyfile(change.before, path)


def _tear(path: Path, rng: random.Random) -> None:
    """The size may have come to the disk without the content, or only a part of it."""
    if not path.exists():
        return
    content = path.read_bytes()
    at = rng.randrange(len(content) + 1)
    at = rng.choice((at, at // _PAGE * _PAGE))
    path.unlink()  # it may share its content with a kept one
    path.write_bytes(rng.choice((bytes(len(content)), content[:at], content[:at] + bytes(len(content) - at))))
