"""The disk tier with a vault: what lies in the folder, what is noticed, and what comes back when it is opened again."""

import errno
import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from cache.client import WarehouseClient
from cache.errors import ExtentCorrupt, FolderError
from cache.events import Tier
from cache.extent import Image, verify_image
from cache.tiers.disk import FileTier
from cache.tiers.files import Files
from cache.tiers.index_db import IndexDamaged, IndexDb, read_totals
from tests.cache.chains import header_of, query, sealed_image, store_config
from tests.cache.encrypted import (
    ANNA,
    KEY,
    OTHER_KEY,
    all_bytes,
    key_of_folder,
    name_of,
    open_with,
    read,
    stored,
    vault,
)
from tests.cache.stores import OTHER, TOKENS, counter, damage, extent_files, wait_until
from tests.cache.tiers.folders import A, B, C, files, ids, write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "w"


def open_tier(folder: Path, key: bytes | None = KEY, said: list[str] | None = None) -> FileTier:
    report = said.append if said is not None else lambda message: None
    opened = vault(key) if key is not None else None
    return FileTier(folder, fsync=False, lock_wait_s=0.0, report=report, vault=opened)


def crash(tier: FileTier) -> None:
    tier._db._db.close()
    tier._folder.close()


# -- what lies there ----------------------------------------------------------------------------------------


def _secrets() -> dict[str, bytes]:
    """What may be nowhere in the folder: KV, token ids in any of our forms, hashes, sessions, content addresses."""
    found = {"session": ANNA.session.encode()}
    for header in (header_of(TOKENS[:4]), header_of(TOKENS[:8], first=1), header_of(TOKENS, first=7)):
        begin, end = header.block_range(0)
        found[f"kv {header.first_block}"] = sealed_image(header)[begin:end].tobytes()[:16]
        found[f"tokens {header.first_block}"] = header.packed_tokens[:8]
        found[f"little-endian {header.first_block}"] = header.token_ids.tobytes()[:8]
        found[f"hash {header.first_block}"] = header.packed_hashes
        found[f"address {header.first_block}"] = header.extent_id.encode()
        found[f"binary address {header.first_block}"] = bytes.fromhex(header.extent_id)
    return found


@pytest.mark.parametrize("moment", ["open", "closed", "after a purge"])
def test_nothing_private_is_in_any_file(folder: Path, moment: str) -> None:
    with open_with(stored(folder)) as store:
        assert read(store, TOKENS)[0] == len(TOKENS)
        if moment == "closed":
            store.close()
        if moment == "after a purge":
            damage(folder, name_of(header_of(OTHER[:4]).extent_id))
            assert read(store, OTHER)[0] == 0, "a file in quarantine is looked into too"
        content = all_bytes(folder)
    assert len(content) >= 13
    for path, text in content.items():
        for what, secret in _secrets().items():
            assert secret not in text, f"{what} can be read in {path}"
            assert what[:7] != "address" or secret.decode() not in path


def test_the_same_search_finds_everything_where_nothing_is_encrypted(folder: Path) -> None:
    """Else the test above would prove nothing."""
    together = b"".join(text + path.encode() for path, text in all_bytes(stored(folder, key=None)).items())
    hidden = {what for what, secret in _secrets().items() if secret not in together}
    assert {what.rsplit(" ", 1)[0] for what in hidden} == {"little-endian", "binary address"}


def test_files_are_as_large_as_plain_ones(folder: Path) -> None:
    tier = open_tier(folder)
    write(tier, A, B)
    assert [path.stat().st_size for path in files(folder)] == [A.image_bytes] * 2
    assert {path.stem for path in files(folder)} == {name_of(each) for each in ids(A, B)}
    assert np.array_equal(tier.read(A.extent_id), sealed_image(A))
    tier.close()
    assert read_totals(folder / "index.sqlite").num_tokens == A.num_tokens + B.num_tokens


def test_each_write_of_the_same_extent_is_another_file(folder: Path) -> None:
    tier = open_tier(folder)
    seen: set[bytes] = set()
    for _ in range(3):
        write(tier, A)
        seen.add(files(folder)[0].read_bytes()[A.payload_offset :])
        tier.delete(A.extent_id)
    tier.close()
    assert len(seen) == 3


