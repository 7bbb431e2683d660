"""Who holds which leading blocks of one request's chain: the mirror's answer to one lookup.

Values only. Blocks are counted from the start of the prompt; a place behind a hole that nobody can fill
does not count.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import reduce
from operator import or_

NOT_HERE, IN_DRAM, IN_DISK = 0, 1, 2
"""Codes of `Holdings.nodes`: the fastest tier in which a node's store has a block."""


@dataclass(frozen=True, slots=True)
class Sources:
    """Where the leading blocks would come from for one replica, `num_blocks` of them in all."""

    device_blocks: int = 0
    dram_blocks: int = 0
    disk_blocks: int = 0
    remote_blocks: int = 0

    @property
    def num_blocks(self) -> int:
        return self.device_blocks + self.dram_blocks + self.disk_blocks + self.remote_blocks


@dataclass(frozen=True, slots=True)
class Holdings:
    """Holders of a chain's blocks, up to the first block that nobody holds."""

    devices: Mapping[str, int] = field(default_factory=dict)
    """Leading blocks in each replica's own pool; replicas without the first block are absent."""
    nodes: Mapping[str, bytes] = field(default_factory=dict)
    """One code per block for each node with at least one of them, all of one length."""

    def sources(self, replica_id: str, node_id: str) -> Sources:
        """The own pool first, then for each block the own node's fastest tier, then another node's store.

        block    0 1 2 3 4 5 6 7
        device   x x x
        own node   d d d   k         d: dram, k: disk
        others     d     d d d       -> 3 device, 1 dram, 1 disk, 2 remote, then nobody
        """
        device_blocks = self.devices.get(replica_id, 0)
        anywhere = _union(self.nodes.values())
        end = anywhere.find(NOT_HERE, device_blocks)
        if end < 0:
            end = len(anywhere)
        run = self.nodes.get(node_id, bytes(len(anywhere)))[device_blocks:end]
        return Sources(device_blocks, run.count(IN_DRAM), run.count(IN_DISK), run.count(NOT_HERE))


def _union(codes: Collection[bytes]) -> bytes:
    """Bytewise or, without a Python step per block: a prompt has thousands of them."""
    length = max(map(len, codes), default=0)
    return reduce(or_, (int.from_bytes(each, "big") for each in codes), 0).to_bytes(length, "big")
