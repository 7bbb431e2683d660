"""Brings granted blocks and verifies them, on a thread of its own, a few buffers ahead of whoever copies them.

    thread      open, read, verify   open, read, verify   open, read, verify
    reader                           copy                 copy                 copy

So a load costs the slower of the two and not their sum, and a disk that hangs costs a time limit: the thread is left
behind with its buffers, and touches nothing that belongs to anybody else. Every block is verified before it is passed
on: fingerprint, token ids, checksum.
"""

import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from cache.encryption import UnlockedHeader, Vault
from cache.errors import ExtentCorrupt, ReadTimedOut
from cache.events import Tier
from cache.extent import Image, SealedHeader, aligned_empty, parse_header
from cache.hashing import TOKEN_BYTES, pack_tokens
from cache.messages import LoadPiece, LoadQuery
from cache.tiers.extent_file import read_all, read_sealed_header

NUM_BUFFERS = 3
CHUNK_BYTES = 4 << 20
"""Small enough that a chunk is still in the processor's cache when it is verified and copied."""


@dataclass(frozen=True, slots=True)
class Block:
    """One verified block, ready to be copied into the pool."""

    index: int
    """Position in the prompt, in blocks."""
    num_tokens: int
    """Tokens of the prompt that it covers, from its start."""
    stored_tokens: int
    """Tokens in `payload`, at least `num_tokens`."""
    payload: Image
    """`(num_layers, 2, stored_tokens, num_kv_heads, head_dim)` as bytes; valid until the next block is asked for."""
    tier: Tier


@dataclass(frozen=True, slots=True)
class Chunk:
    """Verified blocks of one extent."""

    blocks: tuple[Block, ...]
    buffer: Image
    """Holds what was read from a file."""

    @property
    def num_bytes(self) -> int:
        return sum(len(block.payload) for block in self.blocks)


