"""Reads extent files in order on a thread of its own, a few buffers ahead of whoever verifies and copies.

    thread      open, header, blocks -> buffer   open, header, blocks -> buffer ...
    reader                           verify, copy                     verify, copy ...

So a load from the page cache costs the slower of the two and not their sum, and a disk that hangs costs a time
limit: the thread is left behind with its buffers, and touches nothing that belongs to anybody else.
"""

import os
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cache.errors import ExtentCorrupt, ReadTimedOut
from cache.extent import Image, SealedHeader, aligned_empty
from cache.messages import LoadPiece
from cache.tiers.disk import read_all, read_sealed_header

NUM_BUFFERS = 3
CHUNK_BYTES = 4 << 20
"""Small enough that a chunk is still in the processor's cache when it is verified and copied."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive blocks of an extent."""

    sealed: SealedHeader
    index_in_extent: int
    num_blocks: int
    offset: int
    """Where `content` begins in the image."""
    content: Image
    """A part of `buffer`."""
    buffer: Image


class ReadAhead:
    """One pass over pieces of files of one block size. Read all of it, or close it; not to be shared."""

    def __init__(self, pieces: Sequence[LoadPiece], block_size: int, timeout_s: float) -> None:
        self._block_size = block_size
        self._timeout_s = timeout_s
        self._free: queue.SimpleQueue[Image | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[Chunk | OSError | ExtentCorrupt] = queue.SimpleQueue()
        for _ in range(NUM_BUFFERS):
            self._free.put(aligned_empty(0))
        if pieces:
            threading.Thread(target=self._run, args=(pieces,), name="tokenloft-read", daemon=True).start()

    def __repr__(self) -> str:
        return f"<ReadAhead {self._ready.qsize()} chunks ready>"

    def close(self) -> None:
        """Let the thread end; it may take as long as the disk does."""
        self._free.put(None)

    def chunks(self, piece: LoadPiece) -> Iterator[Chunk]:
        """The next piece in order. A chunk's content is valid until the next one is asked for.

        Raises ReadTimedOut if the disk does not answer, OSError or ExtentCorrupt for a file that can't be read.
        """
        left = -(-piece.num_tokens // self._block_size)
        while left > 0:
            try:
                chunk = self._ready.get(timeout=self._timeout_s)
            except queue.Empty:
                raise ReadTimedOut(f"the disk has not answered for {self._timeout_s:g} s") from None
            if not isinstance(chunk, Chunk):
                raise chunk
            left -= chunk.num_blocks
            yield chunk
            self._free.put(chunk.buffer)

    # -- the thread -----------------------------------------------------------------------------------

    def _run(self, pieces: Sequence[LoadPiece]) -> None:
        try:
            for piece in pieces:
                if not self._read_piece(piece):
                    return
        except (OSError, ExtentCorrupt) as error:
            self._ready.put(error)

    def _read_piece(self, piece: LoadPiece) -> bool:
        """False if nobody wants it any more."""
        fd = os.open(piece.source, os.O_RDONLY | os.O_CLOEXEC)
        try:
            sealed = read_sealed_header(fd)
            at, end = piece.index_in_extent, piece.index_in_extent - (-piece.num_tokens // self._block_size)
            if end > sealed.header.num_blocks:
                raise ExtentCorrupt("the extent has fewer blocks than its index says")
            per_chunk = max(1, CHUNK_BYTES // (self._block_size * sealed.header.shape.bytes_per_token))
            while at < end:
                buffer = self._free.get()
                if buffer is None:
                    return False
                num_blocks = min(per_chunk, end - at)
                begin, stop = sealed.header.block_range(at)[0], sealed.header.block_range(at + num_blocks - 1)[1]
                if len(buffer) < stop - begin:
                    buffer = aligned_empty(stop - begin)
                content = buffer[: stop - begin]
                read_all(fd, content, begin)
                self._ready.put(Chunk(sealed, at, num_blocks, begin, content, buffer))
                at += num_blocks
            return True
        finally:
            os.close(fd)
