"""Codec of an extent: consecutive blocks of one hash chain as one self-describing byte image.

The same image is a Ray object in the dram tier and a file in the disk tier:

    0        8         12            16                24
    | magic  | version | header_size | header checksum | msgpack header | zeros to 4096 | payload |

    payload, block-major:  block 0 | block 1 | ...
    each block contiguous: (num_layers, 2, num_tokens, num_kv_heads, head_dim), K before V

All blocks are full, or the extent is a *tail*: exactly one block with fewer tokens. An image is sealed
once and never changed. Nothing in here is pickled.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import msgpack
import numpy as np
import numpy.typing as npt
import xxhash

from cache.errors import ExtentCorrupt
from cache.hashing import HASH_BYTES, BlockHash, TokenIds, as_token_ids, pack_hashes, unpack_hashes

Image = npt.NDArray[np.uint8]

MAGIC = b"TLEXTENT"
FORMAT_VERSION = 1
ALIGNMENT = 4096
_PREFIX = struct.Struct("<8sIIQ")
_CHECKSUM = np.dtype("<u8")


@dataclass(frozen=True, slots=True)
class KVShape:
    """Shape and dtype of one token's KV on one tensor-parallel rank."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    """`float32`, `float16` or `bfloat16`."""

    @property
    def bytes_per_token(self) -> int:
        itemsize = 4 if self.dtype == "float32" else 2
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * itemsize


