"""The dram tier in Ray's object store: one object per extent, owned by the process that holds this tier.

Ray frees an object about a second after its last reference is gone, so the ledger's bytes run a little
ahead of the store's; the store is sized for it (see `serving.config`).
"""

import threading
from contextlib import suppress
from typing import Any

import numpy as np
import ray

from cache.errors import StoreUnavailable
from cache.extent import Image

GET_TIMEOUT_S = 10.0
"""A local object is there in under a millisecond; one that takes this long is lost."""


class ObjectStoreTier:
    """Images as Ray objects. Lives in the node store's actor, so they outlive the engines that made them."""

    def __init__(self) -> None:
        self._refs: dict[str, Any] = {}

    def __repr__(self) -> str:
        return f"<ObjectStoreTier {len(self._refs)} objects>"

    def write_once(self, num_bytes: int) -> None:
        """Have the store's first memory written, and free again, on a thread of its own.

        Shared memory that is written for the first time takes ten times as long, and handoffs would wait for it.
        """
        threading.Thread(target=_write_once, args=(num_bytes,), name="tokenloft-store-memory", daemon=True).start()

    def put(self, extent_id: str, image: Image) -> None:
        try:
            self._refs[extent_id] = ray.put(image)
        except ray.exceptions.ObjectStoreFullError as error:
            raise MemoryError(f"Ray's object store has no room for {len(image)} bytes") from error

    def get(self, extent_id: str) -> Image:
        return read_object(self._refs[extent_id])

    def source(self, extent_id: str) -> Any:
        # Inside a list a reference stays a reference; bare, Ray would resolve it to the value on the way.
        return [self._refs[extent_id]]

    def drop(self, extent_id: str) -> None:
        self._refs.pop(extent_id, None)


def _write_once(num_bytes: int) -> None:
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
