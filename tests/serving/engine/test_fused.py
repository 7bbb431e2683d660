"""The fused forward gives what the stock modules give, for each family and what may vary in it."""

from random import Random
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel
from transformers.models.llama.modeling_llama import LlamaMLP, apply_rotary_pos_emb

from serving.engine import attention, kernels
from serving.engine.fused import FusedDecoder, RMSNorm, can_fuse, rotate_
from serving.engine.kv_pool import KVLayout, KVPool
from serving.engine.linear import INT4_GROUP, INT4_LEVELS, Weights, quantise
from serving.engine.step_batch import SequencePart, build_step_batch
from tests.tiny_models import FAMILIES

BLOCK_SIZE = 8

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with a head for each key": ("llama", {"num_key_value_heads": 6}),
    "llama with scaled positions": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "qwen3 with biases": ("qwen3", {"attention_bias": True}),
}

torch.set_num_threads(1)


def make_decoder(variant: str, **changes: Any) -> tuple[Any, Any]:
    """A random decoder, its norms random too, and its config."""
    family, extra = VARIANTS[variant]
    shape: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 72,
        "intermediate_size": 104,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 2048,
    }
    config_class, model_class = FAMILIES[family]
    config = config_class(**(shape | {"sliding_window": None} | extra | changes))
    attention.register()
    config._attn_implementation = attention.ATTENTION_NAME
    decoder = model_class(config).model.eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            mean = 1.0 if "norm" in name else 0.0
            parameter.normal_(mean, 0.15, generator=generator)
    return decoder, config


def make_pool(config: Any, num_blocks: int = 64, device: str = "cpu", dtype: str = "float32") -> KVPool:
    layout = KVLayout(config.num_hidden_layers, config.num_key_value_heads, config.head_dim, BLOCK_SIZE, dtype)
    pool = KVPool(layout, num_blocks, device)
    pool.kv.fill_(float("nan"))
    return pool


def stock_hidden(decoder: Any, batch: Any) -> torch.Tensor:
    with torch.inference_mode():
        out = decoder(
            input_ids=batch.input_ids[None], position_ids=batch.position_ids[None], use_cache=False, batch=batch
        )
        hidden: torch.Tensor = out.last_hidden_state[0]
        return hidden


def steps() -> list[list[SequencePart]]:
    """A prompt in two chunks beside others, then single tokens, alone and together."""
    random = Random(5)
    tables = [list(range(20)), list(range(20, 40)), [60, 41, 59, 43, 57, 45, 55, 47, 53, 49, 51]]
    ids = [[random.randrange(300) for _ in range(160)] for _ in tables]

    def part(sequence: int, first: int, last: int) -> SequencePart:
        return SequencePart(ids[sequence][first:last], first, tables[sequence])

    return [
        [part(0, 0, 90)],
        [part(0, 90, 130), part(1, 0, 7), part(2, 0, 80)],
        [part(1, 7, 8)],
        [part(1, 8, 9), part(0, 130, 131)],
        [part(0, 131, 132), part(1, 9, 110), part(2, 80, 81)],
        [part(2, 81, 82), part(1, 110, 111), part(0, 132, 133)],
    ]


