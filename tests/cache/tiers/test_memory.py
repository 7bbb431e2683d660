"""The dram tier in process memory."""

from typing import Any

from cache.extent import ALIGNMENT, Image
from cache.tiers.interface import DramTier
from cache.tiers.memory import MemoryTier
from tests.contracts.dram_tier import DramTierContract, image_of


class TestMemoryTier(DramTierContract):
    def make(self) -> DramTier:
        return MemoryTier()

    def fetch(self, source: Any) -> Image:
        image: Image = source
        return image

    def test_images_start_on_a_page(self) -> None:
        tier = MemoryTier()
        tier.put("a", image_of(1))
        assert tier.get("a").ctypes.data % ALIGNMENT == 0
        assert repr(tier) == "<MemoryTier 1 images>"
