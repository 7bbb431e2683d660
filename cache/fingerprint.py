"""What must be equal for two KV blocks to be interchangeable.

The root of every hash chain is the hash of a fingerprint, so blocks of other weights, another rope
scaling, another dtype or another tenant can never be found by a lookup, even when they lie side by side.
"""

import hashlib
from dataclasses import dataclass, field, fields

import msgpack

from cache.hashing import HASH_BYTES, BlockHash

KV_LAYOUT_VERSION = 1
"""Raised whenever the order of bytes inside a block changes."""


@dataclass(frozen=True)
class Fingerprint:
    """Everything that a block's bytes depend on besides its tokens.

    Each field is a digest or a canonical string made by the owner of that knowledge; this module only
    combines them.
    """

    weights: str
    """Digest of the weights' content. Never a name or a path: weights change behind both."""
    config: str
    """Digest of the model's config, rope scaling included."""
    kv_dtype: str
    """Dtype of the stored KV, for example `float32`."""
    numerics: str
    """How the KV was computed: weights' dtype and quantisation, for example `float32`."""
    block_size: int
    """Tokens per block."""
    adapter: str = ""
    """Digest of the adapter's weights, empty without one."""
    tenant_salt: str = field(default="", repr=False)
    """Secret of the tenant, empty for the one default tenant."""
    layout_version: int = KV_LAYOUT_VERSION

    def root_hash(self) -> BlockHash:
        """Root of all hash chains under this fingerprint."""
        # Names go in beside the values, so that no two fields can be taken for each other.
        canonical = msgpack.packb([[f.name, getattr(self, f.name)] for f in fields(self)])
        return BlockHash(hashlib.blake2b(canonical, digest_size=HASH_BYTES, person=b"tokenloft.root").digest())
