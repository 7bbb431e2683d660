"""Identity of a block: a cryptographic hash chained over its parent.

    root = H(fingerprint)        h0 = H(root, tokens of block 0)        h1 = H(h0, tokens of block 1) ...

Two blocks have the same hash only if the same model, numerics and tenant computed the same tokens
after the same history, so a hash names its KV for good. Python's `hash()` never takes part: it differs
from one process to the next.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import NewType

import numpy as np
import numpy.typing as npt

BlockHash = NewType("BlockHash", bytes)
TokenIds = npt.NDArray[np.int32]

HASH_BYTES = 16
"""128 bits of BLAKE2b: a collision needs about 2**64 blocks."""


TOKEN_BYTES = 4


def as_token_ids(token_ids: Sequence[int] | TokenIds) -> TokenIds:
    """The ids as little-endian int32 of shape `(num_tokens,)`, the form that is hashed and stored."""
    return np.ascontiguousarray(token_ids, dtype="<i4")


def pack_tokens(token_ids: TokenIds) -> bytes:
    """Ids as big-endian bytes, whose order is the order of the ids: how they are kept and compared."""
    return token_ids.astype(">i4").tobytes()


def unpack_tokens(packed: bytes) -> TokenIds:
    """The inverse of `pack_tokens`."""
    return np.frombuffer(packed, ">i4").astype("<i4")


def common_tokens(a: bytes, b: bytes) -> int:
    """Number of leading ids that two packed runs share."""
    length = min(len(a), len(b)) // TOKEN_BYTES
    if a[: length * TOKEN_BYTES] == b[: length * TOKEN_BYTES]:
        return length
    same = np.frombuffer(a, ">i4", length) == np.frombuffer(b, ">i4", length)
    return int(np.argmin(same))


def block_hash(parent_hash: BlockHash, token_ids: TokenIds) -> BlockHash:
    """Hash of one block, full or partial: `token_ids` are the ids it covers, `(1..block_size,)`."""
    digest = hashlib.blake2b(parent_hash, digest_size=HASH_BYTES, person=b"tokenloft.block")
    digest.update(token_ids.tobytes())
    return BlockHash(digest.digest())


def chain_hashes(parent_hash: BlockHash, token_ids: TokenIds, block_size: int) -> list[BlockHash]:
    """Hashes of the full blocks of `token_ids`, `(num_tokens // block_size)` of them, after `parent_hash`."""
    hashes: list[BlockHash] = []
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        parent_hash = block_hash(parent_hash, token_ids[start : start + block_size])
        hashes.append(parent_hash)
    return hashes


def pack_hashes(hashes: Sequence[BlockHash]) -> bytes:
    """Hashes as one bytes object, `HASH_BYTES` each: how they travel and how they are stored."""
    return b"".join(hashes)


def unpack_hashes(packed: bytes) -> list[BlockHash]:
    """The inverse of `pack_hashes`. Raises ValueError if the length is no multiple of `HASH_BYTES`."""
    if len(packed) % HASH_BYTES:
        raise ValueError(f"{len(packed)} bytes are no whole number of {HASH_BYTES}-byte hashes")
    return list(iter_hashes(packed))


def iter_hashes(packed: bytes) -> Iterator[BlockHash]:
    """Walk packed hashes without building the list."""
    for start in range(0, len(packed), HASH_BYTES):
        yield BlockHash(packed[start : start + HASH_BYTES])
