"""Extents on their way from one warehouse's folder to another's: a tar of extent files.

Each member is an extent's image under the name `<extent id>.kv`, and says by itself what it is. A chain's beginning
comes before what hangs on it, so that an import that runs out of room has kept something of use. Images are verified
on both ways. What can't be verified is whether KV is what a model would compute: import only what you trust.

Encrypted extents go out as they are, without their key too, and come in with their key only: they are encrypted anew.
"""

import io
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from cache.encryption import UnlockedHeader, Vault, decrypt_image, open_front
from cache.errors import ArchiveError, ExtentCorrupt, ExtentLocked
from cache.extent import ALIGNMENT, ExtentHeader, Image, SealedHeader, aligned_empty, front_bytes, verify_image
from cache.hashing import BlockHash, block_hash, iter_hashes
from cache.locked import LockedExtent
from cache.tiers.disk import FileTier
from cache.tiers.extent_file import find_extent, read_image, verify_stored
from cache.tiers.folder import extent_files

Progress = Callable[[int, int], None]
"""Told how many bytes are done, of how many."""

SUFFIX = ".kv"
COMMIT_BYTES = 64 << 20
"""Imported extents are made durable together, about this many bytes at once."""


@dataclass(slots=True)
class Exported:
    """What an archive has got."""

    num_extents: int = 0
    num_blocks: int = 0
    num_tokens: int = 0
    num_bytes: int = 0
    num_bad: int = 0
    """Left out: their files are not whole."""
    num_gone: int = 0
    """Left out: evicted meanwhile by the folder's owner."""
    num_unverified: int = 0
    """Encrypted, and taken along without their key: only their headers and sizes were looked at."""
    num_unknown: int = 0
    """Left out: encrypted, and without their key it can't be told whether they are wanted."""


@dataclass(slots=True)
class Imported:
    """What a folder has got from an archive."""

    num_extents: int = 0
    num_blocks: int = 0
    num_tokens: int = 0
    num_bytes: int = 0
    num_present: int = 0
    """Left out: all their blocks were there."""
    num_bad: int = 0
    """Left out: no whole extents of this format."""
    num_locked: int = 0
    """Left out: encrypted, and their key is not here."""
    num_without_room: int = 0
    """Left out: the budget is used up, or the file system full."""


# -- writing ----------------------------------------------------------------------------------------


Wanted = Callable[[ExtentHeader | LockedExtent], bool | None]
"""Whether an extent is to be exported; None if an encrypted one does not tell."""


def export_extents(
    directory: Path, archive: Path, is_wanted: Wanted, progress: Progress, vault: Vault | None = None
) -> Exported:
    """Write the extents that are wanted into a new archive, which appears when it is whole.

    Needs no ownership: files are immutable. Raises ArchiveError.
    """
    exported = Exported()
    wanted = _wanted(directory, is_wanted, exported, vault)
    num_bytes = sum(extent.image_bytes for _, extent in wanted)
    with _translated_errors(archive), _new_file(archive) as file, tarfile.open(fileobj=file, mode="w|") as tar:
        for path, extent in wanted:
            image = _verified_image(path, exported, vault)
            if image is None:
                continue
            member = tarfile.TarInfo(path.name)
            member.size, member.mode = len(image), 0o600
            tar.addfile(member, io.BytesIO(image.data))
            _count(exported, extent)
            progress(exported.num_bytes, num_bytes)
    return exported


def _wanted(
    directory: Path, is_wanted: Wanted, exported: Exported, vault: Vault | None
) -> list[tuple[Path, ExtentHeader | LockedExtent]]:
    wanted: list[tuple[Path, ExtentHeader | LockedExtent]] = []
    for path in extent_files(directory):
        found = find_extent(path, vault)
        if found is None:
            _count_missing(path, exported)
            continue
        answer = is_wanted(found.best_known)
        if answer is None:
            exported.num_unknown += 1
        elif answer:
            wanted.append((path, found.best_known))
    wanted.sort(key=_place)
    return wanted


def _place(wanted: tuple[Path, ExtentHeader | LockedExtent]) -> tuple[int, str]:
    """Beginnings first; where an encrypted one belongs, only its key tells."""
    path, extent = wanted
    return (extent.first_block if isinstance(extent, ExtentHeader) else 0), path.name


def _verified_image(path: Path, exported: Exported, vault: Vault | None) -> Image | None:
    """The file as it is."""
    try:
        image = read_image(path)
        verify_stored(path.stem, image, vault)
    except ExtentLocked:
        exported.num_unverified += 1
    except (OSError, ExtentCorrupt):
        _count_missing(path, exported)
        return None
    return image


def _count_missing(path: Path, exported: Exported) -> None:
    if path.exists():
        exported.num_bad += 1
    else:
        exported.num_gone += 1


def _count(totals: Exported | Imported, extent: ExtentHeader | LockedExtent) -> None:
    totals.num_extents += 1
    totals.num_blocks += extent.num_blocks
    totals.num_tokens += extent.num_tokens
    totals.num_bytes += extent.image_bytes


