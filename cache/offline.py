"""What can be done to a warehouse's folder that no node store uses. Each function owns the folder while it runs.

Raises FolderInUse at once where a server runs on the folder; only `verify_folder` then goes on, and changes nothing.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from cache.disk_worker import DiskConfig
from cache.encryption import Vault
from cache.errors import ExtentCorrupt, ExtentLocked, FolderError, FolderInUse
from cache.extent import ExtentHeader
from cache.locked import LockedExtent
from cache.messages import PurgeQuery, PurgeReceipt
from cache.node_store import NodeStore, NodeStoreConfig
from cache.occupancy import Budgets
from cache.scrubber import pause_s
from cache.tiers.archive import Progress
from cache.tiers.disk import FileTier
from cache.tiers.extent_file import read_image, verify_stored
from cache.tiers.files import Files
from cache.tiers.folder import Folder, extent_files, is_warehouse
from cache.tiers.index_db import IndexDb
from cache.tiers.memory import MemoryTier

UNLIMITED_BYTES = 1 << 62
PURGE_WAIT_S = 3600.0

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class BadExtent:
    """An extent that is not, or not whole, what its name promises; `extent_id` is the name of its file."""

    extent_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Verified:
    """What a folder's files are worth."""

    num_extents: int
    """That were read, the bad ones included."""
    num_bytes: int
    bad: tuple[BadExtent, ...]
    is_quarantined: bool
    """The bad ones were set aside. If not, a server runs on the folder and will do so when it comes upon them."""
    num_unverified: int = 0
    """Encrypted, and their key is not here: only their headers and sizes were looked at."""


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """What an index was made of."""

    num_extents: int
    num_blocks: int
    num_bad: int
    """Files that were set aside."""


def require_warehouse(directory: Path) -> None:
    """Raise FolderError unless there is one."""
    if not is_warehouse(directory):
        raise FolderError(f"there is no warehouse in {directory}. Name its folder with --warehouse.")


@contextmanager
def owned(directory: Path, report: Report, vault: Vault | None = None) -> Iterator[FileTier]:
    """The folder's files, for this process alone. Raises FolderInUse at once."""
    with closing(FileTier(directory, report=report, lock_wait_s=0.0, vault=vault)) as disk:
        yield disk


# -- verify -----------------------------------------------------------------------------------------


def verify_folder(
    directory: Path, bytes_per_s: float, report: Report, progress: Progress, vault: Vault | None = None
) -> Verified:
    """Read and check every extent, at most at `bytes_per_s`. Bad ones are quarantined if no server owns the folder."""
    require_warehouse(directory)
    try:
        with owned(directory, report, vault) as disk:
            known = {disk.name_of(header.extent_id) for header in disk.recover()}
            known |= {locked.name for locked in disk.recover_locked()}
            verified = _verify_files(directory, bytes_per_s, progress, vault)
            lost = known - {path.stem for path in extent_files(directory)}
            missing = tuple(BadExtent(extent_id, "its file is gone") for extent_id in sorted(lost))
            for bad in (*verified.bad, *missing):
                disk.set_aside(bad.extent_id)
    except FolderInUse:
        return _verify_files(directory, bytes_per_s, progress, vault)
    return replace(verified, bad=verified.bad + missing, is_quarantined=True)


def _verify_files(directory: Path, bytes_per_s: float, progress: Progress, vault: Vault | None) -> Verified:
    files = [(path, size) for path in extent_files(directory) if (size := _size_of(path)) is not None]
    num_total, num_bytes, num_extents, num_unverified = sum(size for _, size in files), 0, 0, 0
    bad: list[BadExtent] = []
    for path, size in files:
        started = time.monotonic()
        try:
            verify_stored(path.stem, read_image(path), vault)
            num_extents += 1
        except ExtentLocked:
            num_extents += 1
            num_unverified += 1
        except FileNotFoundError:
            pass  # evicted meanwhile
        except (OSError, ExtentCorrupt) as error:
            num_extents += 1
            bad.append(BadExtent(path.stem, str(error)))
        num_bytes += size
        progress(num_bytes, num_total)
        time.sleep(pause_s(size, bytes_per_s, time.monotonic() - started))
    return Verified(num_extents, num_bytes, tuple(bad), is_quarantined=False, num_unverified=num_unverified)


def _size_of(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


# -- rebuild ----------------------------------------------------------------------------------------


def rebuild_index(directory: Path, report: Report, vault: Vault | None = None) -> Rebuilt:
    """Make the index anew from the files' headers; those of encrypted ones need no key, but are checked with it."""
    require_warehouse(directory)
    key_id = vault.key_id if vault is not None else None
    with closing(Folder(directory, Files(), report, 0.0, key_id)) as folder:
        IndexDb.remove(folder.index)
        num_files = len(extent_files(directory))
    with owned(directory, report, vault) as disk:
        extents: list[ExtentHeader | LockedExtent] = [*disk.recover(), *disk.recover_locked()]
    return Rebuilt(len(extents), sum(each.num_blocks for each in extents), num_files - len(extents))


# -- purge ------------------------------------------------------------------------------------------


def purge_folder(directory: Path, query: PurgeQuery, report: Report, vault: Vault | None = None) -> PurgeReceipt:
    """As `NodeStore.purge`."""
    require_warehouse(directory)
    config = NodeStoreConfig(Budgets(0, UNLIMITED_BYTES, 0), DiskConfig(min_free_bytes=0))
    disk = FileTier(directory, report=report, lock_wait_s=0.0, vault=vault)
    with NodeStore(config, MemoryTier(), disk) as store:
        return store.purge(query, PURGE_WAIT_S)


def purge_everything(directory: Path, report: Report) -> PurgeReceipt:
    """Delete all extents of all tenants. Needs no key; what is stored afterwards may be encrypted with another one."""
    require_warehouse(directory)
    with owned(directory, report) as disk:
        extents: list[ExtentHeader | LockedExtent] = [*disk.recover(), *disk.recover_locked()]
        files = extent_files(directory)
        disk_bytes = sum(_size_of(path) or 0 for path in files)
        for name in {path.stem for path in files} | {_name_of(each) for each in extents}:
            disk.delete(name)
        disk.forget_deleted()
        disk.forget_key()
    return PurgeReceipt(
        len(extents),
        sum(each.num_blocks for each in extents),
        sum(each.num_tokens for each in extents),
        disk_bytes=disk_bytes,
        num_files=len(files),
        num_left=len(extent_files(directory)),
    )


def _name_of(extent: ExtentHeader | LockedExtent) -> str:
    return extent.extent_id if isinstance(extent, ExtentHeader) else extent.name
