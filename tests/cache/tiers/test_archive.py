"""Extents out of one folder and into another: what comes along, what is refused, what happens without room."""

import io
import tarfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from cache.errors import ArchiveError
from cache.extent import ExtentHeader, allocate_image, seal
from cache.hashing import BlockHash
from cache.locked import LockedExtent
from cache.messages import PurgeQuery
from cache.tiers.archive import Exported, Imported, export_extents, import_extents
from cache.tiers.disk import FileTier
from tests.cache.chains import IMAGE_BYTES, header_of, root_of, sealed_image, store_chain
from tests.cache.stores import OTHER, TOKENS, damage, extent_files, open_store, read


def no_progress(num_done: int, num_total: int) -> None:
    assert 0 < num_done <= num_total


def all_of(extent: ExtentHeader | LockedExtent) -> bool:
    return True


def stored(folder: Path, *chains: list[int]) -> Path:
    with open_store(folder) as store:
        for chain in chains:
            store_chain(store, chain)
    return folder


def export(folder: Path, archive: Path) -> Exported:
    return export_extents(folder, archive, all_of, no_progress)


def take(archive: Path, folder: Path, budget_bytes: int = 1 << 30, min_free_bytes: int = 0) -> Imported:
    with closing(FileTier(folder)) as disk:
        return import_extents(archive, disk, disk.recover(), budget_bytes, min_free_bytes, no_progress)


def tar_of(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_what_goes_out_comes_in(tmp_path: Path) -> None:
    folder = stored(tmp_path / "from", TOKENS, OTHER)
    exported = export(folder, tmp_path / "all.tar")
    assert (exported.num_extents, exported.num_blocks, exported.num_tokens) == (11, 11, 42)
    assert exported.num_bytes == sum(path.stat().st_size for path in extent_files(folder))
    imported = take(tmp_path / "all.tar", tmp_path / "to")
    assert (imported.num_extents, imported.num_tokens, imported.num_bytes) == (11, 42, exported.num_bytes)
    assert (imported.num_bad, imported.num_present, imported.num_without_room) == (0, 0, 0)
    with open_store(tmp_path / "to") as store:
        assert (read(store, TOKENS)[0], read(store, OTHER)[0]) == (30, 12)
        store.check_integrity()


def test_the_archive_is_its_owners_alone_and_replaces_nothing(tmp_path: Path) -> None:
    folder, archive = stored(tmp_path / "w", OTHER), tmp_path / "a.tar"
    export(folder, archive)
    assert archive.stat().st_mode & 0o777 == 0o600
    with pytest.raises(ArchiveError, match="exists already"):
        export(folder, archive)
    with pytest.raises(ArchiveError, match="No such file"):
        export(folder, tmp_path / "missing" / "a.tar")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "w"]


def test_an_export_goes_on_beside_the_owner(tmp_path: Path) -> None:
    with open_store(tmp_path / "w") as store:
        store_chain(store, OTHER)
        assert store.flush()
        assert export(tmp_path / "w", tmp_path / "a.tar").num_extents == 3


def test_only_what_is_wanted_goes_out(tmp_path: Path) -> None:
    folder = stored(tmp_path / "w", OTHER)
    wanted = PurgeQuery(root_hash=root_of("another"))
    assert export_extents(folder, tmp_path / "a.tar", wanted.means, no_progress) == Exported()
    wanted = PurgeQuery(root_hash=root_of())
    assert export_extents(folder, tmp_path / "b.tar", wanted.means, no_progress).num_extents == 3


def test_bad_files_stay_behind(tmp_path: Path) -> None:
    folder = stored(tmp_path / "w", TOKENS)
    damage(folder, header_of(TOKENS[:4]).extent_id)  # the payload
    damage(folder, header_of(TOKENS[:8], first=1).extent_id, at=30)  # the header
    exported = export(folder, tmp_path / "a.tar")
    assert (exported.num_extents, exported.num_bad, exported.num_gone) == (6, 2, 0)


def test_a_second_import_adds_nothing(tmp_path: Path) -> None:
    folder = stored(tmp_path / "w", TOKENS)
    export(folder, tmp_path / "a.tar")
    imported = take(tmp_path / "a.tar", folder)
    assert (imported.num_extents, imported.num_present) == (0, 8)


def test_beginnings_come_first_where_room_is_short(tmp_path: Path) -> None:
    export(stored(tmp_path / "from", TOKENS, OTHER), tmp_path / "a.tar")
    imported = take(tmp_path / "a.tar", tmp_path / "to", budget_bytes=5 * IMAGE_BYTES)
    assert (imported.num_extents, imported.num_without_room) == (5, 6)
    with open_store(tmp_path / "to") as store:
        assert sorted((read(store, TOKENS)[0], read(store, OTHER)[0])) == [8, 12]
    assert take(tmp_path / "a.tar", tmp_path / "to", budget_bytes=5 * IMAGE_BYTES).num_extents == 0


def test_a_full_file_system_takes_nothing(tmp_path: Path) -> None:
    export(stored(tmp_path / "from", OTHER), tmp_path / "a.tar")
    imported = take(tmp_path / "a.tar", tmp_path / "to", min_free_bytes=1 << 60)
    assert (imported.num_extents, imported.num_without_room) == (0, 3)


def test_nothing_comes_in_that_is_not_whole(tmp_path: Path) -> None:
    header = header_of(OTHER[:4])
    good = bytes(sealed_image(header))
    flipped = bytearray(good)
    flipped[-1] ^= 1
    lying = replace(header, packed_hashes=BlockHash(b"another hash...."))
    image = allocate_image(lying)
    image[lying.payload_offset :] = 0
    seal(lying, image)
    archive = tar_of(
        tmp_path / "a.tar",
        ("x.kv", bytes(flipped)),
        ("x.kv", good[:-1]),
        ("x.kv", good + b"\0"),
        ("x.kv", b""),
        ("x.kv", b"TLEXTENT" + b"\xff" * 5000),
        ("x.kv", bytes(image)),
        ("notes.txt", b"hello"),
        ("../../../escape.kv", good),
    )
    imported = take(archive, tmp_path / "to")
    assert (imported.num_bad, imported.num_extents) == (7, 1)
    assert [path.stem for path in extent_files(tmp_path / "to")] == [header.extent_id], "its own name counts"
    with open_store(tmp_path / "to") as store:
        assert read(store, OTHER)[0] == 4


def test_an_archive_that_is_cut_short_gives_what_it_has(tmp_path: Path) -> None:
    export(stored(tmp_path / "from", OTHER), tmp_path / "a.tar")
    content = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(content[: 2 * (IMAGE_BYTES + 512) + 700])
    with pytest.raises(ArchiveError, match="no whole tar archive"):
        take(tmp_path / "a.tar", tmp_path / "to")
    with open_store(tmp_path / "to") as store:
        assert read(store, OTHER)[0] == 8


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"hello" * 500)
    with pytest.raises(ArchiveError, match="no whole tar archive"):
        take(tmp_path / "a.tar", tmp_path / "to")
    with pytest.raises(ArchiveError, match="No such file"):
        take(tmp_path / "b.tar", tmp_path / "to")
