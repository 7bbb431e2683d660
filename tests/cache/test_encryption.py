"""Keys and ciphers: what a vault makes of an extent, what opens it, and what a key file must be."""

import pickle
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.encryption import KEY_BYTES, NONCE_BYTES, Vault, decrypt_image, open_front, open_vault, read_key_file
from cache.errors import ExtentCorrupt, ExtentLocked, KeyFileError
from cache.extent import ExtentHeader, Image, KVShape, Origin, allocate_image, front_bytes, parse_header, seal
from cache.hashing import as_token_ids, block_hash, chain_hashes
from cache.locked import LockedExtent, parse_locked
from tests.cache.chains import ROOT, header_of, root_of, sealed_image
from tests.cache.encrypted import KEY, OTHER_KEY, vault

HEADER = header_of(range(100, 112))
"""Three blocks."""


def encrypted(header: ExtentHeader = HEADER, key: bytes = KEY) -> Image:
    target = allocate_image(header)
    vault(key).encrypt(header, sealed_image(header), target)
    return target


def front(image: Image) -> bytes:
    return image[: front_bytes(image[:4096].tobytes())].tobytes()


def opened(image: Image, key: bytes = KEY) -> Image:
    return decrypt_image(open_front(front(image), vault(key)), image)


def kv(index: int) -> Image:
    begin, end = HEADER.block_range(index)
    return sealed_image(HEADER)[begin:end]


# -- what comes out --------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", [HEADER, header_of([1, 2, 3, 4, 5, 6], first=1)], ids=["blocks", "tail"])
def test_what_was_encrypted_comes_back_to_the_bit(header: ExtentHeader) -> None:
    header = replace(header, origin=Origin("tenant", "sitzung ü"))
    assert np.array_equal(opened(encrypted(header)), sealed_image(header))
    assert open_front(front(encrypted(header)), vault()).header == header


def test_the_index_keeps_what_the_file_says() -> None:
    locked = vault().lock(HEADER)
    assert vault().unlock(locked) == HEADER
    in_file = parse_locked(front(encrypted())).extent
    assert replace(in_file, private=b"") == replace(locked, private=b"")
    assert (locked.num_blocks, locked.num_tokens, locked.image_bytes) == (3, 12, HEADER.image_bytes)


def test_a_plain_front_needs_no_key() -> None:
    assert open_front(front(sealed_image(HEADER)), None).header == HEADER


@settings(max_examples=60, deadline=None)
@given(
    num_blocks=st.integers(1, 400),
    block_size=st.sampled_from([1, 4, 32]),
    tenant=st.text(max_size=40),
    session=st.text(max_size=300),
)
def test_any_header_finds_room_before_the_payload(num_blocks: int, block_size: int, tenant: str, session: str) -> None:
    ids = as_token_ids([1 << 30] * (num_blocks * block_size))
    shape = KVShape(1 << 20, 1, 1, "float8_e4m3fn") if num_blocks * block_size < 4 else KVShape(1, 1, 1, "int8")
    hashes = chain_hashes(ROOT, ids, block_size)
    header = ExtentHeader.make(ROOT, ROOT, hashes, ids, block_size, shape, 1 << 40, Origin(tenant, session))
    image = allocate_image(header)
    image[:] = 0
    seal(header, image)
    assert np.array_equal(opened(_encrypt(header, image)), image)


def _encrypt(header: ExtentHeader, image: Image) -> Image:
    target = allocate_image(header)
    vault().encrypt(header, image, target)
    return target


# -- what does not open -----------------------------------------------------------------------------------


def test_no_key_and_another_one_open_nothing_and_blame_nothing() -> None:
    with pytest.raises(ExtentLocked, match="there is no key"):
        open_front(front(encrypted()), None)
    with pytest.raises(ExtentLocked, match="another key"):
        open_front(front(encrypted()), vault(OTHER_KEY))


def test_the_key_of_one_tenant_does_not_open_another_ones() -> None:
    """Each root hash has its own keys: what is moved under another one does not open."""
    locked = vault().lock(HEADER)
    with pytest.raises(ExtentCorrupt, match="not what was encrypted"):
        vault().unlock(replace(locked, root_hash=root_of(tenant_salt="another")))