@pytest.mark.parametrize("has_kernels", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_hidden_states_and_kv_are_those_of_the_stock_modules(
    variant: str, has_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if has_kernels and not kernels.available():
        pytest.skip("numba shares no threads with torch here")
    monkeypatch.setattr(kernels, "available", lambda: has_kernels)
    decoder, config = make_decoder(variant)
    assert can_fuse(decoder, config)
    pools = [make_pool(config), make_pool(config)]
    expected = [stock_hidden(decoder, build_step_batch(pools[0], parts)) for parts in steps()]
    fused = FusedDecoder(decoder, config)
    with torch.inference_mode():
        actual = [fused.forward(build_step_batch(pools[1], parts)) for parts in steps()]
    for ours, stock in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, stock, atol=1e-4, rtol=1e-4)
    # Slots that nobody owns stay as they were: rows that only fill up are not stored.
    torch.testing.assert_close(pools[1].kv, pools[0].kv, atol=1e-4, rtol=1e-4, equal_nan=True)


def test_bfloat16_is_as_close_as_the_stock_modules() -> None:
    decoder, config = make_decoder("qwen3")
    exact = [stock_hidden(decoder, build_step_batch(pool, parts)) for pool in [make_pool(config)] for parts in steps()]
    decoder.to(torch.bfloat16)
    pools = [make_pool(config, dtype="bfloat16"), make_pool(config, dtype="bfloat16")]
    stock = [stock_hidden(decoder, build_step_batch(pools[0], parts)) for parts in steps()]
    fused = FusedDecoder(decoder, config)
    with torch.inference_mode():
        ours = [fused.forward(build_step_batch(pools[1], parts)) for parts in steps()]
    errors = [
        max(float((a.float() - b).abs().mean()) for a, b in zip(side, exact, strict=True)) for side in (ours, stock)
    ]
    assert errors[0] <= 1.2 * errors[1]


def on_levels(weight: torch.Tensor) -> torch.Tensor:
    levels, scales, zeros = quantise(weight.view(len(weight), -1, INT4_GROUP))
    return ((levels - INT4_LEVELS // 2) * scales.float()[..., None] + zeros.float()[..., None]).flatten(1)


def make_rounding(decoder: nn.Module, weights: Weights) -> None:
    """Have the stock products use weights as they are kept, and round what goes in and comes out to bf16."""

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return x.bfloat16().float()

    for module in decoder.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = rounded(module.weight.data) if weights == "bf16" else on_levels(module.weight.data)
            module.register_forward_pre_hook(lambda _, args: (rounded(args[0]),))
            module.register_forward_hook(lambda _, args, product: rounded(product))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("weights", ["bf16", "int4"])
def test_smaller_weights_round_products_and_nothing_else(weights: Weights, family: str) -> None:
    (exact, config), (stock, _), (fusable, _) = (
        make_decoder(family, hidden_size=96, intermediate_size=128) for _ in range(3)
    )
    make_rounding(stock, weights)
    pools = [make_pool(config) for _ in range(3)]
    fused = FusedDecoder(fusable, config, weights)
    off_rounding, off_exact = 0.0, 0.0
    for parts in steps():
        batches = [build_step_batch(pool, parts) for pool in pools]
        with torch.inference_mode():
            ours = fused.forward(batches[0])
        by_rounding, by_exact = stock_hidden(stock, batches[1]), stock_hidden(exact, batches[2])
        off_rounding = max(off_rounding, float((ours - by_rounding).norm() / by_rounding.norm()))
        off_exact = max(off_exact, float((ours - by_exact).norm() / by_exact.norm()))
    # A sum in another order is now and then rounded to the other side, by one part in 2^7: nothing else differs. But a
    # few rows in bf16 are multiplied without any rounding, which may lie a rounding apart.
    assert off_rounding < (2**-6 if weights == "bf16" else 2**-7)
    assert off_exact > 2**-7


def test_shapes_on_a_device_without_kernels() -> None:
    """The path of every other device, CUDA's too, run for its shapes."""
    decoder, config = make_decoder("qwen3")
    fused = FusedDecoder(decoder.to("meta"), config)
    pool = make_pool(config, device="meta")
    for parts in steps():
        with torch.inference_mode():
            hidden = fused.forward(build_step_batch(pool, parts))
        assert hidden.shape == (sum(len(part.token_ids) for part in parts), config.hidden_size)


def test_the_stock_layers_are_gone() -> None:
    decoder, config = make_decoder("llama")
    embedding = decoder.embed_tokens.weight
    FusedDecoder(decoder, config)
    assert [type(layer) for layer in decoder.layers] == [nn.Identity] * 3
    left = {name for name, _ in decoder.named_parameters()}
    assert left == {"embed_tokens.weight", "norm.weight"}
    assert decoder.embed_tokens.weight is embedding


class WiderMLP(LlamaMLP):
    """A class that the table does not name."""


def test_what_is_not_exactly_known_is_left_alone() -> None:
    decoder, config = make_decoder("llama")
    decoder.layers[1].mlp = WiderMLP(config)  # type: ignore[no-untyped-call]
    assert not can_fuse(decoder, config)
    decoder, config = make_decoder("llama")
    decoder.layers[2].self_attn.q_norm_of_ours = nn.Identity()
    assert not can_fuse(decoder, config)
    decoder, config = make_decoder("llama with biases")
    decoder.layers[0].self_attn.k_proj.bias = None
    assert not can_fuse(decoder, config)
    decoder, config = make_decoder("llama", hidden_act="gelu")
    assert not can_fuse(decoder, config)
    assert not can_fuse(nn.Linear(2, 2), LlamaConfig())


def test_rotation_is_that_of_transformers() -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, head_dim=16, num_hidden_layers=1, vocab_size=8)
    x = torch.randn(5, 4, 16, generator=torch.Generator().manual_seed(0))
    cos, sin = LlamaModel(config).rotary_emb(x, torch.tensor([[0, 1, 50, 1000, 2]]))
    by_head = x.transpose(0, 1)[None]
    expected, _ = apply_rotary_pos_emb(by_head, by_head, cos, sin)
    rotate_(x, cos[0, :, None, :8], sin[0, :, None, :8])
    torch.testing.assert_close(x, expected[0].transpose(0, 1), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e4])
def test_norm_is_exact_for_small_and_large_vectors(scale: float) -> None:
    x = scale * torch.randn(7, 72, generator=torch.Generator().manual_seed(0))
    x[3] = 0
    weight = torch.linspace(0.1, 2, 72)
    expected = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    torch.testing.assert_close(RMSNorm(weight, 1e-5)(x).double(), expected, atol=1e-12, rtol=2e-6)
