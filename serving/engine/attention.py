"""Attention of a packed step batch over the paged KV pool, in the place of transformers' own.

Each sequence's softmax is taken in parts that need no mask and no copy, then merged by their log-sum-exp
(as in flash-decoding; "Online normalizer calculation for softmax", arXiv 1805.02867):

    a chunk       [ run of past slots ][ run ] ...   views of the pool, no mask
                                              [ itself ]   its fresh keys and values, causal
    one token     [ run of past slots ][ run with itself ]
    many of them  [ pieces, in pairs of two sequences ][ tails ]   see `decode_plan`

A group of query heads shares its keys and values as an expanded view. The new rows of every sequence are
written to the pool first. Nothing here allocates or frees blocks.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface

from serving.engine.decode_plan import DecodePlan, Piece
from serving.engine.step_batch import Segment, StepBatch

ATTENTION_NAME = "tokenloft"
"""The name to give as `attn_implementation`."""

Partial = tuple[torch.Tensor, torch.Tensor]
"""Output `(B, H, N, D)` over some of the keys and the log-sum-exp of their scores `(B, H, N)`, float32."""

Attend = Callable[..., Partial]
"""`(query, keys, values, is_causal, scale, mask)`: see `attend_plain`."""

_ROWS_OF_A_GROUP = 4
"""On a CPU a product of so many rows, or a multiple, takes less time than one of fewer."""


def register() -> None:
    """Make the function known to transformers; doing it twice is harmless."""
    AttentionInterface.register(ATTENTION_NAME, paged_attention)


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    batch: StepBatch,
    **_unused: Any,
) -> tuple[torch.Tensor, None]:
    """`attend_step` as transformers calls it.

    `query` is `(1, H, T, D)`, `key` and `value` are `(1, Hkv, T, D)`, rotated already. Returns `(1, T, H, D)`,
    contiguous. `batch` is the keyword that the runner gives to the model; there is never a mask.
    """
    layer_idx: int = module.layer_idx  # type: ignore[assignment]
    _, num_heads, num_tokens, head_dim = query.shape
    out = query.new_empty(1, num_tokens, num_heads, head_dim)
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    attend_step(batch, layer_idx, query, key, value, scaling, out[0])
    return out, None


def attend_step(
    batch: StepBatch,
    layer_idx: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Write the new rows to the pool and attend.

    `query` and `out` are `(T, H, D)`, `key` and `value` `(T, Hkv, D)`, rotated already; `out` is contiguous.
    """
    pool_keys, pool_values = batch.kv[layer_idx].unbind(0)
    pool_keys.index_copy_(0, batch.slots, key)
    pool_values.index_copy_(0, batch.slots, value)
    num_tokens, num_kv_heads, head_dim = key.shape
    grouped_query = query.view(num_tokens, num_kv_heads, -1, head_dim)
    grouped_out = out.view(num_tokens, num_kv_heads, -1, head_dim)
    layer = _LayerStep(
        query=grouped_query.permute(1, 2, 0, 3),
        key=key.transpose(0, 1).unsqueeze(1),
        value=value.transpose(0, 1).unsqueeze(1),
        pool_keys=pool_keys,
        pool_values=pool_values,
        scale=scale,
        attend=attend_for(query.device),
    )
    for segment in batch.segments:
        if segment.length == 1:
            grouped_out[segment.start] = layer.one_token(segment)
        else:
            grouped_out[segment.start : segment.start + segment.length] = layer.chunk(segment)
    if batch.decode_plan is not None:
        plan = batch.decode_plan
        grouped_out.index_copy_(0, plan.rows, layer.planned(plan, grouped_query.index_select(0, plan.rows)))


