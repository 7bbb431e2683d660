"""What the deployments are opened with, as it follows from the configuration."""

from pathlib import Path

import pytest

from serving.app import Plan, engine_options, gateway_options
from serving.config import load_config
from serving.machine import measure_for
from serving.model_files import ModelFiles


def plan_of(*overrides: str) -> Plan:
    config = load_config(None, overrides)
    return Plan(config, measure_for(config), ModelFiles("m", Path("/model"), "digest"), ("node",))


@pytest.mark.parametrize("weights", ["bf16", "int4"])
def test_smaller_weights_leave_every_block_to_prefill(weights: str) -> None:
    plan = plan_of(f"decode.weights={weights}", "cache.block_size=16")
    prefill, decode = engine_options(plan, "prefill"), engine_options(plan, "decode")
    assert (prefill.weights, prefill.chain_weights) == ("float32", "float32")
    assert (decode.weights, decode.chain_weights) == (weights, "float32")
    assert decode.remote_threshold_tokens == 16
    assert gateway_options(plan).policy.remote_threshold_tokens == 16


def test_a_lower_threshold_stands() -> None:
    plan = plan_of("decode.weights=int4", "prefill.remote_threshold_tokens=5")
    assert engine_options(plan, "decode").remote_threshold_tokens == 5


def test_float32_weights_keep_the_threshold() -> None:
    plan = plan_of("prefill.remote_threshold_tokens=100")
    assert engine_options(plan, "decode").remote_threshold_tokens == 100
    assert gateway_options(plan).policy.remote_threshold_tokens == 100


def test_without_prefill_chains_are_of_decode_s_weights() -> None:
    decode = engine_options(plan_of("decode.weights=int4", "prefill.replicas=0"), "decode")
    assert (decode.weights, decode.chain_weights) == ("int4", "int4")
