"""Tools as models see them, and tool calls as they write them: texts only.

    <tool_call>
    {"name": "weather", "arguments": {"city": "Rome"}}
    </tool_call>

This form, which Hermes and Qwen models were taught, is what a forced call is held to, what a model without a form of
its own is told, and how its calls come back in the next prompt: character for character, so the prompt's KV is found.
In an answer that was left free, JSON alone counts too, one call or a list of them, as Llama and Mistral models write.
Knows no request schemas and no templates. Never runs anything.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serving.engine.grammar import json_rule

OPEN, CLOSE = "<tool_call>", "</tool_call>"

_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the client offers."""

    name: str
    parameters: Mapping[str, Any]
    """JSON schema of its arguments, an object."""
    description: str | None = None

    def as_template_input(self) -> dict[str, Any]:
        """As chat templates expect it: OpenAI's own shape."""
        described = {} if self.description is None else {"description": self.description}
        return {"type": "function", "function": {"name": self.name, **described, "parameters": dict(self.parameters)}}


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of one of them."""

    id: str
    name: str
    arguments: str
    """A JSON object, as it was written."""

    def as_text(self) -> str:
        return f'{OPEN}\n{{"name": {json.dumps(self.name)}, "arguments": {self.arguments}}}\n{CLOSE}'

    def as_template_input(self) -> dict[str, Any]:
        """As chat templates expect it: unlike in OpenAI's shape, the arguments are an object."""
        function = {"name": self.name, "arguments": json.loads(self.arguments)}
        return {"id": self.id, "type": "function", "function": function}


def tools_text(tools: Sequence[Tool]) -> str:
    """What a model is told of `tools` whose template does not do it."""
    lines = "\n".join(json.dumps(tool.as_template_input(), ensure_ascii=False) for tool in tools)
    return (
        "You can call functions. These are described here, one to a line:\n"
        f"<tools>\n{lines}\n</tools>\n"
        "To call a function, write its name and its arguments as JSON, like this and with nothing behind it:\n"
        f'{OPEN}\n{{"name": "...", "arguments": {{...}}}}\n{CLOSE}'
    )


def result_text(content: str) -> str:
    """What a function gave back, for a model whose template has no place for it."""
    return f"<tool_response>\n{content}\n</tool_response>"


def arguments_schema(tool: Tool) -> dict[str, Any]:
    """Schema of a call's arguments, which are an object whether the client says so or not."""
    return {"type": "object", **tool.parameters}


def calls_rules(tools: Sequence[Tool], *, one: bool) -> str:
    """Grammar rules of `calls`: calls of any of `tools`, at least one, and one only if `one`.

    The parameters of each are a root of their own, so that their `$ref` find what they mean.
    """
    rules = ["calls: call" if one else 'calls: call ("\\n" call)*']
    rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(tools))))
    for i, tool in enumerate(tools):
        begin = json.dumps(f'{OPEN}\n{{"name": {json.dumps(tool.name)}, "arguments": ')
        rules.append(f"call_{i}: {begin} {json_rule(arguments_schema(tool))} {json.dumps(f'}}{chr(10)}{CLOSE}')}")
    return "\n".join(rules) + "\n"


class ToolReader:
    """Parts one answer, as its text comes, into content and calls.

    Text goes on at once until a call may have begun; from there on it is kept until the end, which tells. What looked
    like a call and is none, because it is broken, cut short, or of an unknown tool, is content after all.
    """

    def __init__(self, names: frozenset[str], id_prefix: str, *, accepts_bare: bool) -> None:
        """`names`: of the tools. `accepts_bare`: JSON that is the whole answer may be a call."""
        self._names = names
        self._id_prefix = id_prefix
        self._accepts_bare = accepts_bare
        self._held = ""
        self._has_sent = False
        self._is_call = False

    def __repr__(self) -> str:
        return f"<ToolReader held={len(self._held)} is_call={self._is_call}>"

    def push(self, text: str) -> str:
        """More of the answer; the content that is now certain."""
        self._held += text
        if self._is_call:
            return ""
        start = self._held.find(OPEN)
        if self._accepts_bare and not self._has_sent and self._held.lstrip()[:1] in ("{", "["):
            start = 0
        self._is_call = start >= 0
        certain = self._held[: start if self._is_call else len(self._held) - _num_open_chars(self._held)].rstrip()
        self._held = self._held[len(certain) :]
        self._has_sent = self._has_sent or bool(certain)
        return certain

    def finish(self) -> tuple[str, tuple[ToolCall, ...]]:
        """The rest of the content, and the calls. Once, at the end."""
        held, self._held = self._held, ""
        if not self._is_call:
            return held, ()
        try:
            content, pairs = _tagged(held) if OPEN in held else ("", _bare(held))
        except (ValueError, RecursionError):
            return held, ()
        if not all(name in self._names for name, _ in pairs):
            return held, ()
        calls = (ToolCall(f"{self._id_prefix}{i}", name, arguments) for i, (name, arguments) in enumerate(pairs))
        return content, tuple(calls)


def _num_open_chars(text: str) -> int:
    """Length of the longest end of `text` that a tag may begin with."""
    lengths = range(min(len(OPEN) - 1, len(text)), 0, -1)
    return next((length for length in lengths if text.endswith(OPEN[:length])), 0)


def _tagged(text: str) -> tuple[str, list[tuple[str, str]]]:
    """What is beside the calls, and each one's name and arguments. Raises ValueError if one is broken."""
    content, calls, at = "", [], 0
    while (start := text.find(OPEN, at)) >= 0:
        content += text[at:start]
        call, at = _call_at(text, start + len(OPEN))
        calls.append(call)
        at = _skip_space(text, at)
        if text.startswith(CLOSE, at):
            at += len(CLOSE)
    return (content + text[at:]).strip(), calls


def _bare(text: str) -> list[tuple[str, str]]:
    """The calls that the whole of `text` is. Raises ValueError if it is anything else."""
    at = _skip_space(text, 0)
    is_list = text.startswith("[", at)
    call, at = _call_at(text, at + is_list)
    calls, at = [call], _skip_space(text, at)
    while is_list and text.startswith(",", at):
        call, at = _call_at(text, at + 1)
        calls.append(call)
        at = _skip_space(text, at)
    if text[at:].strip() != ("]" if is_list else ""):
        raise ValueError("there is something behind the calls")
    return calls


def _call_at(text: str, at: int) -> tuple[tuple[str, str], int]:
    """Name and arguments of the call written at `at`, and where it ends. Raises ValueError."""
    members, at = _members_at(text, _skip_space(text, at))
    name = json.loads(members.get("name", "null"))
    arguments = members.get("arguments", members.get("parameters", "{}"))
    if not isinstance(name, str) or not arguments.startswith("{"):
        raise ValueError("a call has a name and arguments")
    return (name, arguments), at


def _members_at(text: str, at: int) -> tuple[dict[str, str], int]:
    """The members of the object at `at`, their values as they are written, and where the object ends."""
    value, end = _JSON.raw_decode(text, at)
    if not isinstance(value, dict):
        raise ValueError("a call is an object")
    members: dict[str, str] = {}
    at += 1
    for _ in value:
        key, at = _JSON.raw_decode(text, _skip_space(text, at))
        start = _skip_space(text, _skip_space(text, at) + 1)
        _, at = _JSON.raw_decode(text, start)
        members[key] = text[start:at]
        at = _skip_space(text, at) + 1
    return members, end


def _skip_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None
    return match.end()


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


_JSON = json.JSONDecoder(parse_constant=_refuse)
