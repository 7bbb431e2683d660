"""Encryption at rest: one secret, from which all that the disk tier's files and index need follows.

    secret --HKDF--+-- root hash --> key of private headers: each with a random 96-bit nonce
                   +-- root hash, random salt of a file --> key of its payload: nonce is the block's number
                   +-- key of names (HMAC: a name tells nothing of the content that it addresses)
                   +-- the key's id, which says whether a secret is the right one and gives nothing away

AES-256-GCM and HKDF-SHA256, by a library. A root hash stands for a fingerprint with its tenant, so each has keys of
its own. A payload's key is used for one file as it was written once, so that no nonce ever comes twice. Only what is on
disk is encrypted; whoever can read the memory of a server's processes needs no key.
"""

import hmac
import os
import secrets
import stat
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgpack
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cache.errors import ExtentCorrupt, ExtentLocked, KeyFileError
from cache.extent import (
    ExtentHeader,
    Image,
    KVShape,
    Origin,
    SealedHeader,
    aligned_empty,
    is_consistent,
    is_locked,
    parse_header,
    put_front,
    seal,
)
from cache.hashing import BlockHash
from cache.locked import SALT_BYTES, TAG_BYTES, LockedExtent, LockedFront, parse_locked

KEY_BYTES = 32
NONCE_BYTES = 12
KEY_ID_BYTES = 8
_MAKE_KEY_FILE = "(umask 077; openssl rand -hex 32 > FILE)"

RandomBytes = Callable[[int], bytes]


