"""What every eviction policy promises. A test class inherits it and says how to make a policy."""

import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache.eviction import EvictionPolicy

IDS = st.sampled_from(list("abcdef"))
STEPS = st.lists(st.tuples(st.sampled_from(["add", "touch", "refresh", "remove"]), IDS), max_size=30)
TIER = 50
"""Extents that fit."""


def take_victim(policy: EvictionPolicy) -> str:
    victim = next(policy.victims())
    policy.remove(victim)
    return victim


class EvictionPolicyContract:
    def make(self) -> EvictionPolicy:
        raise NotImplementedError

    @settings(suppress_health_check=[HealthCheck.differing_executors])  # each policy has examples of its own
    @given(steps=STEPS)
    def test_victims_are_exactly_what_is_in_the_tier(self, steps: list[tuple[str, str]]) -> None:
        policy, held = self.make(), set[str]()
        for step, extent_id in steps:
            getattr(policy, step)(extent_id)
            if step == "add":
                held.add(extent_id)
            elif step == "remove":
                held.discard(extent_id)
            victims = list(policy.victims())
            assert sorted(victims) == sorted(held)

    def test_asking_for_victims_changes_nothing(self) -> None:
        policy = self.make()
        for extent_id in "abc":
            policy.add(extent_id)
        assert list(policy.victims()) == list(policy.victims())

    @pytest.mark.parametrize("step", ["touch", "refresh"])
    def test_the_one_just_used_is_not_the_first_to_go(self, step: str) -> None:
        policy = self.make()
        for extent_id in "abc":
            policy.add(extent_id)
        getattr(policy, step)("a")
        assert next(policy.victims()) != "a"

    @pytest.mark.parametrize("step", ["touch", "refresh", "remove"])
    def test_unknown_ids_are_ignored(self, step: str) -> None:
        policy = self.make()
        getattr(policy, step)("never seen")
        assert list(policy.victims()) == []

    def test_an_order_that_was_saved_goes_on(self) -> None:
        policy = self.make()
        policy.restore((extent_id, 100) for extent_id in "abcd")
        assert list(policy.victims()) == list("abcd")
        policy.touch("a")
        policy.add("e", 100)
        assert [victim for victim in policy.victims() if victim != "e"] == ["b", "c", "d", "a"]
        policy.remove("b")
        assert sorted(policy.victims()) == list("acde")

    def test_of_never_used_ones_the_oldest_goes_first(self) -> None:
        policy = self.make()
        for number in range(TIER):
            policy.add(f"{number}")
        assert [take_victim(policy) for _ in range(TIER)] == [f"{number}" for number in range(TIER)]

    def test_a_chain_that_is_stored_root_first_goes_leaf_first(self) -> None:
        policy = self.make()
        for chain in "ab":
            for depth in range(5):
                policy.add(f"{chain}{depth}")
                for above in reversed(range(depth)):
                    policy.refresh(f"{chain}{above}")
        assert list(policy.victims()) == [f"{chain}{depth}" for chain in "ab" for depth in reversed(range(5))]


class ScanResistantContract:
    """For those that promise more than the least recently used order."""

    def make(self) -> EvictionPolicy:
        raise NotImplementedError

    def test_a_scan_leaves_most_of_the_hot_set_alone(self) -> None:
        """Each of 20 hot ones comes once in 100 uses, all else is new: with room for 50, no hot one outlives LRU."""
        policy, held = self.make(), set[str]()
        num_found = num_asked = 0
        new = itertools.count()
        for number in range(20_000):
            is_hot = number % 5 == 0
            extent_id = f"hot {number // 5 % 20}" if is_hot else f"new {next(new)}"
            if is_hot and number >= 10_000:
                num_asked += 1
                num_found += extent_id in held
            if extent_id in held:
                policy.touch(extent_id)
                continue
            if len(held) == TIER:
                held.remove(take_victim(policy))
            policy.add(extent_id)
            held.add(extent_id)
        assert num_found > 0.8 * num_asked
