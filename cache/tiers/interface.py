"""The two seams between the node store and where bytes live. Tiers hold images and decide nothing."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from cache.extent import ExtentHeader, Image


class DramTier(Protocol):
    """Images in this node's memory, each put once under its extent's id."""

    def put(self, extent_id: str, image: Image) -> None:
        """Keep `image`, which the caller may reuse or free afterwards. Raises MemoryError if there is no room."""

    def get(self, extent_id: str) -> Image:
        """The image, read-only, valid as long as the caller holds it.

        Raises KeyError if it is not here, StoreUnavailable if it should be but can't be had.
        """

    def source(self, extent_id: str) -> Any:
        """What a reader, maybe in another process, turns into the image. Raises KeyError if it is not here."""

    def drop(self, extent_id: str) -> None:
        """Forget the image. Readers that hold it keep it."""


class DiskTier(Protocol):
    """Images as files that survive the process. Every method may raise OSError."""

    directory: Path

    def write(self, header: ExtentHeader, image: Image) -> None:
        """Make the image durable. Nothing of it is visible, now or after a crash, before this returns."""

    def read(self, extent_id: str) -> Image:
        """The whole image, unverified. Raises FileNotFoundError if it is gone."""

    def path(self, extent_id: str) -> str:
        """The file that a reader opens by itself."""

    def delete(self, extent_id: str) -> None:
        """Remove the image. Readers that have it open keep it; one that is gone already is no error."""

    def quarantine(self, extent_id: str) -> None:
        """Take a bad image out of use and keep a bounded number of them for whoever wants to look."""

    def recover(self) -> Iterator[ExtentHeader]:
        """What was durable when the folder was last used, least recently used first."""

    def save_order(self, extent_ids: list[str]) -> None:
        """Remember the order of use for the next start."""

    def free_bytes(self) -> int:
        """Free space of the file system."""

    def close(self) -> None:
        """Give up the folder."""
