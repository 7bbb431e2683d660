"""Answers under a grammar, on a tiny random model, which left alone writes nothing of any shape."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.engine.grammar import json_rule
from serving.engine.sequence import Listener
from serving.protocol import SamplingParams, TokenBatch
from tests.serving.engine.harness import BLOCK_SIZE, EngineUnderTest, make_engine, open_store, prompt_of, running

EOS = 2
MAX_TOKENS = 400
PROMPT = prompt_of(30)
EAGER: dict[str, Any] = {"logit_bias": ((EOS, 8.0),), "frequency_penalty": 1.0}
"""To end at once: early is forbidden, and late, such as a number of endless digits, is no test."""


def grammar_of(schema: dict[str, Any]) -> str:
    return f"start: {json_rule(schema)}\n"


def an_object(properties: dict[str, Any], required: list[str] | None = None, **more: Any) -> dict[str, Any]:
    named = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": named, "additionalProperties": False, **more}


def is_int(value: Any) -> bool:
    return type(value) is int


WORD = {"type": "string", "maxLength": 12}
NODE = an_object(
    {"name": {"enum": ["a", "b"]}, "kids": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 1}}
)


def is_node(value: Any, depth: int = 0) -> bool:
    return (
        list(value) == ["name", "kids"]
        and value["name"] in ("a", "b")
        and len(value["kids"]) <= 1
        and all(is_node(kid, depth + 1) for kid in value["kids"])
    )


SHAPES: dict[str, tuple[dict[str, Any], Callable[[Any], bool]]] = {
    "an enum": ({"enum": ["red", "green", 3, None, True]}, lambda v: v in ("red", "green", 3, None, True)),
    "unicode": (
        an_object({"größe": {"enum": ["klein", "groß"]}, "你好": {"const": "😀 и é"}}),
        lambda v: v["größe"] in ("klein", "groß") and v["你好"] == "😀 и é",
    ),
    "a bounded string": ({"type": "string", "minLength": 3, "maxLength": 9}, lambda v: 3 <= len(v) <= 9),
    "a pattern": (
        {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
        lambda v: bool(re.fullmatch(r"[A-Z]{2}-[0-9]{3}", v)),
    ),
    "a date": ({"type": "string", "format": "date"}, lambda v: bool(re.fullmatch(r"\d{4}-\d\d-\d\d", v))),
    "an integer with bounds": (
        {"type": "integer", "minimum": -7, "maximum": 120},
        lambda v: is_int(v) and -7 <= v <= 120,
    ),
    "a number with bounds": ({"type": "number", "minimum": 0, "maximum": 1}, lambda v: 0 <= v <= 1),
    "a boolean": ({"type": "boolean"}, lambda v: v in (True, False)),
    "an array with bounds": (
        {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "minItems": 2, "maxItems": 5},
        lambda v: 2 <= len(v) <= 5 and all(is_int(one) and 0 <= one <= 9 for one in v),
    ),
    "a tuple": (
        {"type": "array", "prefixItems": [{"type": "boolean"}, WORD], "items": False, "minItems": 2},
        lambda v: len(v) == 2 and isinstance(v[0], bool) and isinstance(v[1], str),
    ),
    "nested objects": (
        an_object({"id": {"const": 7}, "at": an_object({"x": {"enum": [0, 1]}, "y": an_object({"z": WORD})})}),
        lambda v: list(v) == ["id", "at"] and len(v["at"]["y"]["z"]) <= 12,
    ),
    "optional fields": (
        an_object({"a": WORD, "b": {"type": "boolean"}, "c": {"type": "null"}}, ["b"]),
        lambda v: {"b"} <= set(v) <= {"a", "b", "c"} and isinstance(v["b"], bool),
    ),
    "either of two": (
        {"anyOf": [an_object({"ok": {"const": True}}), an_object({"error": WORD})]},
        lambda v: v == {"ok": True} or (list(v) == ["error"] and len(v["error"]) <= 12),
    ),
    "a schema that refers to itself": ({"$ref": "#/$defs/node", "$defs": {"node": NODE}}, is_node),
}  # fmt: skip


@pytest.fixture(scope="module")
def engine(tiny_model_dir: Path) -> Iterator[EngineUnderTest]:
    with running(make_engine(tiny_model_dir, num_blocks=256)) as engine:
        yield engine


def under(schema: dict[str, Any], **params: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": MAX_TOKENS, "grammar": grammar_of(schema), **params})


def check_shape(name: str, text: str, finish_reason: str) -> None:
    is_valid = SHAPES[name][1]
    assert finish_reason == "stop", text
    assert is_valid(json.loads(text)), text


@pytest.mark.parametrize("name", SHAPES)
def test_whatever_the_model_wants_the_answer_has_its_shape(engine: EngineUnderTest, name: str) -> None:
    ways = [{"temperature": 0.0}, *({"temperature": 0.3 + i, "seed": i} for i in range(3))]
    for pending in [engine.submit(PROMPT, under(SHAPES[name][0], **EAGER, **way)) for way in ways]:
        answer = pending.wait()
        check_shape(name, answer.text, answer.finish_reason)


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(sorted(SHAPES)),
    seed=st.integers(0, 2**63 - 1),
    temperature=st.floats(0.01, 2.0),
    top_k=st.integers(0, 5),
    prompt_seed=st.integers(0, 9),
)
def test_under_any_seed_and_temperature(
    engine: EngineUnderTest, name: str, seed: int, temperature: float, top_k: int, prompt_seed: int
) -> None:
    params = under(SHAPES[name][0], seed=seed, temperature=temperature, top_k=top_k, **EAGER)
    answer = engine.submit(prompt_of(20, seed=prompt_seed), params).wait()
    check_shape(name, answer.text, answer.finish_reason)


def test_any_object_may_come_where_no_schema_says_more(engine: EngineUnderTest) -> None:
    for seed in range(6):
        answer = engine.submit(PROMPT, under({"type": "object"}, seed=seed, temperature=2.0)).wait()
        assert answer.text.startswith("{")
        if answer.finish_reason == "stop":
            assert isinstance(json.loads(answer.text), dict)


def test_others_of_the_batch_get_the_tokens_that_they_get_alone(engine: EngineUnderTest) -> None:
    free = [SamplingParams(40, temperature=0.0), SamplingParams(40, seed=5), SamplingParams(40, seed=6, top_k=9)]
    bound = [under(SHAPES[name][0], seed=i) for i, name in enumerate(("unicode", "nested objects", "a tuple"))]
    alone = [engine.submit(PROMPT, params).wait().token_ids for params in [*free, *bound]]
    together = [engine.submit(PROMPT, params) for params in [*free, *bound]]
    assert [pending.wait().token_ids for pending in together] == alone


def test_while_a_grammar_is_compiled_others_go_on_and_a_cancel_is_heeded(tiny_model_dir: Path) -> None:
    # A thousand optional properties take long enough to compile.
    slow = under({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1500)}})
    with running(make_engine(tiny_model_dir)) as engine:
        batches: list[TokenBatch] = []
        engine.submit(PROMPT, slow, listener=Listener(batches.append), request_id="slow")
        answer = engine.submit(PROMPT, SamplingParams(8, temperature=0.0)).wait()
        assert len(answer.token_ids) == 8
        assert not batches, "it was compiled too soon for this test"
        engine.engine.cancel("slow")
        assert len(engine.greedy(PROMPT, 4).token_ids) == 4
        assert engine.engine.counters["cancelled"] == 1
        second = engine.submit(PROMPT, under({"const": 1}), request_id="slow").wait()
        assert second.text == "1"
        assert engine.engine.stats()["num_admitted"] == 0
        assert not batches


def test_a_late_mask_delays_its_own_sequence_alone(tiny_model_dir: Path) -> None:
    schema, _ = SHAPES["nested objects"]
    with running(make_engine(tiny_model_dir)) as engine:
        alone = [engine.submit(PROMPT, under(schema, seed=3)).wait(), engine.greedy(PROMPT, 20)]
        released = threading.Event()
        grammars = engine.engine._grammars
        assert grammars is not None
        grammars._masking.submit(released.wait)
        late = engine.submit(PROMPT, under(schema, seed=3))
        first = late.first()  # its mask is as old as the matcher
        assert engine.greedy(PROMPT, 20).token_ids == alone[1].token_ids
        assert late.batches.empty()
        released.set()
        assert [*first.token_ids, *late.wait().token_ids] == alone[0].token_ids
        generated = 2 * sum(len(answer.token_ids) for answer in alone)
        assert engine.engine.counters["generated_tokens"] == generated


def test_a_cancel_is_heeded_while_a_mask_is_late(tiny_model_dir: Path) -> None:
    with running(make_engine(tiny_model_dir)) as engine:
        released = threading.Event()
        grammars = engine.engine._grammars
        assert grammars is not None
        grammars._masking.submit(released.wait)
        late = engine.submit(PROMPT, under({"const": "abcdef"}), request_id="late")
        late.first()
        assert len(engine.greedy(PROMPT, 5).token_ids) == 5
        engine.engine.cancel("late")
        released.set()
        assert len(engine.greedy(PROMPT, 5).token_ids) == 5
        engine.engine.check_integrity()
        assert engine.engine.stats()["num_admitted"] == 0


def test_a_grammar_of_no_use_fails_its_request_alone(engine: EngineUnderTest) -> None:
    bad = engine.submit(PROMPT, under({"type": "nope"}))
    assert len(engine.greedy(PROMPT, 4).token_ids) == 4
    answer = bad.wait()
    assert (answer.finish_reason, answer.token_ids) == ("error", [])
    assert "Invalid type: nope" in answer.text


def test_too_few_tokens_end_it_in_the_middle(engine: EngineUnderTest) -> None:
    answer = engine.submit(PROMPT, under({"const": "a long constant"}, max_tokens=4)).wait()
    assert (answer.finish_reason, len(answer.token_ids)) == ("length", 4)
    assert json.dumps("a long constant").startswith(answer.text)


def test_as_many_tokens_as_it_takes_are_enough(engine: EngineUnderTest) -> None:
    whole = engine.submit(PROMPT, under({"const": ["abc"]})).wait()
    again = engine.submit(PROMPT, under({"const": ["abc"]}, max_tokens=len(whole.token_ids))).wait()
    assert (again.finish_reason, again.text) == ("stop", '["abc"]')
    assert EOS not in whole.token_ids, "nothing else can come, so the end need not be sampled"


def test_the_end_is_allowed_only_where_the_grammar_accepts(engine: EngineUnderTest) -> None:
    at_once = under({"type": "integer", "minimum": 100}, logit_bias=((EOS, 100.0),))
    answer = engine.submit(PROMPT, at_once).wait()
    assert re.fullmatch(r"\d{3,}", answer.text)
    assert answer.token_ids[-1] == EOS
    longer = engine.submit(PROMPT, replace(at_once, min_tokens=len(answer.token_ids) + 4)).wait()
    assert len(longer.text) > len(answer.text)
    # Neither can keep an answer going that its grammar has ended.
    for params in ({"min_tokens": 100}, {"ignore_eos": True}):
        assert engine.submit(PROMPT, under({"const": 5}, **params)).wait().text == "5"
    ignoring = engine.submit(PROMPT, replace(at_once, ignore_eos=True)).wait()
    assert (ignoring.text, ignoring.finish_reason) == (answer.text, "stop")


def test_stop_strings_end_it_too(engine: EngineUnderTest) -> None:
    answer = engine.submit(PROMPT, under({"const": {"a": "bcd"}}, stop=('": ',))).wait()
    assert (answer.text, answer.finish_reason) == ('{"a', "stop")


def test_log_probabilities_are_those_among_the_allowed_tokens(engine: EngineUnderTest) -> None:
    pending = engine.submit(PROMPT, under({"type": "boolean"}, temperature=0.0, num_logprobs=5))
    first = pending.first()
    (logprob,) = first.logprobs
    assert sum(2.718281828459045**value for _, value in logprob.top) == pytest.approx(1.0)
    assert len(logprob.top) < 5


def test_an_answer_goes_on_where_another_engine_left_it(engine: EngineUnderTest) -> None:
    for temperature in (0.0, 0.9):
        params = under(SHAPES["nested objects"][0], seed=3, temperature=temperature, repetition_penalty=1.1)
        whole = engine.submit(PROMPT, params).wait()
        assert len(whole.token_ids) > 10
        for num_sent in (1, 9, len(whole.token_ids) - 1):
            sent = tuple(whole.token_ids[:num_sent])
            rest = engine.submit(PROMPT, params, generated=sent).wait()
            assert [*sent, *rest.token_ids] == whole.token_ids
            assert rest.finish_reason == "stop"


def test_what_was_sent_must_follow_the_grammar(engine: EngineUnderTest) -> None:
    answer = engine.submit(PROMPT, under({"const": 1}), generated=(77, 78)).wait()
    assert answer.finish_reason == "error"
    assert "does not follow" in answer.text


def test_each_choice_has_a_matcher_of_its_own(engine: EngineUnderTest) -> None:
    schema, _ = SHAPES["an array with bounds"]
    pending = [engine.submit(PROMPT, under(schema, seed=seed, temperature=1.5), num_choices=6) for seed in range(6)]
    answers = [one.wait() for one in pending]
    for answer in answers:
        check_shape("an array with bounds", answer.text, answer.finish_reason)
    assert len({answer.text for answer in answers}) > 1


@pytest.mark.parametrize("with_store", [True, False])
def test_a_preempted_answer_keeps_its_shape(tiny_model_dir: Path, with_store: bool) -> None:
    digits = {"type": "string", "pattern": "^[0-9]{90}$"}
    prompts = [prompt_of(60, seed=i) for i in range(4)]
    params = [under(digits, seed=i, max_tokens=100) for i in range(4)]
    with running(make_engine(tiny_model_dir)) as roomy:
        alone = [roomy.submit(p, s).wait().token_ids for p, s in zip(prompts, params, strict=True)]
    # At their ends they want forty blocks; the pool has twenty.
    with open_store(None) if with_store else nullcontext() as store:
        tight = make_engine(tiny_model_dir, store, num_blocks=5 * 64 // BLOCK_SIZE)
        with running(tight) as engine:
            pending = [engine.submit(p, s) for p, s in zip(prompts, params, strict=True)]
            answers = [one.wait() for one in pending]
            assert engine.engine.stats()["preemptions"] >= 1
    for answer in answers:
        assert re.fullmatch(r'"[0-9]{90}"', answer.text)
    assert [answer.token_ids for answer in answers] == alone
