"""Eviction policies: pure objects that order a tier's extents, the best victim first."""

from collections.abc import Callable, Mapping
from typing import Literal

from cache.eviction.interface import EvictionPolicy
from cache.eviction.lru import LruPolicy
from cache.eviction.reuse import ReusePolicy
from cache.eviction.s3fifo import S3FifoPolicy

PolicyName = Literal["reuse", "lru", "s3fifo"]
POLICIES: Mapping[PolicyName, Callable[[], EvictionPolicy]] = {
    "reuse": ReusePolicy,
    "lru": LruPolicy,
    "s3fifo": S3FifoPolicy,
}

__all__ = ["POLICIES", "EvictionPolicy", "LruPolicy", "PolicyName", "ReusePolicy", "S3FifoPolicy"]
