"""The engine bench on a tiny model: every figure is there, and both sides really compute."""

from pathlib import Path

from serving.bench.engine import EngineBenchOptions, run_engine_bench
from serving.bench.roofline import Roofline, prefill_flops


def test_all_figures_are_measured(tiny_model_dir: Path) -> None:
    said: list[str] = []
    options = EngineBenchOptions(
        tiny_model_dir,
        1,
        (64, 200),
        ((1, 64), (3, 90)),
        decode_tokens=8,
        rounds=1,
        chunk_tokens=64,
        prefix_tokens=256,
        new_prompt_tokens=64,
    )
    report = run_engine_bench(options, said.append)
    names = [figure.name for figure in report.figures]
    assert names[:2] == ["gemm", "memory read"]
    for name in ("prefill 64", "prefill 200", "decode, 1 sequence of 64", "decode, 3 sequences of 90"):
        assert name in names
    assert all(figure.value is not None and figure.value > 0 for figure in report.figures)
    assert all(figure.against_value is not None for figure in report.figures if figure.target is not None)
    assert [figure.name for figure in report.figures if "warm turn" in figure.name]
    assert report.figures[-1].name == "CPU of 4 new prompts of 64, cache on"
    assert len(said) >= 7, "progress is said before each part"


def test_longer_prompts_take_longer(tiny_model_dir: Path) -> None:
    """Nothing is reused between rounds: four times the tokens are no cheaper than once."""
    options = EngineBenchOptions(tiny_model_dir, 1, (128, 2048), (), decode_tokens=2, rounds=2, prefix_tokens=128)
    short, long = (f for f in run_engine_bench(options, lambda _: None).figures if f.against == "transformers")
    assert short.value is not None
    assert long.value is not None
    assert 2048 / long.value > 128 / short.value


def test_the_roofline_is_a_machine() -> None:
    roofline = Roofline.measure(1, rounds=1)
    assert 1e8 < roofline.gemm_flops_per_s < 1e15
    assert 1e8 < roofline.read_bytes_per_s < 1e13


def test_prefill_flops_counts_products_and_half_of_the_attention_square() -> None:
    class Config:
        head_dim, num_attention_heads, num_hidden_layers = 16, 4, 3

    assert prefill_flops(Config, 1000, 10) == 2 * 1000 * 10 + 4 * 4 * 16 * 55 * 3
