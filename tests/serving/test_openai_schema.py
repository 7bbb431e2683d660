import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from serving.chat_schema import ChatCompletionRequest
from serving.http_errors import from_pydantic
from serving.openai_schema import CompletionUsage, GenerationRequest
from serving.protocol import LoadPlan, SamplingParams, Usage
from serving.text_schema import CompletionRequest

USER = {"role": "user", "content": "hello"}


SCHEMAS: list[type[GenerationRequest]] = [ChatCompletionRequest, CompletionRequest]


@pytest.fixture(params=SCHEMAS)
def schema(request: pytest.FixtureRequest) -> type[GenerationRequest]:
    kind: type[GenerationRequest] = request.param
    return kind


def parse(schema: type[GenerationRequest], **fields: Any) -> GenerationRequest:
    return schema.model_validate({"model": "m", "messages": [USER], "prompt": "hello", **fields})


@pytest.mark.parametrize(
    ("fields", "sampling"),
    [
        ({}, SamplingParams(7, seed=11)),
        ({"temperature": 0}, SamplingParams(7, temperature=0.0, seed=11)),
        ({"temperature": 1.5}, SamplingParams(7, temperature=1.5, seed=11)),
        ({"top_p": 0.5}, SamplingParams(7, top_p=0.5, seed=11)),
        ({"top_k": 40}, SamplingParams(7, top_k=40, seed=11)),
        ({"top_k": -1}, SamplingParams(7, seed=11)),
        ({"top_k": 0}, SamplingParams(7, seed=11)),
        ({"min_p": 0.25}, SamplingParams(7, min_p=0.25, seed=11)),
        ({"presence_penalty": -2}, SamplingParams(7, presence_penalty=-2.0, seed=11)),
        ({"frequency_penalty": 2}, SamplingParams(7, frequency_penalty=2.0, seed=11)),
        ({"repetition_penalty": 1.1}, SamplingParams(7, repetition_penalty=1.1, seed=11)),
        ({"logit_bias": {"5": -100, "0": 1.5}}, SamplingParams(7, logit_bias=((5, -100.0), (0, 1.5)), seed=11)),
        ({"min_tokens": 3}, SamplingParams(7, min_tokens=3, seed=11)),
        ({"ignore_eos": True}, SamplingParams(7, ignore_eos=True, seed=11)),
        ({"stop_token_ids": [5, 6]}, SamplingParams(7, stop_token_ids=(5, 6), seed=11)),
        ({"seed": 0}, SamplingParams(7, seed=0)),
        ({"stop": "x"}, SamplingParams(7, stop=("x",), seed=11)),
        ({"stop": ["x", "y"]}, SamplingParams(7, stop=("x", "y"), seed=11)),
    ],
)
def test_each_parameter_reaches_the_sampling(
    schema: type[GenerationRequest], fields: dict[str, Any], sampling: SamplingParams
) -> None:
    assert parse(schema, **fields).sampling(7, 11) == sampling


def test_every_field_of_the_sampling_can_be_set(schema: type[GenerationRequest]) -> None:
    fields = {
        "temperature": 0.5, "top_p": 0.5, "seed": 3, "stop": "x", "top_k": 3, "min_p": 0.5, "presence_penalty": 1,
        "frequency_penalty": 1, "repetition_penalty": 2, "logit_bias": {"1": 1}, "min_tokens": 1, "ignore_eos": True,
        "stop_token_ids": [1], "logprobs": True if schema is ChatCompletionRequest else 0,
    }  # fmt: skip
    sampling, plain = parse(schema, **fields).sampling(9, 11), SamplingParams(7, seed=11)
    same = [name for name in SamplingParams.__slots__ if getattr(sampling, name) == getattr(plain, name)]
    assert same == ["grammar"], "which follows from several fields: see `answer_grammar`"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FIELDS = sorted({*ChatCompletionRequest.model_fields, *CompletionRequest.model_fields, "role", "content"})


@settings(deadline=None, max_examples=150)
@given(fields=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4), kind=st.sampled_from(SCHEMAS))
def test_any_json_is_a_request_or_a_clear_refusal(fields: dict[str, Any], kind: type[GenerationRequest]) -> None:
    body = {"model": "m", "messages": [USER], "prompt": "hello", **fields}
    try:
        asked = kind.model_validate(body)
    except ValidationError as error:
        refusal = from_pydantic(error, body)
        assert (refusal.status, bool(refusal.param), bool(refusal.message)) == (400, True, True)
        assert json.loads(refusal.body())
    else:
        asked.unsupported_parameter()
        asked.named_token_ids()
        asked.sampling(7, 11)


def test_choices_and_named_tokens(schema: type[GenerationRequest]) -> None:
    assert (parse(schema).num_choices, parse(schema, n=16).num_choices) == (1, 16)
    named = parse(schema, logit_bias={"5": 1, "7": 1}, stop_token_ids=[3]).named_token_ids()
    assert named == {"logit_bias": [5, 7], "stop_token_ids": [3]}


def test_null_is_the_same_as_absent(schema: type[GenerationRequest]) -> None:
    names = set(schema.model_fields) - {"model", "messages", "prompt"}
    asked = parse(schema, **dict.fromkeys(names))
    assert asked.sampling(7, 11) == parse(schema).sampling(7, 11)
    assert (asked.num_choices, asked.include_usage, asked.use_cache) == (1, False, True)
    assert asked.unsupported_parameter() is None


def test_usage_splits_the_prompt_by_tier_and_role() -> None:
    usage = Usage(
        prompt_tokens=100,
        completion_tokens=5,
        device_tokens=40,
        dram_tokens=20,
        disk_tokens=10,
        remote_tokens=5,
        prefill_tokens=16,
        decode_computed_tokens=9,
        load_s=0.25,
        ttft_s=0.5,
        saved_s=1.5,
        reason="longest match",
        plan=LoadPlan("both", 25, 5, 0.125),
    )
    assert json.loads(CompletionUsage.of(usage).as_json()) == {
        "prompt_tokens": 100,
        "completion_tokens": 5,
        "total_tokens": 105,
        "prompt_tokens_details": {"cached_tokens": 75, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
        "tokenloft": {
            "cached": {"device": 40, "dram": 20, "disk": 10, "remote": 5},
            "computed": {"prefill": 16, "decode": 9},
            "load_s": 0.25,
            "ttft_s": 0.5,
            "saved_s": 1.5,
            "route": "longest match",
            "plan": {"kind": "both", "load_tokens": 25, "compute_tokens": 5, "estimated_s": 0.125},
        },
    }
    assert json.loads(CompletionUsage.of(replace(usage, plan=None)).as_json())["tokenloft"]["plan"] is None