# -- opening again --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["closed", "killed", "index gone", "index damaged"])
def test_what_was_written_comes_back(folder: Path, how: str) -> None:
    tier = open_tier(folder)
    write(tier, A, B, C)
    tier.save_order(ids(B, C, A))
    if how == "closed":
        tier.close()
    else:
        crash(tier)
    if how == "index gone":
        IndexDb.remove(folder / "index.sqlite")
    if how == "index damaged":
        (folder / "index.sqlite").write_bytes(b"no database" * 500)
    tier = open_tier(folder)
    recovered = tier.recover()
    assert sorted(ids(*recovered)) == sorted(ids(A, B, C))
    assert how.startswith("index") or ids(*recovered) == ids(B, C, A)
    assert {header.packed_tokens for header in recovered} == {each.packed_tokens for each in (A, B, C)}
    for header in recovered:
        verify_image(header.extent_id, tier.read(header.extent_id))
    assert tier.recover_locked() == []
    tier.close()


def test_a_rebuild_without_the_key_loses_nothing(folder: Path) -> None:
    stored(folder)
    IndexDb.remove(folder / "index.sqlite")
    said: list[str] = []
    tier = open_tier(folder, None, said)
    assert tier.recover() == []
    locked = tier.recover_locked()
    assert {each.tenant: each.num_blocks for each in locked} == {ANNA.tenant: 1, "bert-label": 1}
    assert (len(locked), sum(each.num_tokens for each in locked)) == (11, 42)
    assert [line for line in said if "encrypted" in line] == [
        f"11 extents in {folder} are encrypted, and their key is not given: they are left alone until their room is "
        "needed"
    ]
    tier.close()
    with open_with(folder) as store:
        assert (read(store, TOKENS)[0], read(store, OTHER)[0]) == (len(TOKENS), len(OTHER))


def test_another_key_is_refused_by_name(folder: Path) -> None:
    stored(folder)
    key_ids = vault().key_id, vault(OTHER_KEY).key_id
    assert key_of_folder(folder) == key_ids[0]
    with pytest.raises(FolderError, match=f"{folder} is encrypted with another key, {key_ids[0]}.*is {key_ids[1]}"):
        open_tier(folder, OTHER_KEY)
    with open_with(folder) as store:
        assert read(store, TOKENS)[0] == len(TOKENS), "and nothing has happened to it"


def test_without_encryption_the_folder_says_nothing_of_a_key(folder: Path) -> None:
    open_tier(folder, None).close()
    assert (folder / "format.json").read_bytes() == b'{"format": 2}'
    open_tier(folder).close()
    assert key_of_folder(folder) == vault().key_id
    open_tier(folder, None).close()
    assert key_of_folder(folder) == vault().key_id, "who comes without a key does not unlearn it"


# -- damage -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [30, 200, -1, -64])
def test_a_flipped_bit_is_a_miss_and_the_file_is_set_aside(folder: Path, at: int) -> None:
    name = name_of(header_of(TOKENS[:4]).extent_id)
    damage(stored(folder), name, at)
    with open_with(folder) as store:
        assert (read(store, TOKENS)[0], read(store, OTHER)[0]) == (0, len(OTHER))
        store.flush()
        assert counter(store, "quarantined_extents") == 1
    assert [path.stem for path in (folder / "quarantine").iterdir()] == [name]


def test_the_scrubber_looks_inside(folder: Path) -> None:
    damage(stored(folder), name_of(header_of(TOKENS[:8], first=1).extent_id))
    with open_with(folder, config=store_config(scrub_bytes_per_s=1e12)) as store:
        wait_until(lambda: counter(store, "quarantined_extents") == 1 and counter(store, "scrub_rounds") == 1)
        assert counter(store, "scrubbed_extents") == 10
        assert (read(store, TOKENS)[0], read(store, OTHER)[0]) == (4, len(OTHER))


def test_what_is_read_twice_comes_into_dram_in_plain(folder: Path) -> None:
    with open_with(stored(folder)) as store:
        for _ in range(2):
            assert read(store, OTHER) == (len(OTHER), {Tier.DISK})
        wait_until(lambda: counter(store, "promoted_extents") == 3)
        assert read(store, OTHER, key=None) == (len(OTHER), {Tier.DRAM}), "memory needs no key"


def test_blocks_can_be_read_from_the_last_to_the_first(folder: Path) -> None:
    with open_with(stored(folder)) as store:
        client, asked = WarehouseClient(store, vault=vault()), query(TOKENS)
        seen = [(block.index, block.payload.tobytes()) for block in client.read(asked, client.lookup(asked))]
        turned = client.read(asked, client.lookup(asked), backwards=True)
        assert [(block.index, block.payload.tobytes()) for block in turned] == seen[::-1]
        assert len(seen) == 8


