"""Ten thousand damages to the files of a real store: no wrong byte is ever returned, and what counts is noticed."""

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.cache.aftermath import Aftermath
from tests.cache.damage import Store, spoil_index, spoil_many

NUM_DAMAGES = 10_000
PER_ROUND = 290


def test_no_damage_to_a_file_ever_gives_a_wrong_byte(
    swift_path: Path, proof_scale: int, report_figure: Callable[[str], None]
) -> None:
    store, rng, found = Store(swift_path / "w", num_chains=60), random.Random(11), Aftermath()
    assert store.read_all(found) == set()
    made: Counter[str] = Counter()
    noticed: Counter[str] = Counter()
    while made.total() < NUM_DAMAGES * proof_scale:
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
    report_figure(
        f"{made.total()} damages to {len(store.targets)} extents: 0 wrong bytes, {noticed.total()} noticed and "
        f"{made.total() - noticed.total()} without effect on a block ({kinds})"
    )
    assert store.read_all(found) == set()


def test_no_damage_to_the_index_ever_gives_a_wrong_byte_or_a_store_that_does_not_open(
    swift_path: Path, proof_scale: int, report_figure: Callable[[str], None]
) -> None:
    store, rng, found = Store(swift_path / "w", num_chains=6), random.Random(12), Aftermath()
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
