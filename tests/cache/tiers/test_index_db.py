"""The disk tier's index: rows, order, and what it knows about its last owner."""

import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from cache.extent import Origin
from cache.tiers.index_db import IndexDamaged, IndexDb, IndexTotals, read_totals
from tests.cache.chains import SHAPE, header_of

A, B, C = (header_of([number] * 8) for number in (1, 2, 3))


def listed(db: IndexDb) -> list[str]:
    return [header.extent_id for header in db.complete_headers()]


def test_only_complete_rows_are_listed_in_the_order_of_use(tmp_path: Path) -> None:
    db = IndexDb(tmp_path / "index")
    for header in (A, B, C):
        db.prepare(header)
    db.complete([C.extent_id, A.extent_id])
    assert listed(db) == [A.extent_id, C.extent_id]
    assert db.states() == {A.extent_id: True, B.extent_id: False, C.extent_id: True}
    db.save_order([C.extent_id, A.extent_id])
    assert listed(db) == [C.extent_id, A.extent_id]
    db.remove_row(C.extent_id)
    db.prepare(A)
    assert listed(db) == []
    db.close()


def test_a_header_comes_back_whole(tmp_path: Path) -> None:
    tail = header_of([1, 2, 3, 4, 5, 6], first=1)
    db = IndexDb(tmp_path / "index")
    db.prepare(tail)
    db.complete([tail.extent_id])
    (back,) = db.complete_headers()
    assert (back.extent_id, back.image_bytes, back.is_tail) == (tail.extent_id, tail.image_bytes, True)
    assert back.token_ids.tolist() == [5, 6]
    assert (back.root_hash, back.parent_hash, back.shape) == (tail.root_hash, tail.parent_hash, tail.shape)
    db.close()


def test_it_knows_whether_the_last_owner_closed_it(tmp_path: Path) -> None:
    path = tmp_path / "index"
    seen = []
    for step in ("new", "closed", "killed", "killed in a write", "closed in a write"):
        db = IndexDb(path)
        seen.append((step, db.was_closed))
        if step == "killed in a write":
            db.prepare(A)
        if step in ("new", "killed in a write"):
            db.close()
        else:
            db._db.close()  # a kill closes nothing
    assert seen == [
        ("new", False),
        ("closed", True),
        ("killed", False),
        ("killed in a write", False),
        ("closed in a write", False),
    ]


def test_what_is_no_database_is_damaged_and_can_be_removed(tmp_path: Path) -> None:
    path = tmp_path / "index"
    path.write_bytes(b"nonsense" * 1000)
    with pytest.raises(IndexDamaged, match="not a database"):
        IndexDb(path)
    IndexDb.remove(path)
    assert list(tmp_path.iterdir()) == []
    IndexDb(path).close()


def test_a_database_that_fails_is_an_os_error(tmp_path: Path) -> None:
    db = IndexDb(tmp_path / "index")
    with sqlite3.connect(tmp_path / "index") as other:
        other.execute("DROP TABLE extents")
    other.close()
    with pytest.raises(OSError, match="index can't be written"):
        db.prepare(A)
    with pytest.raises(OSError, match="index can't be written"):
        db.save_order(["x"])
    db.close()


def test_an_index_of_another_version_is_damaged_and_an_empty_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "index"
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 0")
        db.execute("CREATE TABLE extents (extent_id TEXT)")
    db.close()
    with pytest.raises(IndexDamaged, match="its version is 0, this program's is 3"):
        IndexDb(path)
    IndexDb.remove(path)
    path.touch()
    IndexDb(path).close()


def test_a_row_that_does_not_add_up_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "index"
    db = IndexDb(path)
    db.add_complete([A, B])
    db.close()
    with sqlite3.connect(path) as raw:
        raw.execute("UPDATE extents SET parent_hash = zeroblob(16) WHERE extent_id = ?", (A.extent_id,))
    raw.close()
    db = IndexDb(path)
    with pytest.raises(IndexDamaged, match=f"the row of extent {A.extent_id} does not add up"):
        db.complete_headers()
    db.close()


def test_who_stored_an_extent_and_where_it_lies_come_back(tmp_path: Path) -> None:
    headers = [
        replace(header_of([1] * 12, first=1), origin=Origin("acme", "änna")),
        replace(header_of([2] * 8), origin=Origin("acme", "änna")),
        header_of([3] * 4),
    ]
    db = IndexDb(tmp_path / "index")
    db.add_complete(headers)
    back = db.complete_headers()
    assert back == headers
    assert back[0].origin is back[1].origin, "what many rows share is kept once"
    assert back[0].shape is back[2].shape
    db.close()


def test_totals_are_of_what_is_durable_and_can_be_read_beside_the_owner(tmp_path: Path) -> None:
    path = tmp_path / "an index?mode=rwc"
    db = IndexDb(path)
    db.add_complete([A, header_of([1, 2, 3, 4, 5], first=1)])
    db.prepare(B)
    assert read_totals(path) == IndexTotals(2, 3, 9, 1, A.image_bytes + 4096 + SHAPE.bytes_per_token)
    db.close()
    with pytest.raises(IndexDamaged):
        read_totals(tmp_path / "none")


def bytes_of(path: Path) -> bytes:
    return b"".join(each.read_bytes() for each in sorted(path.parent.glob(f"{path.name}*")))


def test_nothing_of_deleted_rows_can_be_found_in_the_files(tmp_path: Path) -> None:
    path = tmp_path / "index"
    secret, kept = header_of([0x5EC237 + i for i in range(8)]), header_of([0xABCDEF + i for i in range(8)])
    db = IndexDb(path)
    db.add_complete([secret, kept])
    assert secret.packed_tokens in bytes_of(path)
    db.remove_row(secret.extent_id)
    db.forget_deleted()
    assert secret.packed_tokens not in bytes_of(path)
    assert kept.packed_tokens in bytes_of(path)
    db.close()


def test_a_reader_that_holds_the_log_up_is_said(tmp_path: Path) -> None:
    path = tmp_path / "index"
    db = IndexDb(path)
    db._db.execute("PRAGMA busy_timeout = 50")
    db.add_complete([A])
    with closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM extents").fetchall()
        db.remove_row(A.extent_id)
        with pytest.raises(OSError, match="another process reads"):
            db.forget_deleted()
    db.forget_deleted()
    assert A.packed_tokens not in bytes_of(path)
    db.close()