class ReadAhead:
    """One pass over the pieces of one grant. To be closed, and not to be shared."""

    def __init__(
        self,
        query: LoadQuery,
        pieces: Sequence[LoadPiece],
        images: Iterator[Image],
        is_file: Callable[[LoadPiece], bool],
        timeout_s: float,
        vault: Vault | None = None,
        *,
        backwards: bool = False,
    ) -> None:
        """`images` gives, in order, the images of those pieces that are no files; it is walked by the thread.

        `vault` decrypts files. `backwards`: the pieces come from the last to the first, and so do the blocks of each.
        """
        self._query = query
        self._images = images
        self._is_file = is_file
        self._timeout_s = timeout_s
        self._vault = vault
        self._backwards = backwards
        self._is_closed = False
        self._encrypted = aligned_empty(0)
        """What is encrypted is read in here, and decrypted into a chunk's buffer."""
        self._free: queue.SimpleQueue[Image | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[Chunk | Exception] = queue.SimpleQueue()
        for _ in range(NUM_BUFFERS):
            self._free.put(aligned_empty(0))
        if pieces:
            threading.Thread(target=self._run, args=(pieces,), name="tokenloft-read", daemon=True).start()

    def __repr__(self) -> str:
        return f"<ReadAhead {self._ready.qsize()} chunks ready>"

    def close(self) -> None:
        """Let the thread end; it may take as long as the disk does."""
        self._is_closed = True
        self._free.put(None)

    def chunks(self, piece: LoadPiece) -> Iterator[Chunk]:
        """The blocks of the next piece. A chunk's content is valid until the next one is asked for.

        Raises ReadTimedOut if the disk does not answer, OSError or ExtentCorrupt for what can't be read,
        ExtentLocked for an encrypted file without its key, StoreUnavailable for an image that has gone.
        """
        left = _num_blocks(piece, self._query)
        while left > 0:
            try:
                chunk = self._ready.get(timeout=self._timeout_s if self._is_file(piece) else None)
            except queue.Empty:
                raise ReadTimedOut(f"the disk has not answered for {self._timeout_s:g} s") from None
            if isinstance(chunk, Exception):
                raise chunk
            left -= len(chunk.blocks)
            yield chunk
            self._free.put(chunk.buffer)

    # -- the thread -----------------------------------------------------------------------------------

    def _run(self, pieces: Sequence[LoadPiece]) -> None:
        try:
            for piece in pieces:
                if self._is_closed:
                    return
                read = self._read_file if self._is_file(piece) else self._read_image
                for chunk in read(piece):
                    self._ready.put(chunk)
        except _NobodyWaits:
            return
        except Exception as error:  # noqa: BLE001 - raised again where the blocks are waited for
            self._ready.put(error)

    def _buffer(self) -> Image:
        buffer = self._free.get()
        if buffer is None or self._is_closed:
            raise _NobodyWaits
        return buffer

    def _read_file(self, piece: LoadPiece) -> Iterator[Chunk]:
        fd = os.open(piece.source, os.O_RDONLY | os.O_CLOEXEC)
        try:
            sealed = read_sealed_header(fd, self._vault)
            header = sealed.header
            if header.image_bytes != os.fstat(fd).st_size:  # before there is memory for what it claims to hold
                raise ExtentCorrupt("the file is cut short or too long")
            for first, end in self._ranges(piece, sealed):
                buffer = self._buffer()
                begin, stop = header.block_range(first)[0], header.block_range(end - 1)[1]
                if len(buffer) < stop - begin:
                    buffer = aligned_empty(stop - begin)
                content = buffer[: stop - begin]
                if isinstance(sealed, UnlockedHeader):
                    content = self._room_for_encrypted(stop - begin)
                read_all(fd, content, begin)
                yield from self._verified(piece, sealed, first, end, content, begin, buffer)
        finally:
            os.close(fd)

    def _room_for_encrypted(self, num_bytes: int) -> Image:
        if len(self._encrypted) < num_bytes:
            self._encrypted = aligned_empty(num_bytes)
        return self._encrypted[:num_bytes]

    def _read_image(self, piece: LoadPiece) -> Iterator[Chunk]:
        image = next(self._images)
        sealed = parse_header(image)
        for first, end in self._ranges(piece, sealed):
            yield from self._verified(piece, sealed, first, end, image, 0, self._buffer())

    def _ranges(self, piece: LoadPiece, sealed: SealedHeader) -> Iterator[tuple[int, int]]:
        """Blocks of the extent that make a chunk."""
        header = sealed.header
        first, end = piece.index_in_extent, piece.index_in_extent + _num_blocks(piece, self._query)
        num_there = header.num_blocks if header.block_size == self._query.block_size else 0
        per_chunk = max(1, CHUNK_BYTES // (header.block_size * header.shape.bytes_per_token))
        if not self._backwards:
            there = min(end, num_there)
            yield from ((at, min(at + per_chunk, there)) for at in range(first, there, per_chunk))
        if end > num_there:
            raise ExtentCorrupt("the extent has other blocks than its index says")
        if self._backwards:
            yield from ((max(first, at - per_chunk), at) for at in range(end, first, -per_chunk))

    def _verified(
        self, piece: LoadPiece, sealed: SealedHeader, first: int, end: int, content: Image, offset: int, buffer: Image
    ) -> Iterator[Chunk]:
        """Blocks `first..end`; `content` begins at `offset` of the image. Those that come before a bad one count."""
        header, block_size = sealed.header, self._query.block_size
        blocks: list[Block] = []
        order = range(end - 1, first - 1, -1) if self._backwards else range(first, end)
        try:
            for index in order:
                at = index - piece.index_in_extent
                begin, stop = header.block_range(index)
                place = slice(begin - offset, stop - offset)
                payload = sealed.plain_block(index, content[place], buffer[place])
                num_tokens = min(block_size, piece.num_tokens - at * block_size)
                verify_block(sealed, index, payload, self._query, piece.first_block + at, num_tokens)
                stored_tokens = len(header.block_tokens(index)) // TOKEN_BYTES
                blocks.append(Block(piece.first_block + at, num_tokens, stored_tokens, payload, piece.tier))
        finally:
            if blocks:
                yield Chunk(tuple(blocks), buffer)


class _NobodyWaits(Exception):
    """The pass has been closed."""


def _num_blocks(piece: LoadPiece, query: LoadQuery) -> int:
    return -(-piece.num_tokens // query.block_size)


def verify_block(
    sealed: SealedHeader, index: int, payload: Image, query: LoadQuery, block_index: int, num_tokens: int
) -> None:
    """Raise ExtentCorrupt unless this is the block that the prompt continues with, to the bit."""
    header = sealed.header
    if header.root_hash != query.root_hash:
        raise ExtentCorrupt("the extent belongs to another fingerprint")
    if header.block_size != query.block_size or index >= header.num_blocks:
        raise ExtentCorrupt("the extent has other blocks than its index says")
    parent = header.block_hash(index - 1) if index else header.parent_hash
    expected = query.block_hashes[block_index - 1] if block_index else query.root_hash
    if parent != expected:
        raise ExtentCorrupt("the block follows another history")
    start = block_index * query.block_size
    wanted = pack_tokens(query.token_ids[start : start + num_tokens])
    if not header.block_tokens(index).startswith(wanted):
        raise ExtentCorrupt("the block holds other tokens")
    sealed.verify_block(index, payload)
