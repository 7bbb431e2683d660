"""The dram tier in Ray's object store: one object per extent, owned by the process that holds this tier.

Ray frees an object about a second after its last reference is gone, so the ledger's bytes run a little
ahead of the store's; the store is sized for it (see `serving.config`).
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import ray

from cache.errors import StoreUnavailable
from cache.extent import Image

AHEAD_BYTES = 256 << 20
"""Memory that is ready beyond what is used: a prompt of some thousand tokens passes through it twice."""
GET_TIMEOUT_S = 10.0
"""A local object is there in under a millisecond; one that takes this long is lost."""


class ObjectStoreTier:
    """Images as Ray objects. Lives in the node store's actor, so they outlive the engines that made them."""

    def __init__(self, limit_bytes: int = 0, ahead_bytes: int = AHEAD_BYTES) -> None:
        """Memory for up to `limit_bytes` of images is taken from the machine ahead of its use."""
        self._refs: dict[str, tuple[Any, int]] = {}
        self._lock = threading.Lock()
        self._used_bytes = 0
        self._limit_bytes = limit_bytes
        self._ahead_bytes = ahead_bytes
        self._ready_bytes = 0
        self._thread = ThreadPoolExecutor(1, "tokenloft-store-memory")
        self._use(0)

    def __repr__(self) -> str:
        return f"<ObjectStoreTier {len(self._refs)} objects, {self._ready_bytes} bytes ready>"

    def put(self, extent_id: str, image: Image) -> None:
        try:
            self._refs[extent_id] = ray.put(image), len(image)
        except ray.exceptions.ObjectStoreFullError as error:
            raise MemoryError(f"Ray's object store has no room for {len(image)} bytes") from error
        self._use(len(image))

    def get(self, extent_id: str) -> Image:
        return read_object(self._refs[extent_id][0])

    def source(self, extent_id: str) -> Any:
        # Inside a list a reference stays a reference; bare, Ray would resolve it to the value on the way.
        return [self._refs[extent_id][0]]

    def drop(self, extent_id: str) -> None:
        _, num_bytes = self._refs.pop(extent_id, (None, 0))
        self._use(-num_bytes)

    def _use(self, num_bytes: int) -> None:
        """So many bytes more are used, or less: see that there is enough ready beyond them."""
        with self._lock:
            self._used_bytes += num_bytes
            wanted = min(self._limit_bytes, self._used_bytes + self._ahead_bytes)
            # Not for every image: an object must be as large as all that is ready and free to reach beyond it.
            is_worth_it = wanted - self._ready_bytes > self._ahead_bytes // 2 or wanted == self._limit_bytes
            if wanted > self._ready_bytes and is_worth_it:
                self._ready_bytes = wanted
                self._thread.submit(_write_once, wanted - self._used_bytes)


def _write_once(num_bytes: int) -> None:
    """Have the store's next free memory written, and free again.

    Shared memory that is written for the first time takes ten times as long, and a handoff would wait for it.
    """
    with suppress(ray.exceptions.RayError):  # no room: then it is as slow as it is
        ray.put(np.zeros(num_bytes, np.uint8))


def read_object(ref: Any) -> Image:
    """The image behind a reference, a read-only view of shared memory. Raises StoreUnavailable if it is lost."""
    try:
        image = ray.get(ref, timeout=GET_TIMEOUT_S)
    except (ray.exceptions.RayError, TimeoutError) as error:
        raise StoreUnavailable(f"a stored extent can't be fetched: {error}") from error
    if not isinstance(image, np.ndarray):
        raise StoreUnavailable(f"a stored extent turned out to be a {type(image).__name__}")
    return image
