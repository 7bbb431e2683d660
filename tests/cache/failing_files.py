"""A file system that fails when a test tells it to."""

import errno
import os
from pathlib import Path

from cache.tiers.files import Files


class FailingFiles(Files):
    """A disk on which one of the verbs is an I/O error."""

    def __init__(self) -> None:
        self.fails: str | None = None

    def _step(self, verb: str) -> None:
        if verb == self.fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def write(self, path: Path, content: bytes | memoryview) -> None:
        super().write(path, content[: len(content) // 2] if self.fails == "write" else content)
        self._step("write")

    def sync(self, path: Path) -> None:
        self._step("sync")
        super().sync(path)

    def rename(self, source: Path, target: Path) -> None:
        self._step("rename")
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        self._step("unlink")
        super().unlink(path)

    def make_folder(self, path: Path) -> bool:
        self._step("make_folder")
        return super().make_folder(path)
