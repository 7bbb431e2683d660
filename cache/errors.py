"""Errors of the warehouse, cut by what the caller can do.

    CacheError
    ├── FolderError        the warehouse can't open: fix the folder, then start again
    │   ├── FolderInUse    another node store owns it
    │   └── KeyFileError   the file with its key can't be used
    ├── ArchiveError       an archive of extents can't be written or read
    ├── ExtentCorrupt      these bytes are not the block that was asked for: recompute it
    ├── ExtentLocked       this extent is encrypted, and its key is not here: go on without it
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


class KeyFileError(FolderError):
    """The file with the warehouse's key can't be used; the message names the file, the cause and the remedy."""


class ArchiveError(CacheError):
    """An archive of extents can't be written or read; the message names it and the cause."""


class ExtentCorrupt(CacheError):
    """An extent's bytes are not what its header or the reader's request promises."""


class ExtentLocked(CacheError):
    """An extent is encrypted, and the key that opens it is not here. Nothing is wrong with it."""


class ReadTimedOut(CacheError):
    """The disk does not answer."""


class StoreUnavailable(CacheError):
    """The node store is dead, restarting or too slow; the caller goes on without it."""
