"""Has the machine give memory for the pool's next blocks before they are written, on a thread of its own.

A pool takes memory as it is used. A first write waits for it, though: a block lies in as many places as the model has
layers, and for each a large page has to be found and cleared, or on a virtual machine asked from its host. A load of a
chunk of prompt took ten times as long into blocks like that. Nothing is ever written here, so blocks may be in use.
"""

import ctypes
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

from serving.engine.cores import begin_background_thread
from serving.engine.kv_pool import KVPool

AHEAD_BYTES = 64 << 20
"""Memory that is ready beyond the blocks that have been used: as much as a prompt of some thousand tokens takes."""
_POPULATE_WRITE = 23
"""`MADV_POPULATE_WRITE` of Linux 5.14 and later."""


class PoolMemory:
    """Of one pool. `reach` belongs to one thread; `close` once at the end."""

    def __init__(self, pool: KVPool, ahead_bytes: int = AHEAD_BYTES) -> None:
        self._pool = pool
        self._num_ahead = max(1, ahead_bytes // pool.layout.block_bytes)
        self._num_asked = 0
        self._thread = ThreadPoolExecutor(1, "tokenloft-pool-memory", begin_background_thread)

    def __repr__(self) -> str:
        return f"<PoolMemory {self._num_asked} of {self._pool.num_blocks} blocks>"

    def reach(self, num_blocks: int) -> None:
        """The pool's first `num_blocks` blocks have been used: get memory for those that follow."""
        end = min(self._pool.num_blocks, num_blocks + self._num_ahead)
        # A few blocks at a time would be many calls.
        if self._num_asked < end and (end - self._num_asked >= self._num_ahead / 4 or end == self._pool.num_blocks):
            self._thread.submit(populate, self._pool, self._num_asked, end)
            self._num_asked = end

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)


def populate(pool: KVPool, first_block: int, end_block: int) -> None:
    """Back blocks with memory; their content stays as it is. Does nothing where the system has no such call."""
    advise = _madvise()
    if advise is None or pool.device.type != "cpu":
        return
    page = 4096
    slots = slice(first_block * pool.layout.block_size, end_block * pool.layout.block_size)
    for rows in pool.kv[:, :, slots].flatten(0, 1):
        first = rows.data_ptr() // page * page
        end = -(-(rows.data_ptr() + rows.nbytes) // page) * page
        if advise(first, end - first, _POPULATE_WRITE):
            return  # an older system, or no memory left: then the first write gets it, or finds out


@cache
def _madvise() -> Any | None:
    if not sys.platform.startswith("linux"):
        return None
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return advise
