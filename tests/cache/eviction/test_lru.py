"""Least recently used first."""

from cache.eviction import EvictionPolicy, LruPolicy
from tests.contracts.eviction_policy import EvictionPolicyContract


class TestLruPolicy(EvictionPolicyContract):
    def make(self) -> EvictionPolicy:
        return LruPolicy()

    def test_the_least_recently_used_goes_first(self) -> None:
        policy = LruPolicy()
        for extent_id in "abcd":
            policy.add(extent_id)
        policy.touch("a")
        policy.add("b")
        assert list(policy.victims()) == ["c", "d", "a", "b"]
        assert repr(policy) == "<LruPolicy 4 extents>"
