"""Encrypted extents out of one folder and into another: as they are on the way out, with their key on the way in."""

import tarfile
from contextlib import closing
from pathlib import Path

import pytest

from cache.messages import PurgeQuery
from cache.tiers.archive import Exported, Imported, Wanted, export_extents, import_extents
from cache.tiers.disk import FileTier
from tests.cache.chains import header_of
from tests.cache.encrypted import ANNA, KEY, OF_ANNA, OTHER_KEY, disk_bytes, name_of, open_with, read, stored, vault
from tests.cache.stores import OTHER, TOKENS, damage, extent_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eleven encrypted extents, eight of them anna's."""
    return stored(tmp_path / "from")


def no_progress(num_done: int, num_total: int) -> None:
    return


def export(folder: Path, archive: Path, key: bytes | None, wanted: Wanted = lambda extent: True) -> Exported:
    return export_extents(folder, archive, wanted, no_progress, vault(key) if key is not None else None)


def take(archive: Path, folder: Path, archive_key: bytes | None, folder_key: bytes | None) -> Imported:
    opens = vault(archive_key) if archive_key is not None else None
    with closing(FileTier(folder, vault=vault(folder_key) if folder_key is not None else None)) as disk:
        return import_extents(archive, disk, disk.recover(), 1 << 30, 0, no_progress, opens)


@pytest.mark.parametrize("key", [KEY, None], ids=["key", "no key"])
def test_what_is_encrypted_goes_out_as_it_is(folder: Path, tmp_path: Path, key: bytes | None) -> None:
    exported = export(folder, tmp_path / "a.tar", key)
    assert (exported.num_extents, exported.num_tokens, exported.num_bytes) == (11, 42, disk_bytes(folder))
    assert (exported.num_bad, exported.num_unverified) == (0, 0 if key else 11)
    with tarfile.open(tmp_path / "a.tar") as tar:
        members = {member.name: file.read() for member in tar if (file := tar.extractfile(member)) is not None}
    assert members == {path.name: path.read_bytes() for path in extent_files(folder)}


@pytest.mark.parametrize("folder_key", [KEY, OTHER_KEY, None], ids=["key", "other key", "no key"])
def test_it_comes_in_with_its_key_under_the_key_of_the_folder(
    folder: Path, tmp_path: Path, folder_key: bytes | None
) -> None:
    export(folder, tmp_path / "a.tar", KEY)
    imported = take(tmp_path / "a.tar", tmp_path / "to", KEY, folder_key)
    assert (imported.num_extents, imported.num_bad, imported.num_locked) == (11, 0, 0)
    with open_with(tmp_path / "to", folder_key) as store:
        assert (read(store, TOKENS, folder_key)[0], read(store, OTHER, folder_key)[0]) == (len(TOKENS), len(OTHER))
        assert store.purge(OF_ANNA).num_extents == 8, "sessions come along"


@pytest.mark.parametrize("archive_key", [None, OTHER_KEY], ids=["no key", "other key"])
def test_without_its_key_nothing_comes_in(folder: Path, tmp_path: Path, archive_key: bytes | None) -> None:
    export(folder, tmp_path / "a.tar", KEY)
    imported = take(tmp_path / "a.tar", tmp_path / "to", archive_key, None)
    assert (imported.num_extents, imported.num_locked, imported.num_bad) == (0, 11, 0)
    assert extent_files(tmp_path / "to") == []


def test_what_was_plain_comes_in_encrypted(tmp_path: Path) -> None:
    export(stored(tmp_path / "from", key=None), tmp_path / "a.tar", None)
    assert take(tmp_path / "a.tar", tmp_path / "to", KEY, KEY).num_extents == 11
    assert {path.stem for path in extent_files(tmp_path / "to")} >= {name_of(header_of(TOKENS[:4]).extent_id)}
    assert take(tmp_path / "a.tar", tmp_path / "to", KEY, KEY).num_present == 11


def test_damage_is_noticed_on_both_ways(folder: Path, tmp_path: Path) -> None:
    name = name_of(header_of(TOKENS[:4]).extent_id)
    damage(folder, name)
    exported = export(folder, tmp_path / "a.tar", KEY)
    assert (exported.num_extents, exported.num_bad) == (10, 1)
    exported = export(folder, tmp_path / "b.tar", None)
    assert (exported.num_extents, exported.num_bad, exported.num_unverified) == (11, 0, 11)
    imported = take(tmp_path / "b.tar", tmp_path / "to", KEY, KEY)
    assert (imported.num_extents, imported.num_bad) == (10, 1)


def test_a_selection_by_session_takes_the_key(folder: Path, tmp_path: Path) -> None:
    assert export(folder, tmp_path / "a.tar", KEY, OF_ANNA.means).num_extents == 8
    exported = export(folder, tmp_path / "b.tar", None, OF_ANNA.means)
    assert (exported.num_extents, exported.num_unknown) == (0, 8)
    assert export(folder, tmp_path / "c.tar", None, PurgeQuery(ANNA.tenant).means).num_extents == 8
