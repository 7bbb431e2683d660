"""The KV of all sequences of one engine: a single tensor cut into blocks.

    kv[layer, 0 = key | 1 = value, slot, kv_head, :]        slot = block_id * block_size + row

Tokens come first within a layer, so consecutive blocks are one view for attention, and the rows of a block
are contiguous for copies. This module moves bytes and never knows which block is free, shared or valid:
that is the ledger's work. Storing and loading keep every bit, unless another dtype is asked for (see `kv_codec`).

Threads: calls that touch disjoint blocks may run at the same time, also beside a forward pass. On a CPU the
copies release the interpreter lock and use one thread, so that a load does not slow a step down.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from cache.extent import KVShape, aligned_empty
from serving.engine.kv_codec import make_codec

Bytes = npt.NDArray[np.uint8]

KV_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Shape of the KV of one token and of one block."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str
    """One of `KV_DTYPES`."""

    @property
    def torch_dtype(self) -> torch.dtype:
        return KV_DTYPES[self.dtype]

    @property
    def row_bytes(self) -> int:
        """Bytes of the keys, or of the values, of one token in one layer."""
        return self.num_kv_heads * self.head_dim * self.torch_dtype.itemsize

    @property
    def bytes_per_token(self) -> int:
        return self.num_layers * 2 * self.row_bytes

    @property
    def block_bytes(self) -> int:
        return self.bytes_per_token * self.block_size

    def stored_shape(self, stored_dtype: str | None = None) -> KVShape:
        """Shape of the KV when it is stored as `stored_dtype`; None is the engine's own."""
        return KVShape(self.num_layers, self.num_kv_heads, self.head_dim, stored_dtype or self.dtype)


