"""The order by the chance of reuse: it learns which groups are used again, and how soon."""

import itertools
import random
import sys

from cache.eviction import EvictionPolicy, LruPolicy, ReusePolicy
from tests.contracts.eviction_policy import EvictionPolicyContract, ScanResistantContract


def num_hits(policy: EvictionPolicy, uses: list[str], num_extents: int) -> int:
    """Uses that found their extent in a tier with room for so many."""
    held = set[str]()
    found = 0
    for extent_id in uses:
        if extent_id in held:
            found += 1
            policy.touch(extent_id)
            continue
        if len(held) == num_extents:
            victim = next(policy.victims())
            policy.remove(victim)
            held.remove(victim)
        policy.add(extent_id)
        held.add(extent_id)
    return found


class TestReusePolicy(EvictionPolicyContract, ScanResistantContract):
    def make(self) -> EvictionPolicy:
        return ReusePolicy()

    def test_of_equals_those_go_first_that_take_more_bytes_for_a_token(self) -> None:
        policy = ReusePolicy()
        policy.add("small", 100)
        policy.add("large", 400)
        policy.add("small too", 100)
        assert list(policy.victims()) == ["large", "small", "small too"]

    def test_it_says_how_often_its_extents_were_used(self) -> None:
        policy = ReusePolicy()
        for extent_id in "abcb":
            policy.add(extent_id)
        assert repr(policy) == "<ReusePolicy 3 extents, by uses [2, 1, 0, 0, 0]>"

    def test_what_comes_back_is_in_the_group_that_it_left_and_one_up(self) -> None:
        policy = ReusePolicy()
        policy.add("a")
        policy.touch("a")
        policy.remove("a")
        assert repr(policy) == "<ReusePolicy 0 extents, by uses [0, 0, 0, 0, 0]>"
        policy.add("a")
        assert repr(policy) == "<ReusePolicy 1 extents, by uses [0, 0, 1, 0, 0]>"

    def test_a_refresh_is_no_use(self) -> None:
        policy = ReusePolicy()
        policy.add("a")
        policy.refresh("a")
        assert repr(policy) == "<ReusePolicy 1 extents, by uses [1, 0, 0, 0, 0]>"

    def test_it_learns_that_traffic_is_recent_and_does_as_lru_does(self) -> None:
        """Uses fall off with age alone: the least recently used order is the best one there is."""
        rng = random.Random(1)
        uses = [f"{max(0, int(now - rng.expovariate(1 / 300)))}" for now in range(30_000)]
        assert num_hits(ReusePolicy(), uses, 300) > 0.98 * num_hits(LruPolicy(), uses, 300)

    def test_it_follows_when_the_hot_ones_change(self) -> None:
        rng = random.Random(1)
        uses = [f"{now // 5000} {int(rng.paretovariate(0.7)) % 3000}" for now in range(30_000)]
        assert num_hits(ReusePolicy(), uses, 300) > 0.98 * num_hits(LruPolicy(), uses, 300)

    def test_it_does_better_than_lru_where_some_are_always_hot(self) -> None:
        rng = random.Random(1)
        uses = [f"{int(rng.paretovariate(0.6)) % 20_000}" for _ in range(30_000)]
        assert num_hits(ReusePolicy(), uses, 100) > 1.01 * num_hits(LruPolicy(), uses, 100)

    def test_it_takes_a_bounded_room_for_an_extent(self) -> None:
        policy = ReusePolicy()
        number = itertools.count()
        for _ in range(20_000):
            policy.add(f"{next(number)}")
        queues = policy._queues.values()
        num_bytes = sum(sys.getsizeof(queue.last_used) for queue in queues)
        num_bytes += sys.getsizeof(policy._departed._digests) + sys.getsizeof(policy._departed._notes)
        assert num_bytes < 200 * 20_000
