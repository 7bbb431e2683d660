"""What every dram tier promises. A test class inherits it and says how to make a tier and read from it."""

from typing import Any

import numpy as np
import pytest

from cache.extent import Image, aligned_empty
from cache.tiers.interface import DramTier


def image_of(value: int, num_bytes: int = 10_000) -> Image:
    image = aligned_empty(num_bytes)
    image[:] = np.arange(num_bytes, dtype=np.uint64) * 7 + value
    return image


class DramTierContract:
    def make(self) -> DramTier:
        raise NotImplementedError

    def fetch(self, source: Any) -> Image:
        """What a reader makes of a source."""
        raise NotImplementedError

    def test_get_and_source_give_what_was_put(self) -> None:
        tier = self.make()
        tier.put("a", image_of(1))
        tier.put("b", image_of(2, 123_457))
        assert np.array_equal(tier.get("a"), image_of(1))
        assert np.array_equal(self.fetch(tier.source("b")), image_of(2, 123_457))

    def test_the_callers_array_may_change_afterwards(self) -> None:
        tier, image = self.make(), image_of(1)
        tier.put("a", image)
        image[:] = 0
        assert np.array_equal(tier.get("a"), image_of(1))

    def test_an_image_is_read_only(self) -> None:
        tier = self.make()
        tier.put("a", image_of(1))
        for image in (tier.get("a"), self.fetch(tier.source("a"))):
            with pytest.raises(ValueError, match="read-only"):
                image[0] = 1

    def test_what_is_not_here_is_a_key_error(self) -> None:
        tier = self.make()
        tier.put("a", image_of(1))
        tier.drop("a")
        for extent_id in ("a", "never put"):
            with pytest.raises(KeyError):
                tier.get(extent_id)
            with pytest.raises(KeyError):
                tier.source(extent_id)

    def test_dropping_twice_is_nothing(self) -> None:
        tier = self.make()
        tier.put("a", image_of(1))
        tier.drop("a")
        tier.drop("a")

    def test_a_reader_keeps_what_is_dropped_or_replaced_meanwhile(self) -> None:
        tier = self.make()
        tier.put("a", image_of(1))
        held, source = tier.get("a"), tier.source("a")
        tier.drop("a")
        tier.put("a", image_of(2))
        assert np.array_equal(held, image_of(1))
        assert np.array_equal(self.fetch(source), image_of(1))
        assert np.array_equal(tier.get("a"), image_of(2))

    def test_many_images_live_side_by_side(self) -> None:
        tier = self.make()
        for value in range(20):
            tier.put(str(value), image_of(value, 1000 + value))
        for value in range(20):
            assert np.array_equal(tier.get(str(value)), image_of(value, 1000 + value))
