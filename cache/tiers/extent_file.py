"""An extent's file by itself: read, checked, decrypted. Decides nothing, and changes nothing.

Plain and encrypted ones may lie side by side; a file's first bytes tell which it is.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from cache.encryption import Vault, decrypt_image, open_front
from cache.errors import ExtentCorrupt, ExtentLocked
from cache.extent import (
    ALIGNMENT,
    ExtentHeader,
    Image,
    SealedHeader,
    aligned_empty,
    front_bytes,
    is_locked,
    parse_header,
    verify_image,
)
from cache.locked import LockedExtent, parse_locked


@dataclass(frozen=True, slots=True)
class FoundExtent:
    """A file that is by its size and its header the extent that its name says."""

    stored: ExtentHeader | LockedExtent
    """What the index keeps of it."""
    header: ExtentHeader | None
    """None without its key."""

    @property
    def best_known(self) -> ExtentHeader | LockedExtent:
        return self.header or self.stored


def find_extent(path: Path, vault: Vault | None = None) -> FoundExtent | None:
    """What a file is; None if it can't be read or is nothing whole. Its payload is not looked at."""
    try:
        with path.open("rb") as file:
            front, size = read_front(file.fileno()), os.fstat(file.fileno()).st_size
        if is_locked(front):
            return _find_locked(front, path.stem, size, vault)
        header = parse_header(front).header
    except (OSError, ExtentCorrupt):
        return None
    return FoundExtent(header, header) if (header.extent_id, header.image_bytes) == (path.stem, size) else None


def _find_locked(front: bytes, name: str, size: int, vault: Vault | None) -> FoundExtent:
    locked = parse_locked(front).extent
    _check_size(locked, name, size)
    try:
        return FoundExtent(locked, vault.unlock(locked) if vault is not None else None)
    except ExtentLocked:
        return FoundExtent(locked, None)


def _check_size(locked: LockedExtent, name: str, size: int) -> None:
    if (locked.name, locked.image_bytes) != (name, size):
        raise ExtentCorrupt(f"{size} bytes of extent {locked.name} are not extent {name}")


def read_extent(path: Path, vault: Vault | None = None) -> Image:
    """A file's image in plain, unverified if it was not encrypted.

    Raises OSError, and for an encrypted one ExtentCorrupt, or ExtentLocked without its key.
    """
    stored = read_image(path)
    return _decrypt(path.stem, stored, vault) if is_locked(stored[:ALIGNMENT].tobytes()) else stored


def verify_stored(name: str, stored: Image, vault: Vault | None = None) -> None:
    """Raise ExtentCorrupt unless these are to the bit a whole file of this name.

    ExtentLocked if nothing is wrong with it as far as can be told without its key.
    """
    if is_locked(stored[:ALIGNMENT].tobytes()):
        _decrypt(name, stored, vault)
    else:
        verify_image(name, stored)


def _decrypt(name: str, stored: Image, vault: Vault | None) -> Image:
    front = stored[: front_bytes(stored[:ALIGNMENT].tobytes())].tobytes()
    _check_size(parse_locked(front).extent, name, len(stored))
    return decrypt_image(open_front(front, vault), stored)


def read_image(path: Path) -> Image:
    """A whole file as it is. Raises OSError."""
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


def read_front(fd: int) -> bytes:
    """The start of an open extent file with the whole header, which the first page nearly always holds."""
    front = os.pread(fd, ALIGNMENT, 0)
    num_bytes = front_bytes(front)
    if num_bytes > len(front):
        front = os.pread(fd, min(num_bytes, os.fstat(fd).st_size), 0)
    return front


def read_sealed_header(fd: int, vault: Vault | None = None) -> SealedHeader:
    """The header of an open extent file. Raises ExtentCorrupt, and ExtentLocked without the key of an encrypted one."""
    return open_front(read_front(fd), vault)
