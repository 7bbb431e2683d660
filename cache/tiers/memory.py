"""The dram tier as plain process memory: for in-process use and for tests, without Ray."""

from cache.extent import Image, aligned_empty


class MemoryTier:
    """Images as private, read-only copies."""

    def __init__(self) -> None:
        self._images: dict[str, Image] = {}

    def __repr__(self) -> str:
        return f"<MemoryTier {len(self._images)} images>"

    def put(self, extent_id: str, image: Image) -> None:
        copy = aligned_empty(len(image))
        copy[:] = image
        copy.flags.writeable = False
        self._images[extent_id] = copy

    def get(self, extent_id: str) -> Image:
        return self._images[extent_id]

    def source(self, extent_id: str) -> Image:
        return self._images[extent_id]

    def drop(self, extent_id: str) -> None:
        self._images.pop(extent_id, None)
