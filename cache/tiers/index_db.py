"""The disk tier's index: one SQLite row per extent, `prepared` and then `complete`.

SQLite in WAL mode with synchronous=NORMAL: a commit costs about 0.1 ms, and after a power cut the last
rows may be missing but the database is whole. `was_closed` tells whether rows and files can differ: it is
true only if the last owner closed the index with no write under way.
"""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cache.extent import ExtentHeader, KVShape
from cache.hashing import HASH_BYTES, BlockHash, as_token_ids, pack_hashes, unpack_hashes

_SCHEMA = """
CREATE TABLE IF NOT EXISTS extents (
    extent_id TEXT PRIMARY KEY,
    is_complete INTEGER NOT NULL,
    use_order INTEGER NOT NULL,
    image_bytes INTEGER NOT NULL,
    root_hash BLOB NOT NULL,
    parent_hash BLOB NOT NULL,
    block_hashes BLOB NOT NULL,
    token_ids BLOB NOT NULL,
    block_size INTEGER NOT NULL,
    num_layers INTEGER NOT NULL,
    num_kv_heads INTEGER NOT NULL,
    head_dim INTEGER NOT NULL,
    dtype TEXT NOT NULL
) WITHOUT ROWID;
"""
_HEADER_COLUMNS = (
    "root_hash, parent_hash, block_hashes, token_ids, block_size, num_layers, num_kv_heads, head_dim, dtype"
)


_OPEN, _CLOSED = 0, 1  # values of SQLite's user_version


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
                f"SELECT COUNT(*), TOTAL(LENGTH(block_hashes) / {HASH_BYTES}), TOTAL(LENGTH(token_ids) / 4), "
                "COUNT(DISTINCT root_hash), TOTAL(image_bytes) FROM extents WHERE is_complete = 1"
            ).fetchone()
    except sqlite3.Error as error:
        raise IndexDamaged(str(error)) from error
    return IndexTotals(*(int(each) for each in row))


class IndexDb:
    """See the module's docstring. Not thread-safe: the disk tier holds a lock around it."""

    def __init__(self, path: Path) -> None:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))  # SQLite keeps the mode
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            verdict, self.was_closed, last = self._open()
        except sqlite3.Error as error:
            verdict = str(error)
        if verdict != "ok":
            self._db.close()
            raise IndexDamaged(verdict)
        self._next_order = last + 1

    def _open(self) -> tuple[str, bool, int]:
        """SQLite's verdict on the file, whether the last owner closed it, and the highest order in it."""
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.executescript(_SCHEMA)
        verdict = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]
        last = self._db.execute("SELECT COALESCE(MAX(use_order), 0) FROM extents").fetchone()[0]
        was_closed = self._db.execute("PRAGMA user_version").fetchone()[0] == _CLOSED
        self._db.execute(f"PRAGMA user_version = {_OPEN}")
        return str(verdict), was_closed, int(last)

    @staticmethod
    def remove(path: Path) -> None:
        """Delete a database and what SQLite keeps beside it."""
        for suffix in ("", "-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)

    def prepare(self, header: ExtentHeader) -> None:
        """Announce a write."""
        shape = header.shape
        row = (
            header.extent_id,
            self._next_order,
            header.image_bytes,
            header.root_hash,
            header.parent_hash,
            pack_hashes(header.block_hashes),
            header.token_ids.tobytes(),
            header.block_size,
            shape.num_layers,
            shape.num_kv_heads,
            shape.head_dim,
            shape.dtype,
        )
        self._next_order += 1
        self._execute("INSERT OR REPLACE INTO extents VALUES (?, 0, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)

    def complete(self, extent_id: str) -> None:
        """The file is durable."""
        self._execute("UPDATE extents SET is_complete = 1 WHERE extent_id = ?", (extent_id,))

    def remove_row(self, extent_id: str) -> None:
        """Forget an extent."""
        self._execute("DELETE FROM extents WHERE extent_id = ?", (extent_id,))

    def save_order(self, extent_ids: list[str]) -> None:
        """Number the extents in the order given, least recently used first."""
        rows = [(order, extent_id) for order, extent_id in enumerate(extent_ids)]
        try:
            with self._db:
                self._db.execute("BEGIN")
                self._db.executemany("UPDATE extents SET use_order = ? WHERE extent_id = ?", rows)
        except sqlite3.Error as error:
            raise OSError(f"the warehouse's index can't be written: {error}") from error
        self._next_order = max(self._next_order, len(rows))

    def states(self) -> dict[str, bool]:
        """All extents, and whether each is complete."""
        return {row[0]: bool(row[1]) for row in self._db.execute("SELECT extent_id, is_complete FROM extents")}

    def complete_headers(self) -> Iterator[ExtentHeader]:
        """Durable extents, least recently used first."""
        query = f"SELECT {_HEADER_COLUMNS} FROM extents WHERE is_complete = 1 ORDER BY use_order"
        for root, parent, hashes, tokens, block_size, num_layers, num_kv_heads, head_dim, dtype in self._db.execute(
            query
        ):
            yield ExtentHeader(
                BlockHash(root),
                BlockHash(parent),
                tuple(unpack_hashes(hashes)),
                as_token_ids(np.frombuffer(tokens, "<i4")),
                block_size,
                KVShape(num_layers, num_kv_heads, head_dim, dtype),
            )

    def close(self) -> None:
        """Close, and say so in the database if no write is under way. A full disk leaves it unsaid."""
        try:
            if not self._db.execute("SELECT 1 FROM extents WHERE is_complete = 0 LIMIT 1").fetchone():
                self._db.execute(f"PRAGMA user_version = {_CLOSED}")
        except sqlite3.Error:
            return
        finally:
            self._db.close()

    def _execute(self, statement: str, row: tuple[object, ...]) -> None:
        try:
            self._db.execute(statement, row)
        except sqlite3.Error as error:
            raise OSError(f"the warehouse's index can't be written: {error}") from error
