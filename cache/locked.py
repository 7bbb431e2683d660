"""An encrypted extent as it is for whoever lacks the key: how its file begins, and what that tells.

    | prefix and msgpack header as of a plain extent, with a magic of its own | zeros to the payload |
    | payload: the same blocks at the same offsets, each encrypted; their tags are in the header |

In plain are the fingerprint's root hash, the tenant's label, sizes and counts: what a budget and a purge need. Tokens,
session, block hashes (from which short runs of tokens could be guessed) and the place in the chain are in `private`.
The name, also the file's, is no content address: only the key leads from one to the other. Knows no cipher.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import msgpack

from cache.errors import ExtentCorrupt
from cache.extent import LOCKED_MAGIC, pack_front, unpack_front
from cache.hashing import HASH_BYTES, BlockHash

TAG_BYTES = 16
SALT_BYTES = 32


@dataclass(slots=True)
class LockedExtent:
    """What an encrypted extent shows. Never changed."""

    name: str
    """Of its file, hex."""
    key_id: str
    """Which key opens it."""
    root_hash: BlockHash
    tenant: str
    num_blocks: int
    num_tokens: int
    image_bytes: int
    private: bytes = b""
    """The rest of the header, encrypted; empty where nobody needs it."""

    @classmethod
    def checked(cls, values: Sequence[Any]) -> "LockedExtent":
        """Of values in the order of the fields, as they were read. ValueError if one is of another kind or size.

        Whether they are right, only the key can tell.
        """
        extent = cls(*values)
        kinds = (str, str, bytes, str, int, int, int, bytes)
        if [type(each) for each in values] != list(kinds[: len(values)]):
            raise ValueError("a value is of another kind")
        counts = extent.num_blocks, extent.num_tokens, extent.image_bytes
        if not (extent.name and extent.key_id) or len(extent.root_hash) != HASH_BYTES or min(counts) <= 0:
            raise ValueError("a value is of no possible size")
        return extent

    def public(self) -> bytes:
        """All that is in plain, as bytes: what goes with `private` and can't be exchanged without its key."""
        shown = [self.name, self.key_id, self.root_hash, self.tenant]
        packed: bytes = msgpack.packb([*shown, self.num_blocks, self.num_tokens, self.image_bytes])
        return packed


_FIELDS = tuple(field.name for field in fields(LockedExtent))


@dataclass(frozen=True, slots=True)
class LockedFront:
    """An encrypted extent's header."""

    extent: LockedExtent
    salt: bytes
    """Random: the key of the payload follows from it."""
    tags: bytes
    """Of its blocks, one after the other."""

    def pack(self) -> bytes:
        shown = {name: getattr(self.extent, name) for name in _FIELDS}
        return pack_front(LOCKED_MAGIC, shown | {"salt": self.salt, "tags": self.tags})


def parse_locked(front: bytes) -> LockedFront:
    """Read the header at the start of an encrypted extent.

    Raises ExtentCorrupt for anything that is not a whole one of this format version.
    """
    try:
        raw = msgpack.unpackb(unpack_front(LOCKED_MAGIC, memoryview(front)))
        extent = LockedExtent.checked([raw[name] for name in _FIELDS])
        salt, tags = raw["salt"], raw["tags"]
        is_bytes = isinstance(salt, bytes) and isinstance(tags, bytes)
        if not is_bytes or (len(salt), len(tags)) != (SALT_BYTES, extent.num_blocks * TAG_BYTES):
            raise ValueError("salt or tags are not what they should be")
    except (ValueError, KeyError, TypeError) as error:
        raise ExtentCorrupt(f"the header can't be read: {error}") from error
    return LockedFront(extent, salt, tags)