@contextmanager
def _new_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that only its owner may read, and that gets its name when it is whole and durable."""
    if path.exists():
        raise ArchiveError(f"{path} exists already: choose another name")
    part = path.with_name(f"{path.name}.part")
    part.unlink(missing_ok=True)
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


# -- reading ----------------------------------------------------------------------------------------


def import_extents(
    archive: Path,
    disk: FileTier,
    held: Iterable[ExtentHeader],
    budget_bytes: int,
    min_free_bytes: int,
    progress: Progress,
    vault: Vault | None = None,
) -> Imported:
    """Add the extents that are missing, of whatever fingerprint and tenant, while there is room.

    `held` is what the folder has; `vault` opens what is encrypted in the archive. Raises ArchiveError; what was
    imported before stays.
    """
    reader = _Reader(disk, held, budget_bytes, min_free_bytes, vault)
    with _translated_errors(archive), archive.open("rb") as file:
        num_bytes = os.fstat(file.fileno()).st_size
        try:
            with tarfile.open(fileobj=file, mode="r|") as tar:
                for member in tar:
                    reader.take(tar, member)
                    progress(file.tell(), num_bytes)
            if not _has_end(file):
                raise tarfile.ReadError("it is cut short")
        except tarfile.TarError:
            reader.commit()
            raise
        reader.commit()
    return reader.imported


class _Reader:
    """Takes one member after the other."""

    def __init__(
        self,
        disk: FileTier,
        held: Iterable[ExtentHeader],
        budget_bytes: int,
        min_free_bytes: int,
        vault: Vault | None,
    ) -> None:
        self.imported = Imported()
        self._disk = disk
        self._vault = vault
        self._min_free_bytes = min_free_bytes
        self._known: set[BlockHash] = set()
        self._left_bytes = budget_bytes
        self._uncommitted_bytes = 0
        for header in held:
            self._enter(header)

    def _enter(self, header: ExtentHeader) -> None:
        self._known.update(iter_hashes(header.packed_hashes))
        self._left_bytes -= header.image_bytes

    def take(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        file = tar.extractfile(member) if member.isfile() and member.name.endswith(SUFFIX) else None
        if file is None:
            self.imported.num_bad += 1
            return
        try:
            sealed, front = _read_front(file, member.size, self._vault)
            header = sealed.header
            if self._known.issuperset(iter_hashes(header.packed_hashes)):
                self.imported.num_present += 1
                return
            if not self._has_room(header):
                self.imported.num_without_room += 1
                return
            image = _read_rest(file, sealed, front)
        except ExtentLocked:
            self.imported.num_locked += 1
            return
        except ExtentCorrupt:
            self.imported.num_bad += 1
            return
        self._write(header, image)

    def _has_room(self, header: ExtentHeader) -> bool:
        """Once there is none, there is none for all that follows: it may hang on what was left out."""
        is_room = not self.imported.num_without_room and header.image_bytes <= self._left_bytes
        return is_room and self._disk.free_bytes() >= self._min_free_bytes + header.image_bytes

    def _write(self, header: ExtentHeader, image: Image) -> None:
        try:
            self._disk.write(header, image)
        except OSError:
            self._disk.abandon()
            raise
        self._enter(header)
        _count(self.imported, header)
        self._uncommitted_bytes += header.image_bytes
        if self._uncommitted_bytes >= COMMIT_BYTES:
            self.commit()

    def commit(self) -> None:
        self._uncommitted_bytes = 0
        try:
            self._disk.commit()
        except OSError:
            self._disk.abandon()
            raise


def _has_end(file: IO[bytes]) -> bool:
    """Two empty blocks end a tar; `tarfile` does not miss them."""
    file.seek(-2 * tarfile.BLOCKSIZE, os.SEEK_END)
    return not any(file.read())


def _read_front(file: IO[bytes], num_bytes: int, vault: Vault | None) -> tuple[SealedHeader, bytes]:
    """The header of a member of `num_bytes`, and what had to be read of it. Raises ExtentCorrupt, ExtentLocked."""
    front = file.read(ALIGNMENT)
    front += file.read(max(0, min(front_bytes(front), num_bytes) - len(front)))
    sealed = open_front(front, vault)
    header = sealed.header
    if header.image_bytes != num_bytes:
        raise ExtentCorrupt(f"{num_bytes} bytes are not extent {header.extent_id}")
    _check_chain(header)
    return sealed, front


def _check_chain(header: ExtentHeader) -> None:
    """Raise ExtentCorrupt unless the hashes are those of the tokens."""
    parent = header.parent_hash
    for index, stored in enumerate(header.block_hashes):
        parent = block_hash(parent, header.block_token_ids(index))
        if parent != stored:
            raise ExtentCorrupt(f"extent {header.extent_id}: block {index} holds other tokens than its hash says")


def _read_rest(file: IO[bytes], sealed: SealedHeader, front: bytes) -> Image:
    """The whole image, in plain."""
    header = sealed.header
    image = aligned_empty(header.image_bytes)
    view = image.data
    view[: len(front)] = front
    at = len(front)
    while piece := file.read(min(1 << 20, len(view) - at)):
        view[at : at + len(piece)] = piece
        at += len(piece)
    if isinstance(sealed, UnlockedHeader):
        return decrypt_image(sealed, image)
    verify_image(header.extent_id, image)
    return image


@contextmanager
def _translated_errors(archive: Path) -> Iterator[None]:
    try:
        yield
    except tarfile.TarError as error:
        raise ArchiveError(f"{archive} is no whole tar archive: {error}") from error
    except OSError as error:
        raise ArchiveError(f"{archive}: {error}") from error