def test_files_in_each_others_place_are_noticed(folder: Path) -> None:
    stored(folder)
    first, second = (name_of(header.extent_id) for header in (header_of(TOKENS[:4]), header_of(OTHER[:4])))
    paths = {path.stem: path for path in extent_files(folder)}
    shutil.copy(paths[first], folder / "aside")
    shutil.copy(paths[second], paths[first])
    shutil.copy(folder / "aside", paths[second])
    (folder / "aside").unlink()
    with open_with(folder) as store:
        assert (read(store, TOKENS)[0], read(store, OTHER)[0]) == (0, 0)


def test_an_older_copy_of_a_file_is_not_wrong(folder: Path) -> None:
    """Whoever can write to the folder can bring back what was there: the same KV, of the same tokens."""
    tier = open_tier(folder)
    write(tier, A)
    old = files(folder)[0].read_bytes()
    tier.delete(A.extent_id)
    write(tier, A)
    files(folder)[0].write_bytes(old)
    assert np.array_equal(tier.read(A.extent_id), sealed_image(A))
    tier.close()


def test_a_plain_file_under_a_name_of_the_vault_is_no_extent(folder: Path) -> None:
    tier = open_tier(folder)
    write(tier, A)
    files(folder)[0].write_bytes(sealed_image(B).tobytes())
    with pytest.raises(ExtentCorrupt):
        verify_image(A.extent_id, tier.read(A.extent_id))
    tier.close()


def test_an_image_that_is_bad_in_memory_is_not_written(folder: Path) -> None:
    tier = open_tier(folder)
    image: Image = sealed_image(A)
    image[-1] ^= 1
    with pytest.raises(ExtentCorrupt):
        tier.write(A, image)
    write(tier, B)
    tier.close()
    tier = open_tier(folder)
    assert ids(*tier.recover()) == ids(B)
    tier.close()


@pytest.mark.parametrize(
    "change",
    [
        "private = zeroblob(60)",
        "private = NULL",
        "tenant = 'other'",
        "num_blocks = 7",
        "image_bytes = 'x'",
        "root_hash = x'00'",
        "extent_id = 'ab' || extent_id",
    ],
)
def test_a_row_that_was_changed_is_rebuilt_from_its_file(folder: Path, change: str) -> None:
    stored(folder)
    with closing(sqlite3.connect(folder / "index.sqlite")) as db, db:
        db.execute(f"UPDATE extents SET {change} WHERE number = 3")
    with open_with(folder) as store:
        assert store.stats().num_extents == 11
        assert (read(store, TOKENS)[0], read(store, OTHER)[0]) == (len(TOKENS), len(OTHER))


def test_rows_without_a_key_are_looked_at_too(folder: Path) -> None:
    stored(folder)
    for change in ("image_bytes = -5", "num_blocks = 0", "tenant = x'00'", "root_hash = x'00'", "key_id = ''"):
        with closing(sqlite3.connect(folder / "index.sqlite")) as raw, raw:
            raw.execute(f"UPDATE extents SET {change} WHERE number = 3")
        with closing(IndexDb(folder / "index.sqlite")) as db, pytest.raises(IndexDamaged, match="a value is of"):
            db.locked_extents()
        with open_with(folder, None) as store:
            assert store.stats().num_locked_extents == 11


# -- plain and encrypted together -----------------------------------------------------------------------------------


def test_what_was_plain_before_is_read_and_stays_plain(folder: Path) -> None:
    stored(folder, key=None)
    plain = {path.name for path in extent_files(folder)}
    for _ in range(2):
        with open_with(folder) as store:
            assert (read(store, TOKENS)[0], read(store, OTHER)[0]) == (len(TOKENS), len(OTHER))
            assert store.stats().num_locked_extents == 0
    assert {path.name for path in extent_files(folder)} == plain


def test_new_extents_beside_plain_ones_are_encrypted(folder: Path) -> None:
    tier = open_tier(folder, None)
    write(tier, A)
    tier.close()
    tier = open_tier(folder)
    write(tier, B)
    assert {path.stem for path in files(folder)} == {A.extent_id, name_of(B.extent_id)}
    assert ids(*tier.recover()) == ids(A)
    for header in (A, B):
        verify_image(header.extent_id, tier.read(header.extent_id))
    tier.delete(A.extent_id)
    assert {path.stem for path in files(folder)} == {name_of(B.extent_id)}
    tier.close()


