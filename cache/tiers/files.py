"""The few ways in which the disk tier changes its folder. All changes go through here, and nothing else does.

A seam for tests, which put full disks, I/O errors, kills and power cuts under the tier; it decides nothing.
"""

import errno
import os
import shutil
from pathlib import Path


class Files:
    """The real file system. Every method may raise OSError."""

    def write(self, path: Path, content: bytes | memoryview) -> None:
        """Make a new file with this content; it may still be in memory only. A file that exists is an error."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            write_all(fd, content)
        finally:
            os.close(fd)

    def sync(self, path: Path) -> None:
        """Make a file's content, or a folder's list of names, survive a power cut."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        """Put a file in the place of another or of none, whole or not at all."""
        source.replace(target)

    def unlink(self, path: Path) -> None:
        """Take a file's name away; one that has gone already is no error. A folder in its place goes with all in it."""
        try:
            path.unlink(missing_ok=True)
        except OSError:
            if not path.is_dir():
                raise
            shutil.rmtree(path)

    def make_folder(self, path: Path) -> bool:
        """Make a folder that only its owner may look into. False if it is there already."""
        if path.is_dir():
            return False
        path.mkdir(mode=0o700, exist_ok=True)
        return True


def write_all(fd: int, content: bytes | memoryview) -> None:
    """Write everything; a short write without an error is continued, none at all is ENOSPC."""
    view = memoryview(content).cast("B")
    while len(view):
        written = os.write(fd, view)
        if not written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        view = view[written:]
