"""A decoder's forward pass with few, large operations, made from the modules of a known family.

    norm -> [q k v] -> (head norms) -> rotate -> attention -> out + residual
    norm -> [gate up] -> silu(gate) * up -> down + residual

The same arithmetic as the stock modules up to rounding. The layers' weights are taken over, not shared: they are
joined, laid out for the machine (see `linear`), and the stock layers are dropped one by one, so that the weights
are never there twice. Modules that are not exactly as expected are left alone: the stock forward serves them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from serving.engine import kernels
from serving.engine.attention import attend, attend_step
from serving.engine.decode_plan import DecodePlan
from serving.engine.families import FUSED_MODULES
from serving.engine.linear import Bf16Linear, Linear, PackedLinear, Weights, make_linear
from serving.engine.step_batch import StepBatch

_ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}


class RMSNorm:
    """`x * weight / sqrt(mean(x^2) + eps)` along the last dimension (arXiv 1910.07467)."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self._weight = weight
        self.eps = eps
        self.array = weight.numpy() if is_native(weight) else None
        """The weight as `kernels` takes it, if it can."""
        size = weight.shape[0]
        # For vectors of this size: the mean's square root is norm / sqrt(size), so the divisor becomes
        # hypot(norm, sqrt(size * eps)) / sqrt(size). Four operations in the place of the nine of torch's own.
        self._scaled_weight = weight * size**0.5
        self._least = torch.tensor((size * eps) ** 0.5, dtype=weight.dtype, device=weight.device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`x` is `(n, size)` and contiguous."""
        if self.array is not None:
            out = torch.empty_like(x)
            kernels.norm(x.numpy(), self.array, self.eps, out.numpy())
            return out
        if x.dtype != torch.float32:  # a norm in half precision would be too coarse
            return functional.rms_norm(x, self._weight.shape, self._weight, self.eps)
        divisor = torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(self._least)
        return torch.div(x, divisor).mul_(self._scaled_weight)


@dataclass(frozen=True, slots=True)
class _HeadNorm:
    """One norm per head of queries and keys."""

    weight: torch.Tensor
    """`(num_heads + num_kv_heads, head_dim)`."""
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, x.shape[-1:], None, self.eps) * self.weight


@dataclass(frozen=True, slots=True)
class _Layer:
    before_attention: RMSNorm
    qkv: Linear
    head_norm: _HeadNorm | None
    out: Linear
    before_mlp: RMSNorm
    gate_up: Linear
    down: Linear
    num_inner: int
    """Size between `gate_up` and `down`."""
    scale: float

    @property
    def linears(self) -> tuple[Linear, Linear, Linear, Linear]:
        return self.qkv, self.out, self.gate_up, self.down

    def arrays(self) -> tuple[Any, ...] | None:
        """The weights as `kernels.decode_layer` takes them, if it can."""
        norms = self.before_attention, self.before_mlp
        if self.head_norm is not None or any(norm.array is None for norm in norms):
            return None
        parts: list[Any] = []
        for linear in self.linears:
            if not isinstance(linear, (PackedLinear, Bf16Linear)) or linear.panels is None:
                return None
            parts += [linear.panels, linear.bias.numpy() if linear.bias is not None else np.empty(0, np.float32)]
        first, second = ((norm.array, norm.eps) for norm in norms)
        return (*first, *parts[:4], *second, *parts[4:], self.num_inner, self.scale)


def can_fuse(decoder: nn.Module, config: Any) -> bool:
    """Whether `FusedDecoder` computes what this decoder does."""
    prefix = FUSED_MODULES.get(config.model_type)
    if prefix is None or config.hidden_act != "silu" or type(decoder).__name__ != f"{prefix}Model":
        return False
    return all(_is_known(layer, prefix) for layer in _layers(decoder))


def _is_known(layer: Any, prefix: str) -> bool:
    attention: Any = getattr(layer, "self_attn", None)
    mlp: Any = getattr(layer, "mlp", None)
    types = (type(layer).__name__, type(attention).__name__, type(mlp).__name__)
    if types != (f"{prefix}DecoderLayer", f"{prefix}Attention", f"{prefix}MLP"):
        return False
    return (
        _children(layer) == _LAYER_PARTS
        and _children(attention) - _HEAD_NORMS == _ATTENTION_PARTS
        and _children(mlp) == _MLP_PARTS
        and _have_biases_alike(attention.q_proj, attention.k_proj, attention.v_proj)
        and _have_biases_alike(mlp.gate_proj, mlp.up_proj)
    )


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _have_biases_alike(*linears: nn.Linear) -> bool:
    return len({_bias(linear) is None for linear in linears}) == 1


def _bias(linear: nn.Linear) -> torch.Tensor | None:
    # A linear without a bias has None there, which torch's annotation leaves out.
    bias: torch.Tensor | None = linear.bias
    return bias


def _layers(decoder: Any) -> nn.ModuleList:
    layers: nn.ModuleList = decoder.layers
    return layers


class FusedDecoder:
    """Takes a decoder's layers over; the decoder cannot run by itself afterwards."""

    def __init__(self, decoder: Any, config: Any, weights: Weights = "float32") -> None:
        """Needs `can_fuse`. The products' weights are kept as `weights`."""
        attention = decoder.layers[0].self_attn
        self._head_dim: int = attention.head_dim
        self._num_heads: int = config.num_attention_heads
        self._num_kv_heads: int = config.num_key_value_heads
        self.embed: Callable[[torch.Tensor], torch.Tensor] = decoder.embed_tokens
        """Turns token ids `(T,)` into `(T, hidden_size)`."""
        self._rotary = decoder.rotary_emb
        for kept in (decoder.embed_tokens.weight, decoder.norm.weight):
            # What was loaded may be views of one mapped file, which would stay in memory for the sake of these.
            kept.data = kept.data.clone()
        self._norm = _norm(decoder.norm)
        self._dtype: torch.dtype = decoder.norm.weight.dtype
        self._weights: Weights = weights
        with torch.inference_mode():
            self._layers = [self._take_layer(decoder.layers, at) for at in range(len(decoder.layers))]
        self._is_native = is_native(decoder.norm.weight)
        arrays = [taken for layer in self._layers if (taken := layer.arrays()) is not None]
        self._arrays = arrays if len(arrays) == len(self._layers) else None
        self.max_loop_rows = min(linear.max_loop_rows for layer in self._layers for linear in layer.linears)
        """Up to so many rows, the layers' products are those of our own loops; 0 if there are none."""

    def _take_layer(self, layers: Any, at: int) -> _Layer:
        stock, layers[at] = layers[at], nn.Identity()
        attention, mlp = stock.self_attn, stock.mlp
        return _Layer(
            before_attention=_norm(stock.input_layernorm),
            qkv=self._join(attention.q_proj, attention.k_proj, attention.v_proj),
            head_norm=self._head_norm(attention) if hasattr(attention, "q_norm") else None,
            out=self._join(attention.o_proj),
            before_mlp=_norm(stock.post_attention_layernorm),
            gate_up=self._join(mlp.gate_proj, mlp.up_proj),
            down=self._join(mlp.down_proj),
            num_inner=mlp.down_proj.in_features,
            scale=attention.scaling,
        )

    def _join(self, *stock: nn.Linear) -> Linear:
        """One product in the place of several of the same input."""
        weight = torch.cat([linear.weight for linear in stock]) if len(stock) > 1 else stock[0].weight.detach()
        biases = [bias for linear in stock if (bias := _bias(linear)) is not None]
        return make_linear(weight, torch.cat(biases) if biases else None, self._weights)

    def _head_norm(self, attention: Any) -> _HeadNorm:
        weights = (
            attention.q_norm.weight.expand(self._num_heads, -1),
            attention.k_norm.weight.expand(self._num_kv_heads, -1),
        )
        return _HeadNorm(torch.cat(weights), attention.q_norm.variance_epsilon)

    @property
    def num_bytes(self) -> int:
        """Memory that the weights of the layers' products take."""
        return sum(linear.num_bytes for layer in self._layers for linear in layer.linears)

    def forward(self, batch: StepBatch) -> torch.Tensor:
        """Compute the batch's tokens into its pool; the last hidden states, normed, `(T, hidden_size)`."""
        num_padding = self._layers[0].qkv.padded_rows(batch.num_tokens) - batch.num_tokens
        hidden: torch.Tensor = self.embed(_padded(batch.input_ids, num_padding)).to(self._dtype)
        cos, sin = self._angles(hidden, _padded(batch.position_ids, num_padding))
        plan = batch.decode_plan
        if plan is not None and self._can_decode_at_once(plan, batch.num_tokens):
            self._decode(batch, plan, hidden, cos, sin)
            return self._norm(hidden)
        attended = hidden.new_zeros(hidden.shape[0], self._num_heads, self._head_dim)
        for layer_idx, layer in enumerate(self._layers):
            self._attend(layer, layer_idx, hidden, cos, sin, batch, attended)
            hidden = layer.out.add_to(hidden, attended.flatten(1))
            hidden = layer.down.add_to(hidden, self._gated(layer.gate_up(layer.before_mlp(hidden))))
        return self._norm(hidden[: batch.num_tokens])

    def _can_decode_at_once(self, plan: DecodePlan, num_tokens: int) -> bool:
        is_known = self._arrays is not None and plan.pieces is not None
        return is_known and plan.rows is None and num_tokens <= self.max_loop_rows

    def _decode(
        self, batch: StepBatch, plan: DecodePlan, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> None:
        """All layers for single tokens, in place: as many calls as layers, as each costs a part of its work."""
        assert self._arrays is not None
        before = hidden.numpy()
        after = (
            self._num_heads,
            cos[:, 0].numpy(),
            sin[:, 0].numpy(),
            batch.slots.numpy(),
            plan.pieces,
            batch.kv.numpy(),
        )
        decode_layer: Any = kernels.decode_layer
        for layer_idx, weights in enumerate(self._arrays):
            decode_layer(before, *weights, *after, layer_idx)

    def _angles(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines `(T, 1, head_dim / 2)`; both halves of a head turn by the same."""
        cos, sin = self._rotary(hidden.unsqueeze(0), position_ids=position_ids.unsqueeze(0))
        half = self._head_dim // 2
        return cos[0, :, None, :half].contiguous(), sin[0, :, None, :half].contiguous()

    def _attend(
        self,
        layer: _Layer,
        layer_idx: int,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        batch: StepBatch,
        attended: torch.Tensor,
    ) -> None:
        num_tokens = batch.num_tokens
        qkv = layer.qkv(layer.before_attention(hidden)).view(hidden.shape[0], -1, self._head_dim)[:num_tokens]
        num_rotated = self._num_heads + self._num_kv_heads
        if layer.head_norm is not None:
            qkv[:, :num_rotated] = layer.head_norm(qkv[:, :num_rotated])
        heads = (qkv[:, : self._num_heads], qkv[:, self._num_heads : num_rotated], qkv[:, num_rotated:])
        cos, sin, attended = cos[:num_tokens], sin[:num_tokens], attended[:num_tokens]
        if self._is_native:
            angles = cos[:, 0].numpy(), sin[:, 0].numpy()
            kernels.store_rotated(
                qkv.numpy(), self._num_heads, *angles, batch.slots.numpy(), batch.kv.numpy(), layer_idx
            )
            attend(batch, layer_idx, *heads, layer.scale, attended)
        else:
            rotate_(qkv[:, :num_rotated], cos, sin)
            attend_step(batch, layer_idx, *heads, layer.scale, attended)

    def _gated(self, gate_up: torch.Tensor) -> torch.Tensor:
        if self._is_native:
            out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
            kernels.gate(gate_up.numpy(), out.numpy())
            return out
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate, inplace=True).mul_(up)


def is_native(weight: torch.Tensor) -> bool:
    """Whether `kernels` computes what torch would with tensors like this."""
    return kernels.available() and weight.device.type == "cpu" and weight.dtype == torch.float32


def rotate_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotary positions (arXiv 2104.09864), halves paired, in place: `x` is `(T, H, D)`, the angles `(T, 1, D / 2)`."""
    low, high = x.chunk(2, dim=-1)
    turned = low * cos - high * sin
    high.mul_(cos).add_(low * sin)
    low.copy_(turned)


def _padded(ids: torch.Tensor, num_padding: int) -> torch.Tensor:
    # The rows that fill up are token 0 at position 0: they are computed and never attended to, stored or returned.
    return functional.pad(ids, (0, num_padding)) if num_padding else ids


def _norm(stock: Any) -> RMSNorm:
    return RMSNorm(stock.weight.detach().clone(), stock.variance_epsilon)