class KVPool:
    """`num_blocks` blocks of KV on one device, stored and loaded as `stored_dtype`, None being the layout's own."""

    def __init__(
        self,
        layout: KVLayout,
        num_blocks: int,
        device: torch.device | str = "cpu",
        stored_dtype: str | None = None,
    ) -> None:
        """ValueError for a stored dtype that `KVShape` does not know."""
        self.layout = layout
        self.stored_shape = layout.stored_shape(stored_dtype)
        self._codec = make_codec(layout.torch_dtype, self.stored_shape)
        self.num_blocks = num_blocks
        num_slots = num_blocks * layout.block_size
        shape = (layout.num_layers, 2, num_slots, layout.num_kv_heads, layout.head_dim)
        self.kv = _empty(shape, layout.torch_dtype, torch.device(device))
        # numpy knows no bfloat16 and copies without OpenMP threads: bytes serve both ends.
        self._rows = self.kv.view(torch.uint8).view(layout.num_layers, 2, num_slots * layout.row_bytes)
        self._host_rows: Bytes | None = self._rows.numpy() if self.kv.device.type == "cpu" else None

    def __repr__(self) -> str:
        layout = self.layout
        mib = self.num_blocks * layout.block_bytes / 2**20
        return f"<KVPool {self.num_blocks} blocks of {layout.block_size} tokens, {layout.dtype}, {mib:.1f} MiB>"

    @property
    def device(self) -> torch.device:
        return self.kv.device

    def copy_rows(self, src_slot: int, dst_slot: int, num_tokens: int) -> None:
        """Copy `num_tokens` rows of all layers from `src_slot` on to `dst_slot` on; the two ranges must not overlap."""
        if abs(src_slot - dst_slot) < num_tokens:
            raise ValueError(f"cannot copy {num_tokens} rows from slot {src_slot} to {dst_slot}: the ranges overlap")
        self._check_slots(src_slot, num_tokens)
        self._check_slots(dst_slot, num_tokens)
        source = self.kv[:, :, src_slot : src_slot + num_tokens]
        self.kv[:, :, dst_slot : dst_slot + num_tokens].copy_(source)

    def export(self, blocks: Sequence[tuple[int, int]], out: Bytes) -> None:
        """Write the first `num_tokens` rows of each `(block_id, num_tokens)` into `out`, block after block.

        A block is written as `(num_layers, 2, num_tokens, num_kv_heads, head_dim)` of the stored dtype, contiguous,
        scales after the values they belong to. `out` is contiguous uint8 of shape
        `(stored_shape.bytes_per_token * all tokens,)`; ValueError if it is not.
        """
        bytes_per_token = self.stored_shape.bytes_per_token
        self._check_payload(out, bytes_per_token * sum(num_tokens for _, num_tokens in blocks))
        start = 0
        for block_id, num_tokens in blocks:
            end = start + bytes_per_token * num_tokens
            self._read_block(block_id, num_tokens, out[start:end])
            start = end

    def import_(self, block_id: int, num_tokens: int, payload: Bytes, stored_tokens: int | None = None) -> None:
        """Fill the first `num_tokens` rows of a block from `payload`, one block as `export` wrote it.

        `payload` is contiguous uint8, may be read-only, and holds `stored_tokens` tokens (`num_tokens` if not
        given), of which only the first are taken. ValueError if its size does not fit.
        """
        stored = num_tokens if stored_tokens is None else stored_tokens
        if not num_tokens <= stored:
            raise ValueError(f"{num_tokens} tokens wanted from a stored block of {stored}")
        self._check_payload(payload, self.stored_shape.bytes_per_token * stored)
        first, last = self._block_range(block_id, num_tokens)
        if self._codec is not None:
            self._codec.decode(payload, self._rows_as_kv(first, last))
            return
        layout = self.layout
        rows = payload.reshape(layout.num_layers, 2, stored * layout.row_bytes)[:, :, : last - first]
        if self._host_rows is not None:
            self._host_rows[:, :, first:last] = rows
        else:
            # A copy of our own: torch refuses read-only arrays, and stored payloads are read-only.
            self._rows[:, :, first:last] = torch.from_numpy(rows.copy()).to(self.device)

    def _read_block(self, block_id: int, num_tokens: int, out: Bytes) -> None:
        first, last = self._block_range(block_id, num_tokens)
        if self._codec is not None:
            self._codec.encode(self._rows_as_kv(first, last), out)
            return
        rows = out.reshape(self.layout.num_layers, 2, last - first)
        if self._host_rows is not None:
            rows[...] = self._host_rows[:, :, first:last]
        else:
            rows[...] = self._rows[:, :, first:last].cpu().numpy()

    def _block_range(self, block_id: int, num_tokens: int) -> tuple[int, int]:
        """Where the first `num_tokens` rows of a block lie in `_rows`' last dimension, in bytes."""
        if not 0 <= block_id < self.num_blocks:
            raise ValueError(f"block {block_id} is not in this pool of {self.num_blocks} blocks")
        if not 0 < num_tokens <= self.layout.block_size:
            raise ValueError(f"{num_tokens} tokens do not fit a block of {self.layout.block_size}")
        first = block_id * self.layout.block_size * self.layout.row_bytes
        return first, first + num_tokens * self.layout.row_bytes

    def _rows_as_kv(self, first: int, last: int) -> torch.Tensor:
        """The KV of such a range, `(num_layers, 2, num_tokens, num_kv_heads, head_dim)`."""
        return self.kv[:, :, first // self.layout.row_bytes : last // self.layout.row_bytes]

    def _check_slots(self, slot: int, num_tokens: int) -> None:
        if slot < 0 or slot + num_tokens > self.num_blocks * self.layout.block_size:
            raise ValueError(f"slots {slot} to {slot + num_tokens} are not all in this pool")

    def _check_payload(self, payload: Bytes, expected: int) -> None:
        # A non-contiguous array would be reshaped into a copy, and an export would be written to nowhere.
        if payload.dtype != np.uint8 or payload.shape != (expected,) or not payload.flags.c_contiguous:
            raise ValueError(
                f"expected {expected} contiguous bytes as uint8, got shape {payload.shape} of {payload.dtype}"
            )


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Left empty on purpose: memory is taken from the machine when a block is first written.

    A slot that was never written is never read. On a CPU the memory is numpy's, which asks for huge pages: each piece
    of a block that is written first would otherwise cost more in page faults than in copying.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.from_numpy(aligned_empty(math.prod(shape) * dtype.itemsize)).view(dtype).view(shape)