class Vault:
    """Encrypts and decrypts extents. Holds the secret: stays in its process, can't be pickled. Thread-safe."""

    def __init__(self, secret: bytes, random_bytes: RandomBytes = secrets.token_bytes) -> None:
        """Of 32 bytes; ValueError for others."""
        if len(secret) != KEY_BYTES:
            raise ValueError(f"a key has {KEY_BYTES} bytes, not {len(secret)}")
        self._secret = secret
        self._random_bytes = random_bytes
        self._names = _derive(secret, b"names")
        self._ciphers: dict[bytes, AESGCM] = {}
        """Of private headers, by root hash."""
        self._shapes: dict[tuple[object, ...], KVShape] = {}
        self.key_id = _derive(secret, b"id", num_bytes=KEY_ID_BYTES).hex()
        """Names the secret: equal for equal ones."""

    @classmethod
    def from_file(cls, path: Path) -> "Vault":
        """With the secret in a file, raw or in hex, which its owner alone may read. Raises KeyFileError."""
        return cls(read_key_file(path))

    def __repr__(self) -> str:
        return f"<Vault {self.key_id}>"

    def __reduce__(self) -> str:
        raise TypeError("a vault holds a secret and stays in its process: pass the path of its key file")

    def name_of(self, extent_id: str) -> str:
        """What the file of an extent is called, 32 hex digits."""
        return hmac.digest(self._names, extent_id.encode(), "sha256")[:16].hex()

    # -- storing ------------------------------------------------------------------------------------

    def encrypt(self, header: ExtentHeader, image: Image, target: Image) -> LockedExtent:
        """Make the encrypted file of a sealed image, in `target` of the same size.

        Raises ExtentCorrupt if the image is not whole: a tag would vouch for what a checksum has found bad.
        """
        sealed = parse_header(image)
        salt = self._random_bytes(SALT_BYTES)
        key = self._payload_key(header.root_hash, salt)
        tags: list[bytes] = []
        for index in range(header.num_blocks):
            begin, end = header.block_range(index)
            sealed.verify_block(index, image[begin:end])
            tags.append(_encrypt_block(key, header, index, image[begin:end], target[begin:end]))
        locked = self.lock(header)
        put_front(LockedFront(locked, salt, b"".join(tags)).pack(), header, target)
        return locked

    def lock(self, header: ExtentHeader) -> LockedExtent:
        """The header with all that is private encrypted, as the index keeps it too."""
        shown = self.name_of(header.extent_id), self.key_id, header.root_hash, header.origin.tenant
        locked = LockedExtent(*shown, header.num_blocks, header.num_tokens, header.image_bytes)
        nonce = self._random_bytes(NONCE_BYTES)
        hidden = self._cipher(header.root_hash).encrypt(nonce, _pack_private(header), locked.public())
        return replace(locked, private=nonce + hidden)

    # -- reading ------------------------------------------------------------------------------------

    def unlock(self, locked: LockedExtent) -> ExtentHeader:
        """The whole header. Raises ExtentLocked if it takes another key, ExtentCorrupt if something is forged."""
        if locked.key_id != self.key_id:
            raise ExtentLocked(f"extent {locked.name} is encrypted with another key, {locked.key_id}")
        nonce, hidden = locked.private[:NONCE_BYTES], locked.private[NONCE_BYTES:]
        try:
            private = self._cipher(locked.root_hash).decrypt(nonce, hidden, locked.public())
        except (InvalidTag, ValueError) as error:  # ValueError: a nonce that is cut short
            raise ExtentCorrupt(f"extent {locked.name}: its header is not what was encrypted") from error
        return self._unpack_private(locked, private)

    def unlock_front(self, front: LockedFront) -> "UnlockedHeader":
        """The header of a file, with what it takes to decrypt the blocks. Raises as `unlock`."""
        header = self.unlock(front.extent)
        return UnlockedHeader(header, (), front.tags, self._payload_key(header.root_hash, front.salt))

    def _unpack_private(self, locked: LockedExtent, private: bytes) -> ExtentHeader:
        parent, hashes, tokens, block_size, first_block, dims, session = msgpack.unpackb(private, use_list=False)
        shape = self._shapes.get(dims) or self._shapes.setdefault(dims, KVShape(*dims))
        origin = Origin(locked.tenant, session)
        header = ExtentHeader(locked.root_hash, parent, hashes, tokens, block_size, shape, first_block, origin)
        shown = locked.num_blocks, locked.num_tokens, locked.image_bytes
        if not is_consistent(header) or shown != (header.num_blocks, header.num_tokens, header.image_bytes):
            raise ExtentCorrupt(f"extent {locked.name}: its header contradicts itself")
        return header

    # -- keys ---------------------------------------------------------------------------------------

    def _cipher(self, root_hash: BlockHash) -> AESGCM:
        cipher = self._ciphers.get(root_hash)
        if cipher is None:
            cipher = self._ciphers[root_hash] = AESGCM(_derive(self._secret, b"header", root_hash))
        return cipher

    def _payload_key(self, root_hash: BlockHash, salt: bytes) -> bytes:
        return _derive(self._secret, b"payload", root_hash, salt)


@dataclass(frozen=True)
class UnlockedHeader(SealedHeader):
    """The header of an encrypted file, and the key of its payload. A block's tag is its checksum."""

    tags: bytes = b""
    key: bytes = field(default=b"", repr=False)

    def plain_block(self, index: int, stored: Image, room: Image) -> Image:
        """Raises ExtentCorrupt unless `stored` is block `index` of this extent as it was encrypted."""
        nonce, tag = _nonce(index), self.tags[index * TAG_BYTES : (index + 1) * TAG_BYTES]
        decryptor = Cipher(algorithms.AES256(self.key), modes.GCM(nonce, tag)).decryptor()
        decryptor.authenticate_additional_data(_bound_to(self.header, index))
        decryptor.update_into(stored.data, room.data)
        try:
            decryptor.finalize()
        except InvalidTag:
            raise ExtentCorrupt(
                f"extent {self.header.extent_id}: block {index} is not what was encrypted there"
            ) from None
        return room

    def verify_block(self, index: int, block: Image) -> None:
        """Nothing is left to do: a block that could be decrypted is the one that was encrypted."""