@dataclass(frozen=True)
class ExtentHeader:
    """What an extent holds. `token_ids` are those of all its blocks, `(num_tokens,)`."""

    root_hash: BlockHash
    parent_hash: BlockHash
    block_hashes: tuple[BlockHash, ...]
    token_ids: TokenIds
    block_size: int
    shape: KVShape

    @property
    def num_blocks(self) -> int:
        return len(self.block_hashes)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def is_tail(self) -> bool:
        return self.num_tokens < self.block_size

    @cached_property
    def extent_id(self) -> str:
        """Content address: the chain names the content. Hex, also the file's name."""
        digest = xxhash.xxh3_128(self.root_hash + self.parent_hash + pack_hashes(self.block_hashes))
        return digest.hexdigest()

    @property
    def payload_bytes(self) -> int:
        return self.num_tokens * self.shape.bytes_per_token

    @cached_property
    def payload_offset(self) -> int:
        return -(-(_PREFIX.size + len(self._packed(b"\0" * 8 * self.num_blocks))) // ALIGNMENT) * ALIGNMENT

    @property
    def image_bytes(self) -> int:
        return self.payload_offset + self.payload_bytes

    def block_token_ids(self, index: int) -> TokenIds:
        return self.token_ids[index * self.block_size : (index + 1) * self.block_size]

    def block_range(self, index: int) -> tuple[int, int]:
        """Where block `index` lies in the image: `(offset, end)` in bytes."""
        offset = self.payload_offset + index * self.block_size * self.shape.bytes_per_token
        return offset, offset + len(self.block_token_ids(index)) * self.shape.bytes_per_token

    def _packed(self, checksums: bytes) -> bytes:
        shape = self.shape
        header = {
            "root": self.root_hash,
            "parent": self.parent_hash,
            "hashes": pack_hashes(self.block_hashes),
            "tokens": self.token_ids.tobytes(),
            "block_size": self.block_size,
            "shape": [shape.num_layers, shape.num_kv_heads, shape.head_dim],
            "dtype": shape.dtype,
            "checksums": checksums,
        }
        packed: bytes = msgpack.packb(header)
        return packed


def split_into_extents(header: ExtentHeader, max_bytes: int) -> list[ExtentHeader]:
    """Cut a run of full blocks into extents of at most `max_bytes` of payload, one block at least."""
    per_extent = max(1, max_bytes // (header.block_size * header.shape.bytes_per_token))
    parts: list[ExtentHeader] = []
    for first in range(0, header.num_blocks, per_extent):
        parts.append(slice_header(header, first, min(first + per_extent, header.num_blocks)))
    return parts


def slice_header(header: ExtentHeader, first: int, end: int) -> ExtentHeader:
    """The header of blocks `first..end` alone."""
    parent = header.parent_hash if first == 0 else header.block_hashes[first - 1]
    tokens = header.token_ids[first * header.block_size : end * header.block_size]
    return ExtentHeader(
        header.root_hash, parent, header.block_hashes[first:end], tokens, header.block_size, header.shape
    )


def allocate_image(header: ExtentHeader) -> Image:
    """An unsealed image of the right size, page-aligned: a read into memory at another offset is slow."""
    return aligned_empty(header.image_bytes)


def aligned_empty(num_bytes: int) -> Image:
    """Uninitialised bytes whose address is a multiple of `ALIGNMENT`."""
    raw = np.empty(num_bytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + num_bytes]


def seal(header: ExtentHeader, image: Image) -> None:
    """Write header and checksums in front of a payload that is in place."""
    sums = np.array([_checksum(image, *header.block_range(i)) for i in range(header.num_blocks)], _CHECKSUM)
    packed = header._packed(sums.tobytes())
    prefix = _PREFIX.pack(MAGIC, FORMAT_VERSION, len(packed), xxhash.xxh3_64_intdigest(packed))
    front = prefix + packed
    image[: len(front)] = np.frombuffer(front, np.uint8)
    image[len(front) : header.payload_offset] = 0


def _checksum(image: Image, offset: int, end: int) -> int:
    return xxhash.xxh3_64_intdigest(image[offset:end].data)


@dataclass(frozen=True)
class SealedHeader:
    """A header as read back from an image, with its checksums."""

    header: ExtentHeader
    checksums: tuple[int, ...]

    def verify_block(self, index: int, block: Image) -> None:
        """Raise ExtentCorrupt unless `block` is block `index` to the bit."""
        if xxhash.xxh3_64_intdigest(block.data) != self.checksums[index]:
            raise ExtentCorrupt(f"extent {self.header.extent_id}: checksum of block {index} does not match")


def parse_header(front: Image | bytes) -> SealedHeader:
    """Read the header at the start of an image, of which at least the header's bytes must be given.

    Raises ExtentCorrupt for anything that is not a whole header of this format version.
    """
    view = memoryview(front) if isinstance(front, bytes) else front.data
    size, checksum = _unpack_prefix(view)
    packed = bytes(view[_PREFIX.size : _PREFIX.size + size])
    if len(packed) != size or xxhash.xxh3_64_intdigest(packed) != checksum:
        raise ExtentCorrupt("the header is cut short or its checksum does not match")
    return _unpack(packed)


def front_bytes(front: bytes) -> int:
    """How many bytes at the start of an image `parse_header` needs, told by the first few. Raises ExtentCorrupt."""
    size, _ = _unpack_prefix(memoryview(front))
    return _PREFIX.size + size


def verify_image(extent_id: str, image: Image) -> None:
    """Raise ExtentCorrupt unless `image` is the whole extent `extent_id` to the bit."""
    sealed = parse_header(image)
    header = sealed.header
    if header.extent_id != extent_id or header.image_bytes != len(image):
        raise ExtentCorrupt(f"{len(image)} bytes of extent {header.extent_id} are not extent {extent_id}")
    for index in range(header.num_blocks):
        begin, end = header.block_range(index)
        sealed.verify_block(index, image[begin:end])


def _unpack_prefix(view: memoryview) -> tuple[int, int]:
    """Size and checksum of the header that follows."""
    if len(view) < _PREFIX.size:
        raise ExtentCorrupt(f"{len(view)} bytes are too few for an extent")
    magic, version, size, checksum = _PREFIX.unpack(view[: _PREFIX.size])
    if magic != MAGIC:
        raise ExtentCorrupt(f"magic is {magic!r}, not {MAGIC!r}")
    if version != FORMAT_VERSION:
        raise ExtentCorrupt(f"format version {version}, this program reads version {FORMAT_VERSION}")
    return size, checksum


def _unpack(packed: bytes) -> SealedHeader:
    try:
        raw = msgpack.unpackb(packed)
        num_layers, num_kv_heads, head_dim = raw["shape"]
        shape = KVShape(num_layers, num_kv_heads, head_dim, raw["dtype"])
        header = ExtentHeader(
            BlockHash(raw["root"]),
            BlockHash(raw["parent"]),
            tuple(unpack_hashes(raw["hashes"])),
            as_token_ids(np.frombuffer(raw["tokens"], "<i4")),
            raw["block_size"],
            shape,
        )
        checksums = tuple(int(c) for c in np.frombuffer(raw["checksums"], _CHECKSUM))
    except (ValueError, KeyError, TypeError) as error:
        raise ExtentCorrupt(f"the header can't be read: {error}") from error
    if not _is_consistent(header) or len(checksums) != header.num_blocks:
        raise ExtentCorrupt("the header contradicts itself")
    return SealedHeader(header, checksums)


def _is_consistent(header: ExtentHeader) -> bool:
    """At least one block, all full or one that is not, and hashes of the right length."""
    num_full_tokens = header.num_blocks * header.block_size
    is_whole = header.num_tokens == num_full_tokens or (header.num_blocks == 1 and header.is_tail)
    is_hash = len(header.root_hash) == len(header.parent_hash) == HASH_BYTES
    return is_hash and is_whole and header.num_tokens > 0 and header.block_size > 0


def chain_header(
    root_hash: BlockHash,
    block_hashes: Sequence[BlockHash],
    token_ids: TokenIds,
    first: int,
    end: int,
    block_size: int,
    shape: KVShape,
) -> ExtentHeader:
    """Header of the full blocks `first..end` of a chain given from its root."""
    return ExtentHeader(
        root_hash,
        block_hashes[first - 1] if first else root_hash,
        tuple(block_hashes[first:end]),
        token_ids[first * block_size : end * block_size],
        block_size,
        shape,
    )
