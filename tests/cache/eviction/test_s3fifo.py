"""S3-FIFO: what is used again early stays, what is not leaves through the small queue."""

from cache.eviction import EvictionPolicy, S3FifoPolicy
from tests.contracts.eviction_policy import EvictionPolicyContract, ScanResistantContract


class TestS3FifoPolicy(EvictionPolicyContract, ScanResistantContract):
    def make(self) -> EvictionPolicy:
        return S3FifoPolicy()

    def test_what_was_used_in_the_small_queue_moves_to_the_main_one(self) -> None:
        policy = S3FifoPolicy()
        policy.add("used")
        policy.touch("used")
        for number in range(20):
            policy.add(f"{number}")
        assert repr(policy) == "<S3FifoPolicy 20 small, 1 main>"
        assert list(policy.victims())[:18] == [f"{number}" for number in range(18)], "all over a tenth"
        assert list(policy.victims())[18] == "used"

    def test_what_comes_back_soon_goes_straight_into_the_main_queue(self) -> None:
        policy = S3FifoPolicy()
        for extent_id in "abc":
            policy.add(extent_id)
        policy.remove("a")
        policy.add("a")
        assert repr(policy) == "<S3FifoPolicy 2 small, 1 main>"

    def test_in_the_main_queue_a_use_is_worth_another_round(self) -> None:
        policy = S3FifoPolicy()
        policy.restore((extent_id, 1) for extent_id in "abc")
        policy.touch("a")
        assert list(policy.victims()) == ["b", "c", "a"]
        policy.add("new")
        assert list(policy.victims()) == ["new", "b", "c", "a"], "its use is spent, its place is at the end"