def open_front(front: bytes, vault: Vault | None) -> SealedHeader:
    """The header of a file, encrypted or not. Raises ExtentLocked without the right key, and ExtentCorrupt."""
    if not is_locked(front):
        return parse_header(front)
    locked = parse_locked(front)
    if vault is None:
        raise ExtentLocked(f"extent {locked.extent.name} is encrypted, and there is no key")
    return vault.unlock_front(locked)


def decrypt_image(sealed: SealedHeader, stored: Image) -> Image:
    """The sealed image that a whole encrypted file was made of, with the same payload. Raises ExtentCorrupt."""
    header = sealed.header
    if len(stored) != header.image_bytes:
        raise ExtentCorrupt(f"{len(stored)} bytes are not extent {header.extent_id}")
    image = aligned_empty(header.image_bytes)
    for index in range(header.num_blocks):
        begin, end = header.block_range(index)
        sealed.plain_block(index, stored[begin:end], image[begin:end])
    seal(header, image)
    return image


def _encrypt_block(key: bytes, header: ExtentHeader, index: int, block: Image, target: Image) -> bytes:
    encryptor = Cipher(algorithms.AES256(key), modes.GCM(_nonce(index))).encryptor()
    encryptor.authenticate_additional_data(_bound_to(header, index))
    encryptor.update_into(block.data, target.data)
    encryptor.finalize()
    return encryptor.tag


def _nonce(index: int) -> bytes:
    return index.to_bytes(NONCE_BYTES, "big")


def _bound_to(header: ExtentHeader, index: int) -> bytes:
    """What a block can't be taken away from: fingerprint, history, its own hash, its place in the file."""
    parent_hash = header.block_hash(index - 1) if index else header.parent_hash
    return header.root_hash + parent_hash + header.block_hash(index) + _nonce(index)


def _pack_private(header: ExtentHeader) -> bytes:
    shape = header.shape
    dims = shape.num_layers, shape.num_kv_heads, shape.head_dim, shape.dtype
    place = header.block_size, header.first_block
    chain = header.parent_hash, header.packed_hashes, header.packed_tokens
    packed: bytes = msgpack.packb([*chain, *place, dims, header.origin.session])
    return packed


def _derive(
    secret: bytes, purpose: bytes, root_hash: bytes = b"", salt: bytes | None = None, num_bytes: int = KEY_BYTES
) -> bytes:
    return HKDF(SHA256(), num_bytes, salt, b"tokenloft " + purpose + b"\0" + root_hash).derive(secret)


# -- the key file -----------------------------------------------------------------------------------


def open_vault(path: Path | None) -> Vault | None:
    """The vault of a key file, None without one. Raises KeyFileError."""
    return Vault.from_file(path) if path is not None else None


def read_key_file(path: Path) -> bytes:
    """The secret: 32 bytes, or 64 hex digits. Raises KeyFileError unless its owner alone may read the file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            mode, content = os.fstat(fd).st_mode, os.pread(fd, 4 * KEY_BYTES, 0)
        finally:
            os.close(fd)
    except FileNotFoundError as error:
        remedy = _MAKE_KEY_FILE.replace("FILE", str(path))
        raise KeyFileError(f"there is no key file {path}: make one with {remedy}") from error
    except OSError as error:
        raise KeyFileError(f"key file {path} can't be read: {error.strerror}") from error
    if mode & 0o077:
        raise KeyFileError(
            f"key file {path} can be used by others (mode {stat.S_IMODE(mode):04o}): "
            f"take that away with chmod 600 {path}"
        )
    return _parse_key(content, path)


def _parse_key(content: bytes, path: Path) -> bytes:
    try:
        secret = bytes.fromhex(content.decode("ascii"))
    except ValueError:
        secret = content
    if len(secret) != KEY_BYTES:
        raise KeyFileError(f"key file {path} should hold {KEY_BYTES} bytes or {2 * KEY_BYTES} hex digits, and does not")
    return secret
