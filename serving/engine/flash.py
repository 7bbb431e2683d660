"""Attention of a whole step by FlashAttention, where there is a CUDA device for it: one call for each layer.

All parts of the step are sequences of queries of their own length over keys of their own length, causal at the end:

    paged      keys and values stay in the pool, found by block tables     needs an implementation that knows these, FA3
    gathered   keys and values are copied one sequence after the other     any implementation, torch's own FA2 too

Which of the two works on a machine is tried out once, with attention in plain operations as the judge: an
implementation that is missing, refuses, or gives something else is not used.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

logger = logging.getLogger("tokenloft.engine")

Mode = Literal["paged", "gathered"]
Varlen = Callable[..., Any]
"""`torch.nn.attention.varlen.varlen_attn`, or what does the same."""

_HALF_DTYPES = (torch.bfloat16, torch.float16)
_TOLERANCE = 3e-2
"""Of the trial, whose values are around 1, in half precision."""


@dataclass(frozen=True, slots=True)
class Span:
    """One part of a step: its queries are the last of its keys."""

    num_queries: int
    num_keys: int
    block_table: Sequence[int]
    """Blocks of the keys."""


@dataclass(frozen=True, slots=True)
class FlashPlan:
    """`N` parts, planned once per step, used by every layer. Index tensors are on the pool's device."""

    cu_queries: torch.Tensor
    """`(N + 1,)` int32, where the queries of each part begin and the last ones end."""
    cu_keys: torch.Tensor | None
    """`(N + 1,)` int32, the same of gathered keys."""
    slots: torch.Tensor | None
    """`(sum of keys,)` int64, the slots to gather."""
    num_keys: torch.Tensor | None
    """`(N,)` int32, of paged keys."""
    block_tables: torch.Tensor | None
    """`(N, most blocks)` int32, filled up with block 0."""
    max_queries: int
    max_keys: int
    block_size: int


