"""The image of an extent: round trip, layout, and every damaged byte is noticed."""

import struct
from dataclasses import replace

import msgpack
import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from cache.errors import ExtentCorrupt
from cache.extent import (
    ALIGNMENT,
    FORMAT_VERSION,
    ExtentHeader,
    Image,
    KVShape,
    Origin,
    aligned_empty,
    allocate_image,
    chain_header,
    front_bytes,
    parse_header,
    seal,
    slice_header,
    split_into_extents,
    verify_image,
)
from cache.hashing import HASH_BYTES, BlockHash, as_token_ids, block_hash, chain_hashes
from tests.cache.chains import BLOCK_BYTES, ROOT, SHAPE, header_of, kv_of, sealed_image

SHAPES = st.builds(
    KVShape,
    num_layers=st.integers(1, 3),
    num_kv_heads=st.integers(1, 2),
    head_dim=st.sampled_from([1, 4, 8]),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
)


def make_header(num_tokens: int, block_size: int, shape: KVShape) -> ExtentHeader:
    """Full blocks only, or one tail when there are fewer tokens than a block has."""
    ids = as_token_ids(range(num_tokens))
    hashes = chain_hashes(ROOT, ids, block_size) or [block_hash(ROOT, ids)]
    kept = ids if num_tokens < block_size else ids[: len(hashes) * block_size]
    return ExtentHeader.make(ROOT, ROOT, hashes, kept, block_size, shape)


def random_image(header: ExtentHeader) -> Image:
    image = allocate_image(header)
    image[header.payload_offset :] = np.random.default_rng(1).integers(0, 256, header.payload_bytes, np.uint8)
    seal(header, image)
    return image


@given(st.integers(1, 40), st.sampled_from([1, 4, 16]), SHAPES)
def test_what_was_sealed_is_read_back(num_tokens: int, block_size: int, shape: KVShape) -> None:
    header = make_header(num_tokens, block_size, shape)
    image = random_image(header)
    sealed = parse_header(image)
    back = sealed.header
    assert back == header
    assert back.token_ids.tolist() == list(range(header.num_tokens))
    assert back.extent_id == header.extent_id
    assert back.image_bytes == header.image_bytes == len(image)
    assert parse_header(image.tobytes()[: header.payload_offset]).checksums == sealed.checksums
    verify_image(header.extent_id, image)


@given(st.integers(1, 40), st.sampled_from([1, 4, 16]), SHAPES)
def test_blocks_tile_the_payload_without_gaps(num_tokens: int, block_size: int, shape: KVShape) -> None:
    header = make_header(num_tokens, block_size, shape)
    at = header.payload_offset
    for index in range(header.num_blocks):
        begin, end = header.block_range(index)
        assert begin == at
        assert end - begin == len(header.block_token_ids(index)) * shape.bytes_per_token
        at = end
    assert at == header.image_bytes
    assert header.payload_offset % ALIGNMENT == 0


@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_bytes_per_token(dtype: str, itemsize: int) -> None:
    assert KVShape(30, 3, 64, dtype).bytes_per_token == 30 * 2 * 3 * 64 * itemsize


def test_a_tail_is_one_block_with_fewer_tokens() -> None:
    tail = header_of([1, 2, 3, 4, 5, 6], first=1)
    assert (tail.is_tail, tail.num_blocks, tail.num_tokens) == (True, 1, 2)
    assert parse_header(sealed_image(tail)).header.is_tail
    assert not header_of([1, 2, 3, 4]).is_tail


@given(st.text(max_size=3000), st.text(max_size=3000), st.integers(0, 2**40))
def test_who_stored_it_and_where_it_lies_come_back_too(tenant: str, session: str, first_block: int) -> None:
    header = replace(header_of(range(8)), origin=Origin(tenant, session), first_block=first_block)
    image = random_image(header)
    assert parse_header(image).header == header
    verify_image(header.extent_id, image)
    assert header.extent_id == header_of(range(8)).extent_id, "the content alone names it"


def test_a_block_is_found_by_its_hash_alone() -> None:
    header = header_of(range(12))
    assert [header.find_block(each) for each in header.block_hashes] == [0, 1, 2]
    assert header.find_block(ROOT) is None
    shifted = header.packed_hashes[1 : 1 + HASH_BYTES]
    assert header.find_block(BlockHash(shifted)) is None, "hashes start at multiples of their length"


def test_a_header_larger_than_a_page_moves_the_payload_to_a_later_page() -> None:
    header = make_header(4000, 4, KVShape(1, 1, 1, "bfloat16"))
    assert header.payload_offset > 4 * ALIGNMENT
    assert header.payload_offset % ALIGNMENT == 0
    image = random_image(header)
    assert ALIGNMENT < front_bytes(image[:ALIGNMENT].tobytes()) <= header.payload_offset
    verify_image(header.extent_id, image)