@pytest.mark.parametrize("how", ["at once", "after a crash"])
def test_an_encrypted_copy_takes_the_place_of_the_plain_one(folder: Path, how: str) -> None:
    tier = open_tier(folder, None)
    write(tier, A, B)
    tier.close()
    plain = {path.stem: path.read_bytes() for path in files(folder)}
    tier = open_tier(folder)
    write(tier, A)
    assert tier.path(A.extent_id).endswith(f"{name_of(A.extent_id)}.kv")
    tier.close()
    if how == "after a crash":
        with closing(IndexDb(folder / "index.sqlite")) as db:
            db.add_complete([A])
        path = folder / "extents" / A.extent_id[:2] / A.extent_id[2:4] / f"{A.extent_id}.kv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(plain[A.extent_id])
    tier = open_tier(folder)
    assert sorted(ids(*tier.recover())) == sorted(ids(A, B))
    assert {path.stem for path in files(folder)} == {name_of(A.extent_id), B.extent_id}
    tier.close()


class FailingOnce(Files):
    """Every step counts, and one of them fails."""

    def __init__(self, fail_at: int) -> None:
        self.num_left = fail_at

    def _step(self) -> None:
        self.num_left -= 1
        if self.num_left == -1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def write(self, path: Path, content: bytes | memoryview) -> None:
        self._step()
        super().write(path, content)

    def sync(self, path: Path) -> None:
        self._step()
        super().sync(path)

    def rename(self, source: Path, target: Path) -> None:
        self._step()
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        self._step()
        super().unlink(path)


@pytest.mark.parametrize("is_killed", [False, True], ids=["error", "kill"])
def test_at_whatever_step_it_stops_one_whole_copy_is_found(tmp_path: Path, is_killed: bool) -> None:
    """A plain extent is being replaced by its encrypted copy, beside a new one."""
    num_failures = 0
    for fail_at in range(100):
        folder = tmp_path / str(fail_at)
        tier = open_tier(folder, None)
        write(tier, A)
        tier.close()
        tier = FileTier(folder, vault=vault())
        tier._files = failing = FailingOnce(fail_at)
        committed: list[str] = []
        try:
            for header in (A, B):
                tier.write(header, sealed_image(header))
            committed = tier.commit()
        except OSError:
            num_failures += 1
            if not is_killed:
                tier.abandon()
        if is_killed:
            crash(tier)
        else:
            tier.close()
        tier = open_tier(folder)
        found = ids(*tier.recover())
        assert set(committed) | {A.extent_id} <= set(found) <= set(ids(A, B))
        for extent_id in found:
            verify_image(extent_id, tier.read(extent_id))
        assert len(files(folder)) == len(found)
        tier.close()
        if failing.num_left >= 0:
            assert num_failures > 5
            return
    raise AssertionError("there is no end of steps")


def test_a_bad_plain_file_is_set_aside_under_its_own_name(folder: Path) -> None:
    tier = open_tier(folder, None)
    write(tier, A)
    tier.close()
    tier = open_tier(folder)
    tier.quarantine(A.extent_id)
    write(tier, A)
    assert {path.stem for path in (folder / "quarantine").iterdir()} == {A.extent_id}
    assert {path.stem for path in files(folder)} == {name_of(A.extent_id)}
    tier.close()


def test_a_stranger_between_them_is_left_alone(folder: Path, tmp_path: Path) -> None:
    """A file that another key has encrypted takes room, and nothing else."""
    other = open_tier(tmp_path / "other", OTHER_KEY)
    write(other, A)
    other.close()
    tier = open_tier(folder)
    write(tier, B)
    crash(tier)
    (stranger,) = files(tmp_path / "other")
    target = folder / stranger.relative_to(tmp_path / "other")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(stranger, target)
    tier = open_tier(folder)
    assert ids(*tier.recover()) == ids(B)
    (locked,) = tier.recover_locked()
    assert (locked.name, locked.key_id) == (stranger.stem, vault(OTHER_KEY).key_id)
    assert tier.holds(locked.name)
    tier.delete(locked.name)
    assert {path.stem for path in files(folder)} == {name_of(B.extent_id)}
    tier.close()