@pytest.mark.parametrize(
    "forge",
    [
        lambda locked: replace(locked, name="00" * 16),
        lambda locked: replace(locked, tenant="another"),
        lambda locked: replace(locked, num_blocks=2),
        lambda locked: replace(locked, num_tokens=11),
        lambda locked: replace(locked, image_bytes=4096),
        lambda locked: replace(locked, private=locked.private[:-1]),
        lambda locked: replace(locked, private=locked.private[:5]),
        lambda locked: replace(locked, private=b""),
    ],
)
def test_what_is_in_plain_cannot_be_exchanged_either(forge: Callable[[LockedExtent], LockedExtent]) -> None:
    with pytest.raises(ExtentCorrupt, match="not what was encrypted"):
        vault().unlock(forge(vault().lock(HEADER)))


def test_every_flipped_bit_of_payload_and_header_is_noticed() -> None:
    rng, image = random.Random(3), encrypted()
    size, start = len(front(image)), HEADER.payload_offset
    places = [*range(size), *rng.sample(range(start, len(image)), 200)]
    for at in places:
        bad = image.copy()
        bad[at] ^= 1 << rng.randrange(8)
        with pytest.raises(ExtentCorrupt):
            opened(bad)


def test_blocks_in_each_others_place_do_not_open() -> None:
    image = encrypted()
    (a, b), (c, d) = HEADER.block_range(0), HEADER.block_range(1)
    swapped = image.copy()
    swapped[a:b], swapped[c:d] = image[c:d], image[a:b]
    with pytest.raises(ExtentCorrupt, match="block 0 is not what was encrypted there"):
        opened(swapped)


def test_a_block_and_its_tag_do_not_open_in_another_file() -> None:
    """Also not in a second copy of the same extent: each file as it was written has a key of its own."""
    begin, end = HEADER.block_range(0)
    one, two = encrypted(), encrypted()
    room = np.empty(end - begin, np.uint8)
    assert np.array_equal(open_front(front(one), vault()).plain_block(0, one[begin:end], room), kv(0))
    with pytest.raises(ExtentCorrupt, match="block 0 is not"):
        open_front(front(one), vault()).plain_block(0, two[begin:end], room)
    with pytest.raises(ExtentCorrupt):
        opened(np.concatenate((one[: HEADER.payload_offset], two[HEADER.payload_offset :])))


def test_a_damaged_image_is_not_given_a_tag() -> None:
    image = sealed_image(HEADER)
    image[-1] ^= 1
    with pytest.raises(ExtentCorrupt, match="checksum of block 2"):
        vault().encrypt(HEADER, image, allocate_image(HEADER))


# -- nonces, names, secrets ----------------------------------------------------------------------------------


def test_nothing_random_is_used_twice() -> None:
    """The same extent, again and again: another salt, so another key, for each; another nonce for each header."""
    fronts = [parse_locked(front(encrypted())) for _ in range(50)]
    assert len({each.salt for each in fronts}) == 50
    assert len({each.extent.private[:NONCE_BYTES] for each in fronts}) == 50
    assert len({tag for each in fronts for tag in _split(each.tags)}) == 150
    begin, end = HEADER.block_range(0)
    assert len({encrypted()[begin:end].tobytes() for _ in range(10)}) == 10


def _split(tags: bytes) -> list[bytes]:
    return [tags[at : at + 16] for at in range(0, len(tags), 16)]


def test_random_bytes_are_asked_for_each_time() -> None:
    asked: list[int] = []

    def random_bytes(num_bytes: int) -> bytes:
        asked.append(num_bytes)
        return bytes([len(asked)]) * num_bytes

    here = Vault(KEY, random_bytes)
    for _ in range(3):
        here.encrypt(HEADER, sealed_image(HEADER), allocate_image(HEADER))
    assert asked == [32, NONCE_BYTES] * 3


