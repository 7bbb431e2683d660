"""The warehouse for a script of one's own: store and load KV arrays by token ids, in process and without Ray.

A thin face of the same node store that the Ray actor wraps. Arrays are numpy's or torch's, on the host, of shape
`(num_layers, 2, num_tokens, num_kv_heads, head_dim)`, keys before values; torch is never imported from here.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from cache.client import WarehouseClient
from cache.disk_worker import DiskConfig
from cache.encryption import open_vault
from cache.extent import ExtentHeader, Image, KVShape
from cache.fingerprint import Fingerprint
from cache.hashing import TokenIds, as_token_ids, chain_hashes
from cache.messages import LoadQuery, StoreOffer, StoreStats
from cache.node_store import NodeStore, NodeStoreConfig
from cache.occupancy import Budgets
from cache.tiers.disk import FileTier
from cache.tiers.folder import LOCK_WAIT_S
from cache.tiers.memory import MemoryTier

_OWNER = "library"


class Warehouse:
    """KV of one model, kept in memory and, with a folder, on disk. Not thread-safe. Close it, or use it in a `with`."""

    def __init__(
        self,
        fingerprint: Fingerprint,
        shape: KVShape,
        *,
        directory: str | Path | None = None,
        dram_bytes: int = 1 << 30,
        disk_bytes: int = 16 << 30,
        lock_wait_s: float = LOCK_WAIT_S,
        encryption_key_file: str | Path | None = None,
    ) -> None:
        """What is stored under another fingerprint is never found. Raises FolderError if the folder can't be used.

        `lock_wait_s`: how long to wait for a folder that another process still holds. `encryption_key_file`: what is
        on disk is encrypted with the key in this file, 32 bytes or 64 hex digits, which its owner alone may read.
        """
        self._root_hash = fingerprint.root_hash()
        self._block_size = fingerprint.block_size
        self._shape = shape
        vault = open_vault(Path(encryption_key_file)) if encryption_key_file is not None else None
        disk = FileTier(Path(directory), lock_wait_s=lock_wait_s, vault=vault) if directory is not None else None
        budgets = Budgets(dram_bytes, disk_bytes, 0)
        self.node_store = NodeStore(NodeStoreConfig(budgets, DiskConfig()), MemoryTier(), disk)
        self._client = WarehouseClient(self.node_store, vault=vault)

    def __repr__(self) -> str:
        return f"<Warehouse {self.node_store!r}>"

    def __enter__(self) -> "Warehouse":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Write what is not written yet, and give up the folder."""
        self.node_store.close()

    def stats(self) -> StoreStats:
        return self.node_store.stats()

    def store(self, token_ids: Sequence[int] | TokenIds, kv: Any) -> bool:
        """Keep the KV of these tokens; what is there already is not copied again.

        False if there was no room for all of it. ValueError or TypeError for an array of another shape or kind.
        """
        ids = as_token_ids(token_ids)
        rows = self._rows_of(kv, len(ids))
        offer = StoreOffer(self._root_hash, self._hashes(ids), ids, self._block_size, self._shape, 0)

        def fill(header: ExtentHeader, image: Image) -> None:
            for index in range(header.num_blocks):
                begin, end = header.block_range(index)
                first = (header.first_block + index) * self._block_size
                num_tokens = len(header.block_token_ids(index))
                block = image[begin:end].reshape(*rows.shape[:2], num_tokens, *rows.shape[3:])
                block[...] = rows[:, :, first : first + num_tokens]

        return self._client.store(offer, fill)

    def load(self, token_ids: Sequence[int] | TokenIds, out: Any) -> int:
        """Fill `out` with the KV of as many leading tokens as are stored, verified to the bit; returns how many.

        `out` has room for all the tokens; what is behind the returned number is left as it was or holds rubbish.
        """
        ids = as_token_ids(token_ids)
        rows = self._rows_of(out, len(ids))
        query = LoadQuery(self._root_hash, self._hashes(ids), ids, self._block_size, 0, _OWNER)
        num_loaded = 0
        try:
            for block in self._client.read(query, self._client.lookup(query)):
                first = block.index * self._block_size
                stored = block.payload.reshape(*rows.shape[:2], block.stored_tokens, *rows.shape[3:])
                rows[:, :, first : first + block.num_tokens] = stored[:, :, : block.num_tokens]
                num_loaded = first + block.num_tokens
        finally:
            self._client.release(_OWNER)
        return num_loaded

    def lookup(self, token_ids: Sequence[int] | TokenIds) -> int:
        """How many leading tokens are stored."""
        ids = as_token_ids(token_ids)
        query = LoadQuery(self._root_hash, self._hashes(ids), ids, self._block_size, 0, _OWNER)
        num_tokens = self._client.lookup(query).num_tokens
        self._client.release(_OWNER)
        return num_tokens

    def _hashes(self, ids: TokenIds) -> tuple[Any, ...]:
        return tuple(chain_hashes(self._root_hash, ids, self._block_size))

    def _rows_of(self, array: Any, num_tokens: int) -> npt.NDArray[np.uint8]:
        """The array's own memory as bytes, `(num_layers, 2, num_tokens, num_kv_heads, bytes of a head)`."""
        shape = self._shape
        expected = (shape.num_layers, 2, num_tokens, shape.num_kv_heads, shape.row_bytes // shape.num_kv_heads)
        rows = _bytes_of(array)
        if rows.shape != expected:
            raise ValueError(
                f"expected KV of {shape.dtype} as (num_layers, 2, num_tokens, num_kv_heads, head_dim) = "
                f"{(*expected[:-1], shape.head_dim)}, got {tuple(array.shape)} of {array.dtype}"
            )
        return rows


def _bytes_of(array: Any) -> npt.NDArray[np.uint8]:
    if isinstance(array, np.ndarray):
        return array.view(np.uint8)
    torch: Any = sys.modules.get("torch")  # whoever has a tensor has imported it
    if torch is not None and isinstance(array, torch.Tensor):
        return cast("npt.NDArray[np.uint8]", array.detach().view(torch.uint8).numpy())
    raise TypeError(f"KV is a numpy array or a torch tensor on the host, not {type(array).__name__}")
