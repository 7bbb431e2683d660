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
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import msgpack
import numpy as np
import numpy.typing as npt
import xxhash

from cache.errors import ExtentCorrupt
from cache.hashing import (
    HASH_BYTES,
    TOKEN_BYTES,
    BlockHash,
    TokenIds,
    iter_hashes,
    pack_hashes,
    pack_tokens,
    unpack_tokens,
)

Image = npt.NDArray[np.uint8]

MAGIC = b"TLEXTENT"
LOCKED_MAGIC = b"TLLOCKED"
"""Of an encrypted file, see `cache.locked`."""
FORMAT_VERSION = 2
ALIGNMENT = 4096
_PREFIX = struct.Struct("<8sIIQ")
_CHECKSUM = np.dtype("<u8")
_HEADER_ROOM = 512
"""For everything in the header whose length does not depend on the number of blocks."""
_ROOM_PER_BLOCK = HASH_BYTES + 16
"""A hash, and a checksum or, encrypted, a tag."""


@dataclass(frozen=True, slots=True)
class KVShape:
    """Shape and dtype of one token's KV as it is stored, on one tensor-parallel rank. ValueError for another dtype.

    `int8` has a scale for each token and head: per layer, and per key or value, a block holds

        values, int8 (num_tokens, num_kv_heads, head_dim) | scales, float32 (num_tokens, num_kv_heads)
    """

    DTYPES: ClassVar[dict[str, tuple[int, int]]] = {
        "float32": (4, 0),
        "float16": (2, 0),
        "bfloat16": (2, 0),
        "float8_e4m3fn": (1, 0),
        "int8": (1, 4),
    }
    """Bytes of a value, and bytes of the scale of a token's head."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    """One of `DTYPES`."""
    bytes_per_token: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        if self.dtype not in self.DTYPES:
            raise ValueError(f"KV can't be stored as {self.dtype!r}, choose one of {', '.join(self.DTYPES)}")
        object.__setattr__(self, "bytes_per_token", self.num_layers * 2 * self.row_bytes)

    @property
    def row_bytes(self) -> int:
        """Bytes of the keys, or of the values, of one token in one layer."""
        value_bytes, scale_bytes = self.DTYPES[self.dtype]
        return self.num_kv_heads * (self.head_dim * value_bytes + scale_bytes)


class Origin(NamedTuple):
    """Who stored an extent, for purges; empty where nobody said."""

    tenant: str = ""
    session: str = ""


NOBODY = Origin()


@dataclass(slots=True, unsafe_hash=True)
class ExtentHeader:
    """What an extent holds. Never changed; see `make`.

    Compact, for a node store keeps one for each of its extents, and not frozen, which would cost a quarter of a second
    for each 200,000 of them when a store opens.
    """

    root_hash: BlockHash
    parent_hash: BlockHash
    packed_hashes: bytes
    """Hashes of its blocks, one after the other."""
    packed_tokens: bytes
    """Token ids of all its blocks as big-endian int32: the order of the bytes is the order of the ids."""
    block_size: int
    shape: KVShape
    first_block: int = 0
    """Position of its first block in the chain, in blocks."""
    origin: Origin = NOBODY
    extent_id: str = field(init=False, compare=False)
    """Content address: the chain names the content. Hex, also the file's name."""

    def __post_init__(self) -> None:
        self.extent_id = xxhash.xxh3_128_hexdigest(self.root_hash + self.parent_hash + self.packed_hashes)

    @classmethod
    def make(
        cls,
        root_hash: BlockHash,
        parent_hash: BlockHash,
        block_hashes: Sequence[BlockHash],
        token_ids: TokenIds,
        block_size: int,
        shape: KVShape,
        first_block: int = 0,
        origin: Origin = NOBODY,
    ) -> "ExtentHeader":
        """Of hashes and of token ids `(num_tokens,)`."""
        packed = pack_hashes(block_hashes), pack_tokens(token_ids)
        return cls(root_hash, parent_hash, *packed, block_size, shape, first_block, origin)

    @property
    def block_hashes(self) -> tuple[BlockHash, ...]:
        return tuple(iter_hashes(self.packed_hashes))

    @property
    def token_ids(self) -> TokenIds:
        return unpack_tokens(self.packed_tokens)

    @property
    def num_blocks(self) -> int:
        return len(self.packed_hashes) // HASH_BYTES

    @property
    def num_tokens(self) -> int:
        return len(self.packed_tokens) // TOKEN_BYTES

    @property
    def is_tail(self) -> bool:
        return self.num_tokens < self.block_size

    @property
    def payload_bytes(self) -> int:
        return self.num_tokens * self.shape.bytes_per_token

    @property
    def payload_offset(self) -> int:
        tenant, session = self.origin
        num_blocks = len(self.packed_hashes) // HASH_BYTES
        header_bytes = num_blocks * _ROOM_PER_BLOCK + len(self.packed_tokens) + 4 * (len(tenant) + len(session))
        return -(-(_HEADER_ROOM + header_bytes) // ALIGNMENT) * ALIGNMENT

    @property
    def image_bytes(self) -> int:
        return self.payload_offset + len(self.packed_tokens) // TOKEN_BYTES * self.shape.bytes_per_token

    def block_hash(self, index: int) -> BlockHash:
        return BlockHash(self.packed_hashes[index * HASH_BYTES : (index + 1) * HASH_BYTES])

    def block_tokens(self, index: int) -> bytes:
        """Packed token ids of block `index`."""
        size = self.block_size * TOKEN_BYTES
        return self.packed_tokens[index * size : (index + 1) * size]

    def block_token_ids(self, index: int) -> TokenIds:
        return unpack_tokens(self.block_tokens(index))

    def find_block(self, block_hash: BlockHash) -> int | None:
        """Which of its blocks has this hash."""
        for index in range(self.num_blocks):
            if self.packed_hashes.startswith(block_hash, index * HASH_BYTES):
                return index
        return None

    def block_range(self, index: int) -> tuple[int, int]:
        """Where block `index` lies in the image: `(offset, end)` in bytes."""
        block_bytes = self.block_size * self.shape.bytes_per_token
        offset = self.payload_offset + index * block_bytes
        return offset, min(offset + block_bytes, self.image_bytes)


def split_into_extents(header: ExtentHeader, max_bytes: int) -> list[ExtentHeader]:
    """Cut a run of full blocks into extents of at most `max_bytes` of payload, one block at least."""
    per_extent = max(1, max_bytes // (header.block_size * header.shape.bytes_per_token))
    parts: list[ExtentHeader] = []
    for first in range(0, header.num_blocks, per_extent):
        parts.append(slice_header(header, first, min(first + per_extent, header.num_blocks)))
    return parts


def slice_header(header: ExtentHeader, first: int, end: int) -> ExtentHeader:
    """The header of blocks `first..end` alone."""
    size = header.block_size * TOKEN_BYTES
    return ExtentHeader(
        header.root_hash,
        header.parent_hash if first == 0 else header.block_hash(first - 1),
        header.packed_hashes[first * HASH_BYTES : end * HASH_BYTES],
        header.packed_tokens[first * size : end * size],
        header.block_size,
        header.shape,
        header.first_block + first,
        header.origin,
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
    put_front(_pack_header(header, sums.tobytes()), header, image)


def put_front(front: bytes, header: ExtentHeader, image: Image) -> None:
    """Write what comes before the payload."""
    if len(front) > header.payload_offset:
        raise ValueError(f"a header of {len(front)} bytes does not fit before the payload at {header.payload_offset}")
    image[: len(front)] = np.frombuffer(front, np.uint8)
    image[len(front) : header.payload_offset] = 0


def _pack_header(header: ExtentHeader, checksums: bytes) -> bytes:
    shape = header.shape
    fields = {
        "root": header.root_hash,
        "parent": header.parent_hash,
        "hashes": header.packed_hashes,
        "tokens": header.packed_tokens,
        "block_size": header.block_size,
        "first_block": header.first_block,
        "origin": list(header.origin),
        "shape": [shape.num_layers, shape.num_kv_heads, shape.head_dim],
        "dtype": shape.dtype,
        "checksums": checksums,
    }
    return pack_front(MAGIC, fields)


def pack_front(magic: bytes, fields: dict[str, Any]) -> bytes:
    """Prefix and header of an image."""
    packed: bytes = msgpack.packb(fields)
    return _PREFIX.pack(magic, FORMAT_VERSION, len(packed), xxhash.xxh3_64_intdigest(packed)) + packed


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

    def plain_block(self, index: int, stored: Image, room: Image) -> Image:
        """Block `index` as it was before it was stored: `stored` itself, or made of it in `room`."""
        return stored


def parse_header(front: Image | bytes) -> SealedHeader:
    """Read the header at the start of an image, of which at least the header's bytes must be given.

    Raises ExtentCorrupt for anything that is not a whole header of this format version.
    """
    return _unpack(unpack_front(MAGIC, memoryview(front) if isinstance(front, bytes) else front.data))


def unpack_front(magic: bytes, view: memoryview) -> bytes:
    """The header at the start of an image, still packed. Raises ExtentCorrupt."""
    found, size, checksum = _unpack_prefix(view)
    if found != magic:
        raise ExtentCorrupt(f"magic is {found!r}, not {magic!r}")
    packed = bytes(view[_PREFIX.size : _PREFIX.size + size])
    if len(packed) != size or xxhash.xxh3_64_intdigest(packed) != checksum:
        raise ExtentCorrupt("the header is cut short or its checksum does not match")
    return packed


def is_locked(front: bytes) -> bool:
    """What begins like this is encrypted."""
    return front.startswith(LOCKED_MAGIC)


def front_bytes(front: bytes) -> int:
    """How many bytes at the start of an image `parse_header` needs, told by the first few. Raises ExtentCorrupt."""
    _, size, _ = _unpack_prefix(memoryview(front))
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


def _unpack_prefix(view: memoryview) -> tuple[bytes, int, int]:
    """Magic; size and checksum of the header that follows."""
    if len(view) < _PREFIX.size:
        raise ExtentCorrupt(f"{len(view)} bytes are too few for an extent")
    magic, version, size, checksum = _PREFIX.unpack(view[: _PREFIX.size])
    if magic not in (MAGIC, LOCKED_MAGIC):
        raise ExtentCorrupt(f"magic is {magic!r}, not {MAGIC!r}")
    if version != FORMAT_VERSION:
        raise ExtentCorrupt(f"format version {version}, this program reads version {FORMAT_VERSION}")
    return magic, size, checksum


def _unpack(packed: bytes) -> SealedHeader:
    try:
        raw = msgpack.unpackb(packed)
        num_layers, num_kv_heads, head_dim = map(int, raw["shape"])
        shape = KVShape(num_layers, num_kv_heads, head_dim, raw["dtype"])
        chain = BlockHash(raw["root"]), BlockHash(raw["parent"]), bytes(raw["hashes"]), bytes(raw["tokens"])
        place = int(raw["first_block"]), Origin(*raw["origin"])
        header = ExtentHeader(*chain, int(raw["block_size"]), shape, *place)
        checksums = tuple(int(c) for c in np.frombuffer(raw["checksums"], _CHECKSUM))
    except (ValueError, KeyError, TypeError) as error:
        raise ExtentCorrupt(f"the header can't be read: {error}") from error
    if not is_consistent(header) or len(checksums) != header.num_blocks:
        raise ExtentCorrupt("the header contradicts itself")
    return SealedHeader(header, checksums)


def is_consistent(header: ExtentHeader) -> bool:
    """At least one block, all full or one that is not, of some bytes each, and hashes of the right length."""
    # Asked for each row of an index that is opened: hence no calls that can be spared.
    num_blocks, hash_rest = divmod(len(header.packed_hashes), HASH_BYTES)
    num_tokens, token_rest = divmod(len(header.packed_tokens), TOKEN_BYTES)
    num_full_tokens = num_blocks * header.block_size
    is_whole = num_tokens == num_full_tokens or (num_blocks == 1 and 0 < num_tokens < num_full_tokens)
    is_hash = len(header.root_hash) == len(header.parent_hash) == HASH_BYTES
    origin, shape = header.origin, header.shape
    is_placed = header.first_block >= 0 and (origin is NOBODY or all(isinstance(each, str) for each in origin))
    has_bytes = num_tokens > 0 and min(shape.num_layers, shape.num_kv_heads, shape.head_dim) > 0
    return has_bytes and is_hash and not hash_rest and not token_rest and is_placed and is_whole


def chain_header(
    root_hash: BlockHash,
    block_hashes: Sequence[BlockHash],
    token_ids: TokenIds,
    first: int,
    end: int,
    block_size: int,
    shape: KVShape,
    origin: Origin = NOBODY,
) -> ExtentHeader:
    """Header of the full blocks `first..end` of a chain given from its root."""
    return ExtentHeader.make(
        root_hash,
        block_hashes[first - 1] if first else root_hash,
        block_hashes[first:end],
        token_ids[first * block_size : end * block_size],
        block_size,
        shape,
        first,
        origin,
    )
