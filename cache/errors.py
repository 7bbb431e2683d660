"""Errors of the warehouse, cut by what the caller can do.

    CacheError
    ├── FolderError        the warehouse can't open: fix the folder, then start again
    │   └── FolderInUse    another node store owns it
    ├── ArchiveError       an archive of extents can't be written or read
    ├── ExtentCorrupt      these bytes are not the block that was asked for: recompute it
    ├── ReadTimedOut       the disk does not answer: go on without it
    └── StoreUnavailable   the node store does not answer: go on without it

A miss, a refused store and a full tier are values, not errors.
"""


class CacheError(Exception):
    """Anything the warehouse raises on purpose."""


class FolderError(CacheError):
    """The disk tier's folder can't be used; the message names the folder, the cause and the remedy."""


class FolderInUse(FolderError):
    """Another process owns the folder."""


class ArchiveError(CacheError):
    """An archive of extents can't be written or read; the message names it and the cause."""


class ExtentCorrupt(CacheError):
    """An extent's bytes are not what its header or the reader's request promises."""


class ReadTimedOut(CacheError):
    """The disk does not answer."""


class StoreUnavailable(CacheError):
    """The node store is dead, restarting or too slow; the caller goes on without it."""