def plan_flash(spans: Sequence[Span], block_size: int, mode: Mode, device: torch.device) -> FlashPlan:
    """Plan for at least one part."""

    def ints(values: Any, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.from_numpy(np.asarray(values)).to(device, dtype)

    def sums(lengths: list[int]) -> torch.Tensor:
        return ints(np.concatenate([[0], np.cumsum(lengths)]))

    num_queries, num_keys = [span.num_queries for span in spans], [span.num_keys for span in spans]
    tables = [np.asarray(span.block_table[: -(-span.num_keys // block_size)], np.int64) for span in spans]
    is_paged = mode == "paged"
    if is_paged:
        width = max(map(len, tables))
        block_tables, slots = ints(np.stack([np.pad(table, (0, width - len(table))) for table in tables])), None
    else:
        rows = np.arange(block_size)
        each = [
            (table[:, None] * block_size + rows).ravel()[:count] for table, count in zip(tables, num_keys, strict=True)
        ]
        block_tables, slots = None, ints(np.concatenate(each), torch.int64)
    return FlashPlan(
        cu_queries=sums(num_queries),
        cu_keys=None if is_paged else sums(num_keys),
        slots=slots,
        num_keys=ints(num_keys) if is_paged else None,
        block_tables=block_tables,
        max_queries=max(num_queries),
        max_keys=max(num_keys),
        block_size=block_size,
    )


def attend_flash(
    plan: FlashPlan, kv: torch.Tensor, query: torch.Tensor, scale: float, varlen: Varlen | None = None
) -> torch.Tensor:
    """`(T, H, D)` for queries of that shape, over one layer of the pool, `(2, num_slots, Hkv, D)`."""
    call = varlen or _torch_varlen()
    keys, values = kv.unbind(0)
    if plan.slots is not None:
        keys, values = keys.index_select(0, plan.slots), values.index_select(0, plan.slots)
    else:
        keys, values = (pool.view(-1, plan.block_size, *pool.shape[1:]) for pool in (keys, values))
    attended: torch.Tensor = call(
        query.contiguous(),
        keys,
        values,
        plan.cu_queries,
        plan.cu_keys,
        plan.max_queries,
        plan.max_keys,
        scale=scale,
        window_size=(-1, 0),  # causal, the last query sees the last key
        enable_gqa=query.shape[1] != keys.shape[-2],
        seqused_k=plan.num_keys,
        block_table=plan.block_tables,
    )
    return attended


def choose_mode(
    kv_shape: tuple[int, int, int],
    num_heads: int,
    dtype: torch.dtype,
    device: torch.device,
    varlen: Varlen | None = None,
) -> Mode | None:
    """What works here; None if nothing does, or there is no use for it.

    `kv_shape` is `(block_size, num_kv_heads, head_dim)`. `varlen` is tried on any device.
    """
    if dtype not in _HALF_DTYPES or (device.type != "cuda" and varlen is None):
        return None
    if device.type == "cuda":
        _activate_newest()
    trial = _Trial(*kv_shape, num_heads, dtype, device, varlen)
    modes: tuple[Mode, ...] = ("paged", "gathered")
    for mode in modes:
        try:
            error = trial.error(mode)
        except (RuntimeError, ValueError, TypeError, ImportError) as reason:  # as many as there are implementations
            logger.info("FlashAttention does not work with %s keys: %s", mode, reason)
            _deactivate_newest()  # it may be installed and not be for this device
            continue
        if error < _TOLERANCE:
            logger.info("attention by FlashAttention with %s keys", mode)
            return mode
        logger.warning("FlashAttention with %s keys is off by %.3g: not used", mode, error)
    return None


@dataclass(frozen=True, slots=True)
class _Trial:
    """A few sequences with a model's shapes, in blocks that lie apart."""

    block_size: int
    num_kv_heads: int
    head_dim: int
    num_heads: int
    dtype: torch.dtype
    device: torch.device
    varlen: Varlen | None

    def error(self, mode: Mode) -> float:
        """The largest one, of chunks and single tokens together, and of single tokens alone."""
        singles = Span(1, self.block_size + 1, (1, 8)), Span(1, 2 * self.block_size, (3, 6))
        whole = Span(3 * self.block_size, 3 * self.block_size, (4, 0, 7))
        later = Span(5, 2 * self.block_size + 3, (9, 2, 5))
        return max(self._error(spans, mode) for spans in ((whole, later, *singles), singles))

    def _error(self, spans: Sequence[Span], mode: Mode) -> float:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(self.device, self.dtype)

        kv = draw(2, 10 * self.block_size, self.num_kv_heads, self.head_dim)
        query = draw(sum(span.num_queries for span in spans), self.num_heads, self.head_dim)
        plan = plan_flash(spans, self.block_size, mode, self.device)
        attended = attend_flash(plan, kv, query, self.head_dim**-0.5, self.varlen)
        parts = torch.split(query, [span.num_queries for span in spans])
        expected = [_plain(span, kv, part, self.block_size) for span, part in zip(spans, parts, strict=True)]
        return float((attended.float() - torch.cat(expected)).abs().max())


def _plain(span: Span, kv: torch.Tensor, query: torch.Tensor, block_size: int) -> torch.Tensor:
    blocks = (
        kv.view(2, -1, block_size, *kv.shape[2:])[:, list(span.block_table)].flatten(1, 2)[:, : span.num_keys].float()
    )
    groups = query.shape[1] // kv.shape[2]
    keys, values = blocks.repeat_interleave(groups, dim=2).unbind(0)
    scores = torch.einsum("nhd,shd->hns", query.float(), keys) * query.shape[2] ** -0.5
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=kv.device).triu(span.num_keys - span.num_queries + 1)
    return torch.einsum("hns,shd->nhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), values)


def _torch_varlen() -> Varlen:
    from torch.nn.attention.varlen import varlen_attn  # torch before 2.10 has none

    return varlen_attn


def _activate_newest() -> None:
    """FA3 where it is installed: torch's own FA2 knows no block tables."""
    with suppress(ImportError, RuntimeError, ValueError, AttributeError):
        from torch.nn.attention import activate_flash_attention_impl

        activate_flash_attention_impl("FA3")


def _deactivate_newest() -> None:
    with suppress(ImportError, RuntimeError, ValueError, AttributeError):
        from torch.nn.attention import restore_flash_attention_impl

        restore_flash_attention_impl()
