"""Seconds that loading and computing KV take: the one cost function of router and loader.

A `CostModel` holds defaults until an engine has measured itself; `measured` then replaces what is known.
It knows nothing of queues or choices, and never reads a clock.
"""

from collections.abc import Iterable
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
    """Of the first tokens of a prompt."""
    prefill_s_per_position: float = 0.0
    """What a token takes longer for each token before it, whose KV it attends to. May be 0."""
    decode_step_s: float = 0.06
    dram_bytes_per_s: float = 4e9
    disk_bytes_per_s: float = 6e8
    remote_bytes_per_s: float = 3e8

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            is_zero_fine = field.name == "prefill_s_per_position"
            if not value > 0 and not (is_zero_fine and value == 0):
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

    def seconds_to_compute(self, num_tokens: int, first_token: int = 0) -> float:
        """Time to prefill `num_tokens` that follow `first_token` others, alone on the replica."""
        num_before = first_token + num_tokens / 2
        return num_tokens * (1 / self.prefill_tokens_per_s + num_before * self.prefill_s_per_position)

    def measured(self, load: ReplicaLoad) -> "CostModel":
        """This model with everything that `load` has measured in the place of what was assumed."""
        model = self.with_speeds(load.prefill_tokens_per_s, load.prefill_s_per_position, load.load_bytes_per_s)
        return replace(model, decode_step_s=load.decode_step_s or self.decode_step_s)

    def with_speeds(
        self,
        prefill_tokens_per_s: float,
        prefill_s_per_position: float,
        load_bytes_per_s: Iterable[tuple[Tier, float]],
    ) -> "CostModel":
        """This model with these speeds in the place of what was assumed; 0 stands for one that is not known."""
        speeds = dict(load_bytes_per_s)
        return replace(
            self,
            prefill_tokens_per_s=prefill_tokens_per_s or self.prefill_tokens_per_s,
            prefill_s_per_position=prefill_s_per_position or self.prefill_s_per_position,
            dram_bytes_per_s=speeds.get(Tier.DRAM) or self.dram_bytes_per_s,
            disk_bytes_per_s=speeds.get(Tier.DISK) or self.disk_bytes_per_s,
        )
