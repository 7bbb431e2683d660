"""The proofs can fail: each thing that keeps the warehouse whole is taken out in turn, and they find it.

For each mutation the same work is done and looked at as in the tests of power cuts, crashes and corruption; here
it must come out broken, in the way that is named.
"""

import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from cache import read_ahead
from cache.errors import ExtentCorrupt
from cache.extent import ExtentHeader, Image, SealedHeader
from cache.messages import LoadQuery
from cache.tiers.disk import FileTier
from cache.tiers.folder import Folder
from tests.cache.aftermath import Aftermath
from tests.cache.damage import Store, spoil_many
from tests.cache.power import Loss, Memory
from tests.cache.test_power_cuts import Scenes, live

Take = pytest.MonkeyPatch


def _said(mutate: Callable[[Take], None]) -> str:
    return mutate.__name__.replace("_", " ")


# -- what makes writes durable ------------------------------------------------------------------------


def no_sync(patch: Take) -> None:
    patch.setattr(Memory, "sync", lambda self, path: self.on_step("sync"))


def no_sync_of_files(patch: Take) -> None:
    _sync_only_if(patch, lambda path: path.is_dir())


def no_sync_of_folders(patch: Take) -> None:
    _sync_only_if(patch, lambda path: path.is_file())


def _sync_only_if(patch: Take, is_synced: Callable[[Path], bool]) -> None:
    sync = Memory.sync

    def sync_some(self: Memory, path: Path) -> None:
        if is_synced(path):
            sync(self, path)

    patch.setattr(Memory, "sync", sync_some)


def no_sync_of_the_folders_above(patch: Take) -> None:
    def make_parents(self: FileTier, extent_id: str) -> list[Path]:
        parent = Path(self.path(extent_id)).parent
        self._files.make_folder(parent.parent)
        self._files.make_folder(parent)
        return [parent]

    patch.setattr(FileTier, "_make_parents", make_parents)


def no_sync_of_folders_that_are_there(patch: Take) -> None:
    """Those that an owner made and did not live to sync."""

    class All(set[str]):
        def __contains__(self, item: object) -> bool:
            return True

    init = FileTier.__init__

    def init_sure(self: FileTier, directory: Path, **options: Any) -> None:
        init(self, directory, **options)
        self._rooted = All()

    patch.setattr(FileTier, "__init__", init_sure)


def no_sync_of_deletions(patch: Take) -> None:
    patch.setattr(FileTier, "_sync_deletions", lambda self: None)


def no_rename(patch: Take) -> None:
    """Written under its final name from the start."""

    def write(self: FileTier, header: ExtentHeader, image: Image) -> None:
        self._db.prepare(header)
        for folder in self._make_parents(header.extent_id):
            self._files.sync(folder)
        final = Path(self.path(header.extent_id))
        self._files.unlink(final)
        self._written[header.extent_id] = final
        self._files.write(final, image.data)

    patch.setattr(FileTier, "write", write)
    patch.setattr(Memory, "rename", lambda self, source, target: source.replace(target))


def rename_before_sync(patch: Take) -> None:
    commit = FileTier.commit

    def commit_late(self: FileTier) -> list[str]:
        for extent_id, temporary in list(self._written.items()):
            self._make_parents(extent_id)
            self._files.rename(temporary, Path(self.path(extent_id)))
            self._written[extent_id] = Path(self.path(extent_id))
        return commit(self)

    patch.setattr(FileTier, "commit", commit_late)


def complete_before_the_file(patch: Take) -> None:
    """The row vouches for a file that may never come."""
    write = FileTier.write

    def write_too_sure(self: FileTier, header: ExtentHeader, image: Image) -> None:
        write(self, header, image)
        self.tell("+", header.extent_id)  # type: ignore[attr-defined]
        self._db.complete([header.extent_id])

    patch.setattr(FileTier, "write", write_too_sure)


def no_comparing_of_rows_and_files(patch: Take) -> None:
    patch.setattr(FileTier, "_reconcile", lambda self, db: None)


def no_sweeping(patch: Take) -> None:
    """What was being written is left where it is."""
    sweep = Folder.__init__

    def init(self: Folder, directory: Path, *arguments: Any) -> None:
        aside = directory.with_name("kept")
        if (directory / "tmp").exists():
            (directory / "tmp").rename(aside)
        sweep(self, directory, *arguments)
        if aside.exists():
            (directory / "tmp").rmdir()
            aside.rename(directory / "tmp")

    patch.setattr(Folder, "__init__", init)


DURABILITY: list[tuple[Callable[[Take], None], Iterable[str]]] = [
    (no_sync, ["lost", "torn", "does not open"]),
    (no_sync_of_files, ["torn"]),
    (no_sync_of_folders, ["lost"]),
    (no_sync_of_the_folders_above, ["lost"]),
    (no_sync_of_folders_that_are_there, ["lost"]),
    (no_sync_of_deletions, ["came back"]),
    (no_rename, ["torn"]),
    (rename_before_sync, ["torn"]),
    (complete_before_the_file, ["lost"]),
    (no_comparing_of_rows_and_files, ["not in the books"]),
    (no_sweeping, ["left over"]),
]


SOME = [(Loss.NOTHING, "older"), (Loss.CONTENT, "gone"), (Loss.SOME, "as it is"), (Loss.SOME, "gone")]


@pytest.mark.parametrize(("mutate", "expected"), DURABILITY)
def test_without_it_a_crash_or_a_power_cut_breaks_a_promise(
    swift_path: Path,
    monkeypatch: Take,
    mutate: Callable[[Take], None],
    expected: list[str],
    report_figure: Callable[[str], None],
) -> None:
    mutate(monkeypatch)
    scenes = Scenes(swift_path, SOME, expected)
    live(scenes)
    report_figure(f"{_said(mutate)}: {', '.join(scenes.faults)} found within {scenes.counts['openings']} openings")
    assert set(expected) <= set(scenes.faults)


# -- what keeps wrong bytes from a reader ---------------------------------------------------------------


def no_checksum_of_blocks(patch: Take) -> None:
    patch.setattr(SealedHeader, "verify_block", lambda self, index, block: None)


def no_look_at_tokens_and_history(patch: Take) -> None:
    def verify(
        sealed: SealedHeader, index: int, payload: Image, asked: LoadQuery, block_index: int, num_tokens: int
    ) -> None:
        if index >= sealed.header.num_blocks:
            raise ExtentCorrupt("fewer blocks")
        sealed.verify_block(index, payload)

    patch.setattr(read_ahead, "verify_block", verify)


@pytest.mark.parametrize("mutate", [no_checksum_of_blocks, no_look_at_tokens_and_history])
def test_without_it_damage_reaches_the_reader(
    swift_path: Path, monkeypatch: Take, mutate: Callable[[Take], None], report_figure: Callable[[str], None]
) -> None:
    store, rng, found = Store(swift_path / "w", num_chains=20), random.Random(5), Aftermath()
    mutate(monkeypatch)
    num_damages = 0
    for _ in range(4):
        num_damages += len(spoil_many(store, rng, 90))
        store.read_all(found)
        store.mend()
    report_figure(f"{_said(mutate)}: {len(found.faults)} wrong blocks after {num_damages} damages")
    assert {fault.split(":")[0] for fault in found.faults} == {"wrong bytes"}
