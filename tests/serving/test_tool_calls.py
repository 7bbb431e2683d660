"""Tool calls as texts: held to a grammar, read from answers, written back."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from serving.engine.grammar import check_grammar
from serving.tool_calls import Tool, ToolCall, ToolReader, calls_rules, tools_text

CITY = {"type": "object", "properties": {"city": {"$ref": "#/$defs/city"}}, "required": ["city"]} | {
    "additionalProperties": False,
    "$defs": {"city": {"enum": ["Rome", "Köln", 'a "quoted" // one']}},
}
WEATHER = Tool("weather", CITY, "Tells the weather")
TIME = Tool("time-2", {"type": "object", "properties": {}, "additionalProperties": False})
NAMES = frozenset({"weather", "time-2"})
ROME = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "time-2", "arguments": {}}\n</tool_call>'


def accepts(grammar: str, text: str) -> bool:
    matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0)
    return bool(matcher.consume_tokens(list(text.encode()))) and matcher.is_accepting()


def read(*texts: str, accepts_bare: bool = True, names: frozenset[str] = NAMES) -> tuple[str, list[tuple[str, str]]]:
    """Content and calls of an answer that comes in these pieces."""
    reader = ToolReader(names, "id", accepts_bare=accepts_bare)
    content = "".join([reader.push(text) for text in texts])
    rest, calls = reader.finish()
    assert [call.id for call in calls] == [f"id{i}" for i in range(len(calls))]
    return content + rest, [(call.name, call.arguments) for call in calls]


def test_the_grammar_takes_calls_of_the_tools_and_nothing_else() -> None:
    grammar = "start: calls\n" + calls_rules([WEATHER, TIME], one=False)
    check_grammar(grammar)
    assert accepts(grammar, ROME)
    assert accepts(grammar, f"{ROME}\n{NOW}\n{ROME}")
    for text in ("", "hello", ROME.replace("Rome", "Bonn"), ROME.replace("weather", "time-2"), f"{ROME} {NOW}", "{}"):
        assert not accepts(grammar, text)
    one = "start: calls\n" + calls_rules([WEATHER], one=True)
    assert accepts(one, ROME)
    assert not accepts(one, f"{ROME}\n{ROME}")


def test_what_the_grammar_takes_is_read_and_written_back_the_same() -> None:
    grammar = "start: calls\n" + calls_rules([WEATHER], one=True)
    for city in ("Rome", "Köln", 'a "quoted" // one'):
        call = ToolCall("id0", "weather", json.dumps({"city": city}, ensure_ascii=False))
        assert accepts(grammar, call.as_text())
        assert read(call.as_text()) == ("", [(call.name, call.arguments)])


@pytest.mark.parametrize("cut", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("Hello there.", "Hello there.", []),
        ("  two\n\n", "  two\n\n", []),
        ("", "", []),
        (ROME, "", [("weather", '{"city": "Rome"}')]),
        (f"Let me see.\n{ROME}\n", "Let me see.", [("weather", '{"city": "Rome"}')]),
        (f"{ROME}\n{NOW}", "", [("weather", '{"city": "Rome"}'), ("time-2", "{}")]),
        (f"{ROME} Done.", "Done.", [("weather", '{"city": "Rome"}')]),
        (ROME.removesuffix("</tool_call>"), "", [("weather", '{"city": "Rome"}')]),
        ('{"name": "time-2", "parameters": {"a": 1e400}}', "", [("time-2", '{"a": 1e400}')]),
        ('{"name": "time-2"}', "", [("time-2", "{}")]),
        ('[ {"arguments":{}, "name":"time-2"}, {"name": "weather"} ]\n', "", [("time-2", "{}"), ("weather", "{}")]),
        (ROME.replace("Rome", "</tool_call>"), "", [("weather", '{"city": "</tool_call>"}')]),
        ("a <tool", "a <tool", []),
        ("1 < 2 <tool_cal1>", "1 < 2 <tool_cal1>", []),
    ],
)  # fmt: skip
def test_an_answer_is_content_and_calls(text: str, content: str, calls: list[tuple[str, str]], cut: int) -> None:
    assert read(*(text[at : at + cut] for at in range(0, len(text), cut))) == (content, calls)


@pytest.mark.parametrize(
    "text",
    [
        ROME[:-20],
        "<tool_call>",
        f"see {ROME} and <tool_call>broken",
        ROME.replace("weather", "unknown"),
        ROME.replace('{"city": "Rome"}', '"Rome"'),
        ROME.replace('"Rome"', "NaN"),
        '{"name": "unknown", "arguments": {}}',
        '{"city": "Rome"}',
        '{"name": "weather", "arguments": {}} and more',
        '[{"name": "weather"}',
        "[]",
        "{",
        "[1, 2]",
        "{" * 5000,
        '{"name": "weather", "arguments": ' + '{"a": ' * 5000,
    ],
)
def test_what_is_no_call_of_a_tool_is_content_to_the_last_character(text: str) -> None:
    assert read(text) == (text, [])
    assert read(*text) == (text, [])


def test_json_that_was_asked_for_is_no_call() -> None:
    bare = '{"name": "weather", "arguments": {}}'
    assert read(bare, accepts_bare=False) == (bare, [])
    assert read(ROME, accepts_bare=False) == ("", [("weather", '{"city": "Rome"}')])


def test_text_is_passed_on_as_soon_as_it_is_sure_to_be_content() -> None:
    reader = ToolReader(NAMES, "", accepts_bare=True)
    assert [reader.push(text) for text in ("Let", " me ", "see <", "b> <to", "ol_call>", "{")] == [
        "Let", " me", " see", " <b>", "", "",
    ]  # fmt: skip


@given(st.text("<tool_call>{}[] \nab", max_size=60), st.integers(1, 7))
def test_whatever_comes_is_neither_lost_nor_cut_by_chance(text: str, cut: int) -> None:
    whole = read(text)
    assert read(*(text[at : at + cut] for at in range(0, len(text), cut))) == whole
    assert whole == (text, [])


def test_the_description_has_a_line_for_each_tool() -> None:
    lines = tools_text([WEATHER, TIME]).splitlines()
    described: list[Any] = [json.loads(line) for line in lines if line.startswith('{"type"')]
    assert described == [WEATHER.as_template_input(), TIME.as_template_input()]
    assert "description" not in described[1]["function"]
