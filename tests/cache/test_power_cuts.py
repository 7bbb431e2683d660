"""A process that stops, or a power cut, before every step of a fixed piece of work, with every state of the index.

At each step the folder is copied as it is, loses what a power cut may take, and is opened as the next owner
would: what was committed is there to the bit, what was purged is not, and nothing is torn.
"""

import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from cache.errors import FolderError
from cache.tiers.disk import FileTier
from cache.tiers.index_db import IndexDb
from tests.cache.aftermath import Aftermath, Promises, Witness, reopen
from tests.cache.chains import budgets, sealed_image
from tests.cache.power import Loss, Memory
from tests.cache.tiers.folders import HEADERS, A, B, C

D, E, F = HEADERS[3:]


class Scenes:
    """Copies of a folder at every step of its owner, opened at once and looked at.

    `index`: as it is at that moment, as it was before the last batch, or gone.
    """

    def __init__(self, root: Path, losses: list[tuple[Loss, str]], wanted: Iterable[str] = ()) -> None:
        """`wanted`: once faults of all these kinds have been found, nothing more is looked at."""
        self.folder = root / "w"
        self.promises = Promises()
        self.faults: Counter[str] = Counter()
        self.examples: list[str] = []
        self.counts: Counter[str] = Counter()
        self.memory = Memory(self.folder, root / "shadow", self.look)
        self._losses = losses
        self._wanted = set(wanted)
        self._root = root
        self._rng = random.Random(7)

    def open(self) -> FileTier:
        tier = Witness(self.folder, self.promises.note, files=self.memory, lock_wait_s=0.0)
        tier._db._db.set_trace_callback(self.look)
        self.keep_index()
        return tier

    def keep_index(self) -> None:
        """This is how the index will look "before the last batch"."""
        for path in self.folder.glob("index.sqlite*"):
            shutil.copyfile(path, self._root / path.name)

    def look(self, step: str) -> None:
        if not (self.folder / "format.json").exists():
            return  # before the first promise
        if self._wanted and self._wanted <= set(self.faults):
            return
        self.counts["steps"] += 1
        for loss, index in self._losses:
            copy = self._root / "copy"
            shutil.copytree(self.folder, copy)
            self.memory.cut(copy, loss, self._rng)
            self._change_index(copy, index)
            found = self._reopen(copy)
            shutil.rmtree(copy)
            self.counts["openings"] += 1
            self.counts["checked"] += found.num_checked
            for fault in found.faults:
                self.faults[fault.split(":")[0]] += 1
                self.examples.append(f"before {step!r}, loss {loss.value}, index {index}: {fault}")

    def _reopen(self, copy: Path) -> Aftermath:
        try:
            return reopen(copy, self.promises.copy(), budgets())
        except FolderError as error:
            return Aftermath([f"does not open: {error}"])

    def _change_index(self, copy: Path, index: str) -> None:
        if index == "as it is":
            return
        IndexDb.remove(copy / "index.sqlite")
        if index == "older":
            for path in self._root.glob("index.sqlite*"):
                shutil.copyfile(path, copy / path.name)


def put(tier: FileTier, *headers: object) -> None:
    for header in HEADERS:
        if header in headers:
            tier.write(header, sealed_image(header))
    tier.commit()


def live(scenes: Scenes) -> None:
    """Two owners, who go through all that a tier can do."""
    tier = scenes.open()
    put(tier, A, B)
    scenes.keep_index()
    put(tier, C)
    tier.delete(A.extent_id)
    scenes.keep_index()
    put(tier, A, D)  # one comes again
    tier.quarantine(B.extent_id)
    scenes.keep_index()
    scenes.memory.fail_at = "sync folder"
    try:
        put(tier, E, F)
    except OSError:
        tier.abandon()
    put(tier, E, F)
    tier.close()
    tier = scenes.open()
    tier.recover()
    scenes.keep_index()
    put(tier, B)
    tier.delete(C.extent_id)
    tier.forget_deleted()
    scenes.promises.forgotten.add(C.extent_id)
    tier.save_order([B.extent_id, A.extent_id])
    tier.close()
    scenes.look("end")


EVERY = [(loss, index) for loss in Loss for index in ("as it is", "older", "gone")]


def test_a_stop_or_a_power_cut_at_every_step(swift_path: Path, report_figure: Callable[[str], None]) -> None:
    scenes = Scenes(swift_path, EVERY)
    live(scenes)
    assert scenes.examples == [], scenes.faults
    counts = scenes.counts
    report_figure(
        f"{counts['steps']} steps of a tier, {counts['openings']} stops and power cuts: "
        f"{counts['checked']} extents read back, 0 lost, 0 torn"
    )
    assert counts["steps"] > 80
