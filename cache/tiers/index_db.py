"""The disk tier's index: one SQLite row per extent, `prepared` and then `complete`.

SQLite in WAL mode with synchronous=NORMAL: a commit costs about 0.1 ms, and after a power cut the last
rows may be missing but the database is whole. `was_closed` tells whether rows and files can differ: it is
true only if the last owner closed the index with no write under way.

Rows come back in the order in which they were written; the order of use is one blob of row ids, saved when
the index is closed.

An encrypted extent's row is what its file shows without the key (`cache.locked`), under the name of the file; what is
private in its header stays encrypted in `private`, and the columns for it are empty.
"""

import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cache.encryption import Vault
from cache.errors import ExtentCorrupt
from cache.extent import NOBODY, ExtentHeader, KVShape, Origin, is_consistent
from cache.hashing import BlockHash
from cache.locked import LockedExtent

_SCHEMA_VERSION = 3
_SCHEMA = """
CREATE TABLE IF NOT EXISTS extents (
    number INTEGER PRIMARY KEY,
    extent_id TEXT NOT NULL UNIQUE,
    is_complete INTEGER NOT NULL,
    image_bytes INTEGER NOT NULL,
    num_blocks INTEGER NOT NULL,
    num_tokens INTEGER NOT NULL,
    root_hash BLOB NOT NULL,
    parent_hash BLOB NOT NULL,
    block_hashes BLOB NOT NULL,
    token_ids BLOB NOT NULL,
    block_size INTEGER NOT NULL,
    shape TEXT NOT NULL,
    first_block INTEGER NOT NULL,
    tenant TEXT NOT NULL,
    session TEXT NOT NULL,
    key_id TEXT,
    private BLOB
);
CREATE TABLE IF NOT EXISTS use_order (numbers BLOB NOT NULL);
"""
_HEADER_COLUMNS = "root_hash, parent_hash, block_hashes, token_ids, block_size, shape, first_block, tenant, session"
_LOCKED_COLUMNS = "extent_id, key_id, root_hash, tenant, num_blocks, num_tokens, image_bytes"


_OPEN, _CLOSED = 2 * _SCHEMA_VERSION, 2 * _SCHEMA_VERSION + 1  # values of SQLite's user_version


class IndexDamaged(Exception):
    """The database can't be read; the files' headers can replace it."""


@dataclass(frozen=True, slots=True)
class IndexTotals:
    """What the durable extents of a folder add up to."""

    num_extents: int
    num_blocks: int
    num_tokens: int
    num_fingerprints: int
    disk_bytes: int


def read_totals(path: Path) -> IndexTotals:
    """Totals of an index, read beside a running owner. Raises IndexDamaged."""
    try:
        # As a URI, which escapes what would end the path.
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
            row = db.execute(
                "SELECT COUNT(*), TOTAL(num_blocks), TOTAL(num_tokens), COUNT(DISTINCT root_hash), TOTAL(image_bytes) "
                "FROM extents WHERE is_complete = 1"
            ).fetchone()
    except sqlite3.Error as error:
        raise IndexDamaged(str(error)) from error
    return IndexTotals(*(int(each) for each in row))


@dataclass(frozen=True, slots=True)
class FingerprintTotals:
    """What the durable extents of one fingerprint add up to."""

    fingerprint: str
    """Root of its hash chains, in hex."""
    num_extents: int
    num_blocks: int
    disk_bytes: int


def read_fingerprints(path: Path) -> list[FingerprintTotals]:
    """Totals by fingerprint, the largest first, read beside a running owner. Raises IndexDamaged."""
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
            rows = db.execute(
                "SELECT HEX(root_hash), COUNT(*), TOTAL(num_blocks), TOTAL(image_bytes) "
                "FROM extents WHERE is_complete = 1 GROUP BY root_hash ORDER BY 4 DESC, 1"
            ).fetchall()
    except sqlite3.Error as error:
        raise IndexDamaged(str(error)) from error
    return [FingerprintTotals(root.lower(), *(int(each) for each in totals)) for root, *totals in rows]