def test_a_name_tells_nothing_of_a_guess() -> None:
    """Without the key nobody can check whether a file holds what he thinks of: not its name, and not its header."""
    tail = header_of([1, 2, 3, 4, 5], first=1)
    image = encrypted(tail).tobytes()
    guess = block_hash(tail.parent_hash, as_token_ids([5]))
    assert guess == tail.block_hash(0)
    for known in (guess, tail.parent_hash, bytes.fromhex(tail.extent_id), tail.extent_id.encode()):
        assert known not in image
    assert vault().name_of(tail.extent_id) == vault().name_of(tail.extent_id)
    names = {tail.extent_id, vault().name_of(tail.extent_id), vault(OTHER_KEY).name_of(tail.extent_id)}
    assert [len(name) for name in names] == [32] * 3


def test_the_secret_stays_where_it_is() -> None:
    here = vault()
    with pytest.raises(TypeError, match="pass the path of its key file"):
        pickle.dumps(here)
    sealed = open_front(front(encrypted()), here)
    for text in (repr(here), repr(sealed), str(vars(here)["key_id"])):
        assert KEY.hex() not in text and repr(KEY)[2:-1] not in text
    assert here.key_id == vault().key_id != vault(OTHER_KEY).key_id
    with pytest.raises(ValueError, match="32 bytes, not 31"):
        Vault(KEY[1:])


def test_a_locked_front_that_is_none_is_corrupt() -> None:
    with pytest.raises(ExtentCorrupt, match="magic is b'TLEXTENT', not b'TLLOCKED'"):
        parse_locked(front(sealed_image(HEADER)))
    with pytest.raises(ExtentCorrupt, match="magic is b'TLLOCKED', not b'TLEXTENT'"):
        parse_header(front(encrypted()))
    good = vault().lock(HEADER)
    values = [good.name, good.key_id, good.root_hash, good.tenant, 3, 12, good.image_bytes, b""]
    assert LockedExtent.checked(values) == replace(good, private=b"")
    for at, bad in ((0, ""), (0, 5), (2, b"short"), (2, "0" * 16), (3, None), (4, 0), (5, -1), (6, 1.5), (7, "x")):
        with pytest.raises(ValueError, match="a value is of"):
            LockedExtent.checked([*values[:at], bad, *values[at + 1 :]])


# -- the key file ----------------------------------------------------------------------------------------------


def key_file(path: Path, content: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(content)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("content", [KEY, KEY.hex().encode(), KEY.hex().upper().encode() + b"\n"])
@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_key_is_32_bytes_or_64_hex_digits(tmp_path: Path, content: bytes, mode: int) -> None:
    path = key_file(tmp_path / "key", content, mode)
    assert read_key_file(path) == KEY
    opened_vault = open_vault(path)
    assert opened_vault is not None and opened_vault.key_id == vault().key_id


@pytest.mark.parametrize(
    "content",
    [b"", KEY[:-1], KEY + b"\n", KEY.hex().encode()[:-1], KEY.hex().encode()[:32], b"z" * 64, KEY * 3, b"x" * 10_000],
)
def test_anything_else_is_no_key(tmp_path: Path, content: bytes) -> None:
    path = key_file(tmp_path / "key", content)
    with pytest.raises(KeyFileError, match=f"key file {path} should hold {KEY_BYTES} bytes or 64 hex digits"):
        read_key_file(path)


def test_a_key_file_is_its_owners_alone(tmp_path: Path) -> None:
    for mode in (0o640, 0o604, 0o660, 0o601):
        path = key_file(tmp_path / "key", KEY, mode)
        with pytest.raises(KeyFileError, match=rf"can be used by others \(mode 0{mode:o}\).*chmod 600 {path}"):
            read_key_file(path)


def test_a_key_file_must_be_a_file_and_be_there(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match=r"there is no key file .*openssl rand -hex 32 > "):
        read_key_file(tmp_path / "missing")
    (tmp_path / "folder").mkdir(mode=0o700)
    with pytest.raises(KeyFileError, match="can't be read: Is a directory"):
        read_key_file(tmp_path / "folder")
    assert open_vault(None) is None
