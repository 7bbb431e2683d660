"""The warehouse: KV blocks that outlive the process that computed them. Usable by itself, see `Warehouse`."""

from cache.errors import CacheError, FolderError, FolderInUse
from cache.extent import KVShape
from cache.fingerprint import Fingerprint
from cache.library import Warehouse

__all__ = ["CacheError", "Fingerprint", "FolderError", "FolderInUse", "KVShape", "Warehouse"]