class IndexDb:
    """See the module's docstring. Not thread-safe: the disk tier holds a lock around it."""

    def __init__(self, path: Path) -> None:
        """Open or make it. Raises IndexDamaged for what is no index of this version."""
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))  # SQLite keeps the mode
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            self.was_closed = self._open()
        except (sqlite3.Error, IndexDamaged, UnicodeDecodeError) as error:  # SQLite quotes what it can't read
            self._db.close()
            raise IndexDamaged(str(error)) from error

    def _open(self) -> bool:
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA secure_delete=ON")
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        tables = self._db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]
        if tables and version not in (_OPEN, _CLOSED):
            raise IndexDamaged(f"its version is {version // 2}, this program's is {_SCHEMA_VERSION}")
        self._db.executescript(_SCHEMA)
        # This one must reach the disk before any file changes: else a power cut could leave "closed" beside them.
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute(f"PRAGMA user_version = {_OPEN}")
        self._db.execute("PRAGMA synchronous=NORMAL")
        return bool(version == _CLOSED)

    @staticmethod
    def remove(path: Path) -> None:
        """Delete a database and what SQLite keeps beside it."""
        for suffix in ("", "-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)

    # -- writing ------------------------------------------------------------------------------------

    def prepare(self, extent: ExtentHeader | LockedExtent) -> None:
        """Announce a write."""
        self._execute_many(_INSERT, [(0, *_row(extent))])

    def complete(self, extent_ids: Iterable[str]) -> None:
        """Their files are durable. One transaction."""
        self._execute_many("UPDATE extents SET is_complete = 1 WHERE extent_id = ?", [(each,) for each in extent_ids])

    def add_complete(self, extents: Iterable[ExtentHeader | LockedExtent]) -> None:
        """Enter extents whose files are durable. One transaction."""
        self._execute_many(_INSERT, ((1, *_row(extent)) for extent in extents))

    def remove_row(self, extent_id: str) -> None:
        """Forget an extent."""
        self.remove_rows([extent_id])

    def remove_rows(self, extent_ids: Iterable[str]) -> None:
        """Forget extents. One transaction."""
        self._execute_many("DELETE FROM extents WHERE extent_id = ?", [(each,) for each in extent_ids])

    def forget_deleted(self) -> None:
        """Leave nothing of deleted rows in the log; in the database they are overwritten at once."""
        try:
            is_held_up = bool(self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0])
        except sqlite3.Error as error:
            raise OSError(f"the warehouse's index can't be written: {error}") from error
        if is_held_up:
            raise OSError("the log of the warehouse's index can't be emptied: another process reads it")

    def save_order(self, extent_ids: list[str]) -> None:
        """Keep the order of use: the extents, least recently used first."""
        try:
            numbers = dict(self._db.execute("SELECT extent_id, number FROM extents"))
            order = np.array([numbers[each] for each in extent_ids if each in numbers], "<i8")
            with self._db:
                self._db.execute("BEGIN")
                self._db.execute("DELETE FROM use_order")
                self._db.execute("INSERT INTO use_order VALUES (?)", (order.tobytes(),))
        except (sqlite3.Error, TypeError, ValueError, OverflowError) as error:
            raise OSError(f"the warehouse's index can't be written: {error}") from error

    # -- reading ------------------------------------------------------------------------------------

    def states(self) -> dict[str, bool]:
        """All extents, and whether each is complete. Raises IndexDamaged."""
        try:
            return {row[0]: bool(row[1]) for row in self._db.execute("SELECT extent_id, is_complete FROM extents")}
        except sqlite3.Error as error:
            raise IndexDamaged(str(error)) from error

    def plain_ids(self) -> set[str]:
        """Durable extents that are not encrypted. Raises IndexDamaged."""
        query = "SELECT extent_id FROM extents WHERE is_complete = 1 AND key_id IS NULL"
        try:
            return {row[0] for row in self._db.execute(query)}
        except sqlite3.Error as error:
            raise IndexDamaged(str(error)) from error

    def locked_extents(self, vault: Vault | None = None) -> list[LockedExtent]:
        """Durable extents that `vault` can't open, as they were written, without `private`. Raises IndexDamaged."""
        query = (
            f"SELECT {_LOCKED_COLUMNS} FROM extents "
            "WHERE is_complete = 1 AND key_id IS NOT NULL AND key_id IS NOT ? ORDER BY number"
        )
        try:
            rows = self._db.execute(query, (vault.key_id if vault is not None else None,))
            return [LockedExtent.checked(row) for row in rows]
        except (sqlite3.Error, ValueError) as error:
            raise IndexDamaged(str(error)) from error

    def complete_headers(self, vault: Vault | None = None) -> list[ExtentHeader]:
        """Durable extents but for `locked_extents`, least recently used first. Raises IndexDamaged."""
        query = (
            f"SELECT number, extent_id, {_HEADER_COLUMNS} FROM extents "
            "WHERE is_complete = 1 AND key_id IS NULL ORDER BY number"
        )
        numbers: list[int] = []
        headers: list[ExtentHeader] = []
        # What many rows share is kept as one object each.
        roots: dict[bytes, BlockHash] = {}
        shapes: dict[str, KVShape] = {}
        origins: dict[tuple[str, str], Origin] = {("", ""): NOBODY}
        try:
            for number, extent_id, root, parent, hashes, tokens, block_size, shape, first, *origin in self._db.execute(
                query
            ):
                tenant_and_session = (origin[0], origin[1])
                header = ExtentHeader(
                    roots.setdefault(root, root),
                    parent,
                    hashes,
                    tokens,
                    block_size,
                    shapes.get(shape) or shapes.setdefault(shape, _parse_shape(shape)),
                    first,
                    origins.get(tenant_and_session) or origins.setdefault(tenant_and_session, Origin(*origin)),
                )
                if header.extent_id != extent_id or not is_consistent(header):
                    raise IndexDamaged(f"the row of extent {extent_id} does not add up")
                numbers.append(number)
                headers.append(header)
            for number, header in self._unlocked(vault) if vault is not None else ():
                header.root_hash = roots.setdefault(header.root_hash, header.root_hash)
                header.origin = origins.setdefault(header.origin, header.origin)
                numbers.append(number)
                headers.append(header)
            saved = self._db.execute("SELECT numbers FROM use_order").fetchone()
            return _in_order(headers, numbers, saved[0] if saved and isinstance(saved[0], bytes) else b"")
        except (sqlite3.Error, ValueError, TypeError, AttributeError, ExtentCorrupt) as error:
            raise IndexDamaged(str(error)) from error

    def _unlocked(self, vault: Vault) -> Iterator[tuple[int, ExtentHeader]]:
        """Encrypted extents by their numbers, in the order in which they were written."""
        query = (
            f"SELECT number, {_LOCKED_COLUMNS}, private FROM extents "
            "WHERE is_complete = 1 AND key_id = ? ORDER BY number"
        )
        for number, *columns in self._db.execute(query, (vault.key_id,)):
            yield number, vault.unlock(LockedExtent(*columns))

    def close(self, *, vouches: bool = True) -> None:
        """Close, and say so in the database if it `vouches` for the files and no write is under way.

        A full disk leaves it unsaid.
        """
        try:
            if vouches and not self._db.execute("SELECT 1 FROM extents WHERE is_complete = 0 LIMIT 1").fetchone():
                self._db.execute(f"PRAGMA user_version = {_CLOSED}")
        except sqlite3.Error:
            return
        finally:
            self._db.close()

    def _execute_many(self, statement: str, rows: Iterable[tuple[object, ...]]) -> None:
        try:
            with self._db:
                self._db.execute("BEGIN")
                self._db.executemany(statement, rows)
        except sqlite3.Error as error:
            raise OSError(f"the warehouse's index can't be written: {error}") from error


