"""The disk tier's index: rows, order, and what it knows about its last owner."""

import sqlite3
from pathlib import Path

import pytest

from cache.tiers.index_db import IndexDamaged, IndexDb
from tests.cache.chains import header_of

A, B, C = (header_of([number] * 8) for number in (1, 2, 3))


def listed(db: IndexDb) -> list[str]:
    return [header.extent_id for header in db.complete_headers()]


def test_only_complete_rows_are_listed_in_the_order_of_use(tmp_path: Path) -> None:
    db = IndexDb(tmp_path / "index")
    for header in (A, B, C):
        db.prepare(header)
    db.complete(C.extent_id)
    db.complete(A.extent_id)
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
    db.complete(tail.extent_id)
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
