"""The two seams between the node store and where bytes live. Tiers hold images and decide nothing."""

from pathlib import Path
from typing import Any, Protocol

from cache.extent import ExtentHeader, Image
from cache.locked import LockedExtent


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
        """Put the image down. Nothing of it is visible, now or after a crash, before `commit` returns.

        Raises ExtentCorrupt if it is to be encrypted and not whole.
        """

    def commit(self) -> list[str]:
        """Make everything written since the last commit durable and visible; returns the extents' ids.

        After an error none of it counts: `abandon` takes it away.
        """

    def abandon(self) -> None:
        """Take away what was written and not committed. Raises nothing: the next start takes what is left."""

    def read(self, extent_id: str) -> Image:
        """The whole image in plain, unverified.

        Raises FileNotFoundError if it is gone, ExtentCorrupt if it is not what was encrypted.
        """

    def path(self, extent_id: str) -> str:
        """The file that a reader opens by itself."""

    def delete(self, extent_id: str) -> None:
        """Remove the image. Readers that have it open keep it; one that is gone already is no error."""

    def quarantine(self, extent_id: str) -> None:
        """Take a bad image out of use and keep a bounded number of them for whoever wants to look."""

    def recover(self) -> list[ExtentHeader]:
        """What was durable when the folder was last used, least recently used first. Given out once."""

    def recover_locked(self) -> list[LockedExtent]:
        """What is there too, and takes room, but is encrypted with a key that is not here. Given out once."""

    def is_intact(self) -> bool:
        """False if the folder has been taken away or replaced under this tier."""

    def reopen(self) -> None:
        """Own the folder anew, as it is now; what `recover` gives then is all there is. Raises FolderError."""

    def probe(self) -> None:
        """Write and remove a page, to see whether the disk works."""

    def holds(self, extent_id: str) -> bool:
        """There is a file of this extent, whatever the index says."""

    def forget_deleted(self) -> None:
        """Leave no trace of deleted extents in the index, and none in quarantine."""

    def save_order(self, extent_ids: list[str]) -> None:
        """Remember the order of use for the next start."""

    def free_bytes(self) -> int:
        """Free space of the file system."""

    def close(self) -> None:
        """Give up the folder."""
