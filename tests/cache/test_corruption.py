"""Ten thousand damages to the files of a real store: no wrong byte is ever returned, and what counts is noticed."""

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from cache.encryption import Vault
from tests.cache.aftermath import Aftermath
from tests.cache.damage import Store, spoil_index, spoil_many

NUM_DAMAGES = 10_000
NUM_DAMAGES_TO_ENCRYPTED = 2_000
PER_ROUND = 290


@pytest.mark.parametrize(
    ("vault", "num_damages"),
    [(None, NUM_DAMAGES), (Vault(bytes(32)), NUM_DAMAGES_TO_ENCRYPTED)],
    ids=["plain", "encrypted"],
)
def test_no_damage_to_a_file_ever_gives_a_wrong_byte(
    swift_path: Path, proof_scale: int, report_figure: Callable[[str], None], vault: Vault | None, num_damages: int
) -> None:
    store, rng, found = Store(swift_path / "w", 60, vault), random.Random(11), Aftermath()
    assert store.read_all(found) == set()
    made: Counter[str] = Counter()
    noticed: Counter[str] = Counter()
    while made.total() < num_damages * proof_scale:
        damages = spoil_many(store, rng, PER_ROUND)
        missed = store.read_all(found)
        assert found.faults == []
        assert missed <= set(damages), "a whole file was not believed"
        for target, (kind, must_notice) in damages.items():
            made[kind] += 1
            noticed[kind] += target in missed
            assert target in missed or not must_notice, f"{kind} of {target.header.extent_id}"
        store.mend()
    kinds = ", ".join(f"{noticed[kind]} of {number} {kind}" for kind, number in made.most_common())
    what = f"{len(store.targets)} {'encrypted' if vault else 'plain'} extents"
    report_figure(
        f"{made.total()} damages to {what}: 0 wrong bytes, {noticed.total()} noticed and "
        f"{made.total() - noticed.total()} without effect on a block ({kinds})"
    )
    assert store.read_all(found) == set()


@pytest.mark.parametrize("vault", [None, Vault(bytes(32))], ids=["plain", "encrypted"])
def test_no_damage_to_the_index_ever_gives_a_wrong_byte_or_a_store_that_does_not_open(
    swift_path: Path, proof_scale: int, report_figure: Callable[[str], None], vault: Vault | None
) -> None:
    store, rng, found = Store(swift_path / "w", 6, vault), random.Random(12), Aftermath()
    num_damages, num_missed = 300 * proof_scale, 0
    for _ in range(num_damages):
        (store.folder / "index.sqlite").write_bytes(spoil_index(rng, store.index))
        num_missed += len(store.read_all(found))
        assert found.faults == []
        store.mend()
    num_extents = num_damages * len(store.targets)
    report_figure(
        f"{num_damages} damages to an index of {len(store.targets)} extents: 0 wrong bytes, "
        f"{num_missed} of {num_extents} extents a miss"
    )
    assert num_missed < num_extents / 10, "the files are whole: most of them must be found again"
