"""Processes that are killed while they store, load, evict and purge: at random moments, and at every step.

Whatever a store has said to be durable reads back bit for bit, or is absent because it was told to give it up
later; nothing torn is ever found, and the books of the next owner agree with the folder to the byte.
"""

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cache.aftermath import Promises, reopen
from tests.cache.chains import BLOCK_SIZE
from tests.cache.doomed import LIMITS, NUM_PROMPTS, Job, Told, nursery, prompt


def note(told: Told, promises: Promises) -> set[int]:
    """Enter what a store said; returns the prompts that it promised to be whole on disk."""
    for sign, text in told.messages:
        assert sign != "!", text
        promises.note(sign, text)
    return {int(text) for sign, text in told.messages if sign == "F"}


@pytest.mark.parametrize(("kind", "num_kills"), [("tiny", 150), ("roomy", 50)])
def test_kills_at_random_moments(
    tmp_path: Path, kind: str, num_kills: int, proof_scale: int, report_figure: Callable[[str], None]
) -> None:
    rng, num_kills = random.Random(kind), num_kills * proof_scale
    folder, promises, whole = tmp_path / "w", Promises(), set[int]()
    counts: Counter[str] = Counter()
    with nursery() as start:
        for kill in range(num_kills):
            first = kill // 2
            delay_s = rng.choice((0.005, 0.03, 0.06)) * rng.random()
            lets_open, fsync = rng.random() < 0.8, rng.random() < 0.3
            told = start(Job(str(folder), kind, kill, fsync, first, kill_after_s=delay_s, lets_open=lets_open))
            assert told.status == -9
            whole |= note(told, promises)
            counts["promised"] += sum(sign == "+" for sign, _ in told.messages)
            counts["opening"] += not told.messages
            counts["in a batch"] += any(folder.glob("tmp/*"))
            found = reopen(folder, promises, LIMITS[kind], [prompt(first + i) for i in range(NUM_PROMPTS)])
            assert found.faults == [], f"after kill {kill}"
            counts["read back"] += found.num_checked
            counts["in a commit"] += found.num_unvouched > 0
    report_figure(
        f"{num_kills} kills of a {kind} store at random moments ({counts['opening']} while it opened, "
        f"{counts['in a batch']} left temp files, {counts['in a commit']} files without a row): {counts['promised']} "
        f"extents promised, {counts['read back']} read back, 0 lost, 0 torn"
    )
    assert counts["in a batch"], "kills must hit writes"
    assert counts["read back"] > num_kills
    if kind == "roomy":
        assert whole
        found = reopen(folder, promises, LIMITS[kind], [prompt(number) for number in whole])
        assert found.num_tokens >= sum(len(prompt(number)) // BLOCK_SIZE * BLOCK_SIZE for number in whole)


def test_a_kill_at_every_step(swift_path: Path, report_figure: Callable[[str], None]) -> None:
    """Before every write, fsync, rename, unlink, mkdir and SQL statement, and in the middle of every write."""
    num_steps, num_checked = 0, 0
    with nursery() as start:
        for step in range(1, 2000):
            folder, promises = swift_path / str(step), Promises()
            told = start(Job(str(folder), "tiny", 0, fsync=True, kill_at=step))
            note(told, promises)
            found = reopen(folder, promises, LIMITS["tiny"], [prompt(number) for number in range(13)])
            assert found.faults == [], f"after a kill at step {step}"
            num_checked += found.num_checked
            if told.status == 0:
                break
            assert told.status == -9
            num_steps += 1
    report_figure(f"{num_steps} kills at every step: {num_checked} extents read back, 0 lost, 0 torn")
    assert num_steps > 100
