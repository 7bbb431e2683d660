"""A whole layer for single tokens in one call: with few of them, each call from Python costs a part of its work."""

import numpy as np

from serving.engine.kernels.compiling import Floats, Ints, compiled
from serving.engine.kernels.products import Panels, multiply_rows
from serving.engine.kernels.rows import gate_alone, norm_alone, store_rotated_alone
from serving.engine.kernels.token_attention import attend_tokens


@compiled()
def _project(panels: Panels, bias: Floats, x: Floats, size_out: int) -> Floats:
    """`x` times weights, plus their bias unless that is empty."""
    out = np.empty((x.shape[0], size_out), np.float32)
    multiply_rows(panels, x, out)
    if bias.shape[0]:
        out += bias
    return out


@compiled()
def _normed(x: Floats, weight: Floats, eps: float) -> Floats:
    out = np.empty_like(x)
    norm_alone(x, weight, eps, out)
    return out


@compiled()
def decode_layer(
    hidden: Floats,
    attention_norm: Floats,
    attention_eps: float,
    qkv: Panels,
    qkv_bias: Floats,
    out: Panels,
    out_bias: Floats,
    mlp_norm: Floats,
    mlp_eps: float,
    gate_up: Panels,
    gate_up_bias: Floats,
    down: Panels,
    down_bias: Floats,
    num_inner: int,
    scale: float,
    num_heads: int,
    cos: Floats,
    sin: Floats,
    slots: Ints,
    pieces: Ints,
    kv: Floats,
    layer: int,
) -> None:
    """One layer of a decoder for `hidden` `(B, size)`, in place.

    Its weights are panels (see `multiply_rows`), its biases empty where there are none, `num_inner` is the size
    between `gate_up` and `down`; the rest is as in `store_rotated` and `attend_tokens`.
    """
    num_tokens, size = hidden.shape
    num_kv_heads, head_dim = kv.shape[3], kv.shape[4]
    num_all = num_heads + 2 * num_kv_heads
    projected = _project(qkv, qkv_bias, _normed(hidden, attention_norm, attention_eps), num_all * head_dim)
    heads = projected.reshape(num_tokens, num_all, head_dim)
    store_rotated_alone(heads, num_heads, cos, sin, slots, kv, layer)
    attended = np.empty((num_tokens, num_heads, head_dim), np.float32)
    attend_tokens(heads[:, :num_heads], pieces, kv, layer, scale, attended)
    hidden += _project(out, out_bias, attended.reshape(num_tokens, num_heads * head_dim), size)
    both = _project(gate_up, gate_up_bias, _normed(hidden, mlp_norm, mlp_eps), 2 * num_inner)
    gated = np.empty((num_tokens, num_inner), np.float32)
    gate_alone(both, gated)
    hidden += _project(down, down_bias, gated, size)
