"""The dram tier in Ray's object store, on a real local Ray."""

import threading
import time
from typing import Any

import numpy as np
import pytest
import ray

from cache.errors import StoreUnavailable
from cache.extent import Image
from cache.tiers.interface import DramTier
from cache.tiers.object_store import ObjectStoreTier, read_object
from tests.contracts.dram_tier import DramTierContract, image_of


@pytest.mark.usefixtures("local_ray")
class TestObjectStoreTier(DramTierContract):
    def make(self) -> DramTier:
        return ObjectStoreTier()

    def fetch(self, source: Any) -> Image:
        (ref,) = source
        return read_object(ref)

    def test_another_process_reads_the_same_memory(self) -> None:
        tier = ObjectStoreTier()
        tier.put("a", image_of(3))

        @ray.remote(num_cpus=0)
        def look(source: list[Any]) -> tuple[int, bool, bool]:
            image = ray.get(source[0])
            return int(image.sum()), image.flags.owndata, image.flags.writeable

        assert ray.get(look.remote(tier.source("a"))) == (int(image_of(3).sum()), False, False)

    def test_memory_that_was_written_once_is_free_again(self) -> None:
        """It would not fit twice."""
        cluster: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        num_bytes = int(cluster["object_store_memory"] * 0.6)
        tier = ObjectStoreTier()
        for _ in range(2):
            tier.write_once(num_bytes)
            for thread in threading.enumerate():
                if thread.name == "tokenloft-store-memory":
                    thread.join(60)
            time.sleep(2.0)  # Ray frees what is dropped after a second
        image = np.full(num_bytes, 3, np.uint8)
        tier.put("a", image)
        assert np.array_equal(tier.get("a"), image)

    def test_something_else_than_an_image_is_not_taken_for_one(self) -> None:
        with pytest.raises(StoreUnavailable, match="turned out to be a str"):
            read_object(ray.put("no image"))

    def test_an_object_whose_owner_died_is_unavailable(self) -> None:
        @ray.remote(num_cpus=0)
        class Owner:
            def put(self) -> list[Any]:
                return [ray.put(np.zeros(1000, np.uint8))]

        owner: Any = Owner.remote()  # type: ignore[attr-defined]
        (ref,) = ray.get(owner.put.remote())
        ray.kill(owner)
        deadline = time.monotonic() + 30.0

        def read_on() -> None:
            while time.monotonic() < deadline:  # Ray frees a dead owner's objects within a second or so
                read_object(ref)

        with pytest.raises(StoreUnavailable, match="can't be fetched"):
            read_on()