@given(st.data())
def test_any_flipped_bit_of_the_header_is_noticed(data: st.DataObject) -> None:
    header = header_of(range(12))
    image = sealed_image(header)
    at = data.draw(st.integers(0, front_bytes(image.tobytes()) - 1))
    image[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(ExtentCorrupt):
        parse_header(image)


@given(st.data())
def test_any_flipped_bit_of_a_block_is_noticed_in_that_block(data: st.DataObject) -> None:
    header = header_of(range(12))
    image = sealed_image(header)
    at = data.draw(st.integers(header.payload_offset, len(image) - 1))
    image[at] ^= 1 << data.draw(st.integers(0, 7))
    sealed = parse_header(image)
    for index in range(header.num_blocks):
        begin, end = header.block_range(index)
        if begin <= at < end:
            with pytest.raises(ExtentCorrupt, match=f"checksum of block {index} does not match"):
                sealed.verify_block(index, image[begin:end])
        else:
            sealed.verify_block(index, image[begin:end])
    with pytest.raises(ExtentCorrupt):
        verify_image(header.extent_id, image)


@pytest.mark.parametrize("length", [0, 1, 23, 24, 100])
def test_a_header_cut_short_is_noticed(length: int) -> None:
    with pytest.raises(ExtentCorrupt):
        parse_header(sealed_image(header_of(range(4)))[:length])


def test_the_wrong_extent_or_the_wrong_length_is_no_whole_image() -> None:
    header, other = header_of(range(8)), header_of(range(4))
    image = sealed_image(header)
    with pytest.raises(ExtentCorrupt, match="are not extent"):
        verify_image(other.extent_id, image)
    with pytest.raises(ExtentCorrupt, match="are not extent"):
        verify_image(header.extent_id, image[:-1])


def test_a_newer_format_is_refused_by_name() -> None:
    image = sealed_image(header_of(range(4)))
    image[8] = 9
    with pytest.raises(ExtentCorrupt, match="format version 9, this program reads version 2"):
        parse_header(image)


def forged(**changes: object) -> bytes:
    """A header whose checksum is right and whose content is not."""
    image = sealed_image(header_of(range(8)))
    raw = msgpack.unpackb(image[24 : front_bytes(image.tobytes())].tobytes())
    packed: bytes = msgpack.packb(raw | changes)
    return struct.pack("<8sIIQ", b"TLEXTENT", FORMAT_VERSION, len(packed), xxhash.xxh3_64_intdigest(packed)) + packed


@pytest.mark.parametrize(
    "changes",
    [
        {"checksums": bytes(8)},
        {"checksums": bytes(7)},
        {"hashes": bytes(HASH_BYTES)},
        {"hashes": b"", "checksums": b""},
        {"hashes": bytes(5)},
        {"tokens": bytes(4 * 7)},
        {"tokens": bytes(3)},
        {"block_size": 0},
        {"block_size": -4},
        {"block_size": 8},
        {"root": b"short"},
        {"parent": b""},
        {"shape": [1, 2]},
        {"shape": None},
        {"dtype": "float12"},
        {"first_block": -1},
        {"first_block": None},
        {"block_size": None},
        {"origin": [1, 2]},
    ],
)
def test_a_header_that_contradicts_itself_is_refused(changes: dict[str, object]) -> None:
    parse_header(forged())
    with pytest.raises(ExtentCorrupt):
        parse_header(forged(**changes))


def test_the_id_names_the_content() -> None:
    headers = [header_of(range(4)), header_of(range(8)), header_of(range(8), first=1), header_of([1, 2, 3])]
    headers.append(header_of(range(4), root=BlockHash(bytes(HASH_BYTES))))
    assert len({header.extent_id for header in headers}) == len(headers)
    assert header_of(range(4)).extent_id == header_of(list(range(4))).extent_id


@given(st.integers(1, 30), st.integers(1, 6 * BLOCK_BYTES))
def test_splitting_keeps_the_chain_and_the_limit(num_blocks: int, max_bytes: int) -> None:
    run = header_of(range(num_blocks * 4))
    parts = split_into_extents(run, max_bytes)
    assert [h for part in parts for h in part.block_hashes] == list(run.block_hashes)
    assert np.array_equal(np.concatenate([part.token_ids for part in parts]), run.token_ids)
    parents = [run.parent_hash] + [part.block_hashes[-1] for part in parts]
    assert [part.parent_hash for part in parts] == parents[:-1]
    assert all(part.payload_bytes <= max(max_bytes, BLOCK_BYTES) for part in parts)


def test_a_header_of_the_middle_of_a_chain() -> None:
    ids = as_token_ids(range(16))
    hashes = chain_hashes(ROOT, ids, 4)
    middle = chain_header(ROOT, hashes, ids, 1, 3, 4, SHAPE)
    assert middle.parent_hash == hashes[0]
    assert middle.token_ids.tolist() == list(range(4, 12))
    assert middle.first_block == 1
    assert slice_header(header_of(range(16)), 1, 3) == middle
    assert slice_header(slice_header(header_of(range(16)), 1, 4), 0, 2) == middle
    begin, end = middle.block_range(1)
    assert np.array_equal(sealed_image(middle)[begin:end], kv_of(hashes[1], ids[8:12]))


@pytest.mark.parametrize("num_bytes", [1, ALIGNMENT, ALIGNMENT + 1])
def test_images_start_on_a_page(num_bytes: int) -> None:
    image = aligned_empty(num_bytes)
    assert len(image) == num_bytes
    assert image.ctypes.data % ALIGNMENT == 0
