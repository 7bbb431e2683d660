"""The root of a chain tells apart whatever makes KV differ."""

from dataclasses import fields, replace
from typing import Any

import pytest

from cache.fingerprint import Fingerprint
from cache.hashing import HASH_BYTES

BASE = Fingerprint(weights="w", config="c", kv_dtype="float32", numerics="float32", block_size=32)


@pytest.mark.parametrize("name", [field.name for field in fields(Fingerprint)])
def test_every_field_changes_the_root(name: str) -> None:
    value = getattr(BASE, name)
    changes: dict[str, Any] = {name: value + 1 if isinstance(value, int) else value + "x"}
    changed = replace(BASE, **changes)
    assert changed.root_hash() != BASE.root_hash()


def test_no_field_can_be_taken_for_another() -> None:
    texts = [field.name for field in fields(Fingerprint) if isinstance(getattr(BASE, field.name), str)]
    roots = set()
    for name in texts:
        values: dict[str, Any] = dict.fromkeys(texts, "") | {name: "same"}
        roots.add(replace(BASE, **values).root_hash())
    assert len(roots) == len(texts)


def test_text_does_not_flow_from_one_field_into_the_next() -> None:
    left = replace(BASE, weights="ab", config="c")
    right = replace(BASE, weights="a", config="bc")
    assert left.root_hash() != right.root_hash()


def test_the_root_is_stable() -> None:
    assert BASE.root_hash() == replace(BASE).root_hash()
    assert len(BASE.root_hash()) == HASH_BYTES