class _LayerStep:
    """The tensors of one layer in one step, seen head group by head group."""

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pool_keys: torch.Tensor,
        pool_values: torch.Tensor,
        scale: float,
        attend: Attend,
    ) -> None:
        self.query = query  # (Hkv, groups, T, D)
        self.key = key  # (Hkv, 1, T, D)
        self.value = value
        self.pool_keys = pool_keys  # (num_slots, Hkv, D)
        self.pool_values = pool_values
        self.pool_keys_by_head = pool_keys.transpose(0, 1).unsqueeze(1)  # (Hkv, 1, num_slots, D)
        self.pool_values_by_head = pool_values.transpose(0, 1).unsqueeze(1)
        self.scale = scale
        self.attend = attend

    def one_token(self, segment: Segment) -> torch.Tensor:
        """Output `(Hkv, groups, D)` of a single token."""
        # All of a group's heads see the same keys, so they pass as rows of one query: keys are read once.
        query = self.query[:, :, segment.start].unsqueeze(1)
        return merge_partials(self._past(query, segment))[:, 0]

    def chunk(self, segment: Segment) -> torch.Tensor:
        """Output `(length, Hkv, groups, D)` of consecutive tokens."""
        fresh = slice(segment.start, segment.start + segment.length)
        query = self.query[:, :, fresh]
        partials = self._past(query, segment)
        partials.append(self._attend(query, self.key[:, :, fresh], self.value[:, :, fresh], is_causal=True))
        return merge_partials(partials).permute(2, 0, 1, 3)

    def planned(self, plan: DecodePlan, query: torch.Tensor) -> torch.Tensor:
        """Output of all tokens of a plan, for their `query`; both `(B, Hkv, groups, D)`."""
        groups = query.shape[2]
        query = self._filled_groups(query)
        partials = [self._tails(plan, query)]
        piece_query = query.index_select(0, plan.piece_sequences)
        for at, (first, second) in enumerate(plan.pairs):
            keys, values = (self._pair(pool, first, second) for pool in (self.pool_keys, self.pool_values))
            partials.append(self.attend(piece_query[2 * at : 2 * at + 2], keys, values, False, self.scale))
        out = torch.cat([out for out, _ in partials])
        if not plan.pairs:
            return out[:, :, :groups]
        lse = torch.cat([lse for _, lse in partials])[plan.partials] + plan.partials_mask
        weights = lse.softmax(dim=1).unsqueeze(-1)
        return (out[plan.partials] * weights).sum(dim=1)[:, :, :groups].to(query.dtype)

    def _filled_groups(self, query: torch.Tensor) -> torch.Tensor:
        missing = -query.shape[2] % _ROWS_OF_A_GROUP
        return functional.pad(query, (0, 0, 0, missing)) if missing and query.device.type == "cpu" else query

    def _tails(self, plan: DecodePlan, query: torch.Tensor) -> Partial:
        shape = (*plan.tail_slots.shape, *self.pool_keys.shape[1:])
        keys, values = (
            pool.index_select(0, plan.tail_slots.flatten()).view(shape).transpose(1, 2)
            for pool in (self.pool_keys, self.pool_values)
        )
        return self.attend(query, keys, values, False, self.scale, plan.tail_mask)

    def _pair(self, pool: torch.Tensor, first: Piece, second: Piece) -> torch.Tensor:
        """The rows of both pieces, `(2, Hkv, length, D)`, a view."""
        slot_stride, head_stride, _ = pool.stride()
        return pool.as_strided(
            (2, pool.shape[1], first.length, pool.shape[2]),
            ((second.first - first.first) * slot_stride, head_stride, slot_stride, 1),
            pool.storage_offset() + first.first * slot_stride,
        )

    def _past(self, query: torch.Tensor, segment: Segment) -> list[Partial]:
        if segment.gathered is not None:
            keys = self.pool_keys.index_select(0, segment.gathered).transpose(0, 1).unsqueeze(1)
            values = self.pool_values.index_select(0, segment.gathered).transpose(0, 1).unsqueeze(1)
            return [self._attend(query, keys, values, is_causal=False)]
        keys, values = self.pool_keys_by_head, self.pool_values_by_head
        return [
            self._attend(query, keys[:, :, first:last], values[:, :, first:last], is_causal=False)
            for first, last in segment.runs
        ]

    def _attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, is_causal: bool) -> Partial:
        groups = query.shape[1]
        keys = keys.expand(-1, groups, -1, -1)
        return self.attend(query, keys, values.expand(-1, groups, -1, -1), is_causal, self.scale)


def merge_partials(partials: Sequence[Partial]) -> torch.Tensor:
    """Attention over the union of disjoint sets of keys, `(B, H, N, D)` in the dtype of the parts."""
    if len(partials) == 1:
        return partials[0][0]
    # The weight of a part is its share of the whole sum of exponentials, which is a softmax over the parts.
    weights = torch.stack([lse for _, lse in partials]).softmax(dim=0)
    merged = partials[0][0] * weights[0].unsqueeze(-1)
    for (out, _), weight in zip(partials[1:], weights[1:], strict=True):
        merged += out * weight.unsqueeze(-1)
    return merged.to(partials[0][0].dtype)


def attend_for(device: torch.device) -> Attend:
    """The way to attend on a device."""
    return _attend_cpu if device.type == "cpu" else attend_plain


def _attend_cpu(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    is_causal: bool,
    scale: float,
    mask: torch.Tensor | None = None,
) -> Partial:
    # The kernel behind scaled_dot_product_attention, which keeps the log-sum-exp to itself. It takes any strides.
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, keys, values, 0.0, is_causal, attn_mask=mask, scale=scale
    )
    return out, lse


def attend_plain(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    is_causal: bool,
    scale: float,
    mask: torch.Tensor | None = None,
) -> Partial:
    """Softmax attention from plain operations, for every device; scores and sums are float32.

    `query` is `(B, H, N, D)`, `keys` and `values` are `(B, H, S, D)`, and `mask` is added to the scores.
    """
    scores = (query @ keys.transpose(-1, -2)).float() * scale
    if mask is not None:
        scores = scores + mask
    if is_causal:
        num_queries, num_keys = scores.shape[-2:]
        hidden = torch.ones(num_queries, num_keys, dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    lse = scores.logsumexp(dim=-1)
    weights = (scores - lse.unsqueeze(-1)).exp()
    return weights.to(values.dtype) @ values, lse