_INSERT = (
    "INSERT OR REPLACE INTO extents "
    f"(is_complete, extent_id, image_bytes, num_blocks, num_tokens, {_HEADER_COLUMNS}, key_id, private) "
    f"VALUES ({', '.join('?' * 16)})"
)


def _row(extent: ExtentHeader | LockedExtent) -> tuple[object, ...]:
    counts = extent.image_bytes, extent.num_blocks, extent.num_tokens
    if isinstance(extent, LockedExtent):
        hidden = b"", b"", b"", 0, "", 0
        return extent.name, *counts, extent.root_hash, *hidden, extent.tenant, "", extent.key_id, extent.private
    shape = extent.shape
    return (
        extent.extent_id,
        *counts,
        extent.root_hash,
        extent.parent_hash,
        extent.packed_hashes,
        extent.packed_tokens,
        extent.block_size,
        f"{shape.num_layers},{shape.num_kv_heads},{shape.head_dim},{shape.dtype}",
        extent.first_block,
        *extent.origin,
        None,
        None,
    )


def _parse_shape(text: str) -> KVShape:
    num_layers, num_kv_heads, head_dim, dtype = text.split(",")
    return KVShape(int(num_layers), int(num_kv_heads), int(head_dim), dtype)


def _in_order(headers: list[ExtentHeader], numbers: list[int], saved: bytes) -> list[ExtentHeader]:
    """Those in the saved order first, then what was written since. What makes no sense in the order does no harm."""
    order = np.frombuffer(saved, "<i8", len(saved) // 8)
    if not len(order) or not headers:
        return headers
    present = np.array(numbers, "<i8")
    by_number = np.argsort(order, kind="stable")
    places = by_number[np.minimum(np.searchsorted(order, present, sorter=by_number), len(order) - 1)]
    ranks = np.where(order[places] == present, places, len(order))
    return [headers[at] for at in np.argsort(ranks, kind="stable")]
