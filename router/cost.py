"""Seconds that loading and computing KV take: the one cost function of router and loader.

A `CostModel` holds defaults until an engine has measured itself; `measured` then replaces what is known.
It knows nothing of queues or choices, and never reads a clock.
"""

from dataclasses import dataclass, fields, replace
from typing import Final, Literal

from cache.events import ReplicaLoad, Tier

REMOTE: Final = "remote"
Source = Tier | Literal["remote"]
"""Where stored tokens come from: a tier of the own node, or another node's store."""


@dataclass(frozen=True, slots=True)
class CostModel:
    """Speeds of one replica. Raises ValueError for a speed or size that is not positive."""

    bytes_per_token: int
    """KV of one token, all layers."""
    prefill_tokens_per_s: float = 300.0
    decode_step_s: float = 0.06
    dram_bytes_per_s: float = 4e9
    disk_bytes_per_s: float = 6e8
    remote_bytes_per_s: float = 3e8

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise ValueError(f"CostModel.{field.name} is {value}, it must be positive")

    def seconds_to_load(self, source: Source, num_tokens: int) -> float:
        """Time to bring the KV of `num_tokens` into the pool; nothing for tokens that are there already."""
        match source:
            case Tier.DEVICE:
                return 0.0
            case Tier.DRAM:
                bytes_per_s = self.dram_bytes_per_s
            case Tier.DISK:
                bytes_per_s = self.disk_bytes_per_s
            case "remote":
                bytes_per_s = self.remote_bytes_per_s
        return num_tokens * self.bytes_per_token / bytes_per_s

    def seconds_to_compute(self, num_tokens: int) -> float:
        """Time to prefill `num_tokens`, alone on the replica."""
        return num_tokens / self.prefill_tokens_per_s

    def measured(self, load: ReplicaLoad) -> "CostModel":
        """This model with everything that `load` has measured in the place of what was assumed."""
        speeds = dict(load.load_bytes_per_s)
        return replace(
            self,
            prefill_tokens_per_s=load.prefill_tokens_per_s or self.prefill_tokens_per_s,
            decode_step_s=load.decode_step_s or self.decode_step_s,
            dram_bytes_per_s=speeds.get(Tier.DRAM) or self.dram_bytes_per_s,
            disk_bytes_per_s=speeds.get(Tier.DISK) or self.disk_bytes_per_s,
        )
