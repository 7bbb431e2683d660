"""What every eviction policy promises. A test class inherits it and says how to make a policy."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.eviction import EvictionPolicy

IDS = st.sampled_from(list("abcdef"))
STEPS = st.lists(st.tuples(st.sampled_from(["add", "touch", "remove"]), IDS), max_size=30)


class EvictionPolicyContract:
    def make(self) -> EvictionPolicy:
        raise NotImplementedError

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

    def test_the_one_just_used_is_not_the_first_to_go(self) -> None:
        policy = self.make()
        for extent_id in "abc":
            policy.add(extent_id)
        policy.touch("a")
        assert next(policy.victims()) != "a"

    @pytest.mark.parametrize("step", ["touch", "remove"])
    def test_unknown_ids_are_ignored(self, step: str) -> None:
        policy = self.make()
        getattr(policy, step)("never seen")
        assert list(policy.victims()) == []
