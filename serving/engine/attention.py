"""Attention of a packed step batch over the paged KV pool, in the place of transformers' own.

float32 on a CPU is computed by loops of our own, over the pool as it lies (see `kernels`), half precision on CUDA by
FlashAttention where that works (see `flash`). Elsewhere a chunk's softmax is taken in parts that need no mask and no
copy, then merged by their log-sum-exp (as in flash-decoding; "Online normalizer calculation for softmax", arXiv
1805.02867):

    a chunk        [ run of past slots ][ run ] ...   views of the pool, no mask
                                               [ itself ]   its fresh keys and values, causal
    single tokens  all of them at once, see `decode_plan`

A group of query heads shares its keys and values as an expanded view. The new rows of every sequence are
written to the pool first. Nothing here allocates or frees blocks.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AttentionInterface

from serving.engine import kernels
from serving.engine.decode_plan import DecodePlan
from serving.engine.flash import attend_flash
from serving.engine.step_batch import Segment, StepBatch

ATTENTION_NAME = "tokenloft"
"""The name to give as `attn_implementation`."""

Partial = tuple[torch.Tensor, torch.Tensor]
"""Output `(B, H, N, D)` over some of the keys and the log-sum-exp of their scores `(B, H, N)`, float32."""

Attend = Callable[..., Partial]
"""`(query, keys, values, is_causal, scale, mask)`: see `attend_plain`."""


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
    attend(batch, layer_idx, query, key, value, scale, out)


def attend(
    batch: StepBatch,
    layer_idx: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    """As `attend_step`, with the new rows in the pool already."""
    if batch.flash_plan is not None:
        out.copy_(attend_flash(batch.flash_plan, batch.kv[layer_idx], query, scale))
        return
    chunks = batch.chunk_plan
    if chunks is not None:
        pool = batch.kv.numpy()
        arrays = query.numpy(), chunks.chunks, chunks.runs, pool
        kernels.attend_chunks(*arrays, layer_idx, scale, out.numpy(), torch.get_num_threads())
    if batch.segments:
        _attend_chunks(batch, layer_idx, query, key, value, scale, out)
    plan = batch.decode_plan
    if plan is None:
        return
    if plan.rows is None:
        _attend_singles(plan, batch.kv, layer_idx, query, scale, out)
    else:
        chosen = query.index_select(0, plan.rows)
        attended = torch.empty_like(chosen)
        _attend_singles(plan, batch.kv, layer_idx, chosen, scale, attended)
        out.index_copy_(0, plan.rows, attended)


def _attend_singles(
    plan: DecodePlan, kv: torch.Tensor, layer_idx: int, query: torch.Tensor, scale: float, out: torch.Tensor
) -> None:
    """Attend for all tokens of a plan; `query` and `out`, which is contiguous, are `(B, H, D)`."""
    if plan.pieces is not None:
        kernels.attend_tokens(query.contiguous().numpy(), plan.pieces, kv.numpy(), layer_idx, scale, out.numpy())
        return
    assert plan.slots is not None
    keys, values = (
        pool.index_select(0, plan.slots.flatten()).view(*plan.slots.shape, *pool.shape[1:]).transpose(1, 2)
        for pool in kv[layer_idx].unbind(0)
    )
    # All of a group's heads see the same keys, so they pass as rows of one query: keys are read once.
    grouped = query.view(len(query), keys.shape[1], -1, query.shape[2])
    attended, _ = attend_for(query.device)(grouped, keys, values, False, scale, plan.mask)
    out.copy_(attended.flatten(1, 2))


def _attend_chunks(
    batch: StepBatch,
    layer_idx: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    num_tokens, num_kv_heads, head_dim = key.shape
    pool_keys, pool_values = batch.kv[layer_idx].unbind(0)
    layer = _LayerChunks(
        query=query.view(num_tokens, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3),
        key=key.transpose(0, 1).unsqueeze(1),
        value=value.transpose(0, 1).unsqueeze(1),
        pool_keys=pool_keys,
        pool_values=pool_values,
        scale=scale,
        attend=attend_for(query.device),
    )
    grouped_out = out.view(num_tokens, num_kv_heads, -1, head_dim)
    for segment in batch.segments:
        grouped_out[segment.start : segment.start + segment.length] = layer.chunk(segment)


class _LayerChunks:
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

    def chunk(self, segment: Segment) -> torch.Tensor:
        """Output `(length, Hkv, groups, D)` of consecutive tokens."""
        fresh = slice(segment.start, segment.start + segment.length)
        query = self.query[:, :, fresh]
        partials = self._past(query, segment)
        partials.append(self._attend(query, self.key[:, :, fresh], self.value[:, :, fresh], is_causal=True))
        return merge_partials(partials).permute(2, 0, 1, 3)

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
