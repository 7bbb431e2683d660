"""From what a chat request says about its answer's form to the grammar that the answer must follow, if any.

    tool_choice              response_format text    json_object, json_schema
    none, or no tools        -                       the JSON
    auto                     -                       the JSON, or calls
    required                 calls                   calls
    a named function         one call of it          one call of it

An answer that follows no grammar may still hold calls, where the choice is `auto`: see `ToolReader`. The schema is not
told to the model: whoever wants the model to know it says so in a message.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from serving.chat_schema import ChatCompletionRequest
from serving.engine.grammar import BadGrammar, check_grammar, json_rule
from serving.http_errors import ApiError, shorten
from serving.tool_calls import Tool, arguments_schema, calls_rules

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


def answer_grammar(asked: ChatCompletionRequest) -> str | None:
    """The grammar, which was checked; None if the answer is free.

    Takes milliseconds, for a huge schema seconds: call it in a thread. Raises ApiError that names the schema at fault.
    """
    forced, schema = asked.forced_tools(), _checked_schema(asked)
    if forced:
        return _calls_grammar(asked, forced, "start: calls\n")
    if schema is None:
        return None
    answer = f"answer: {json_rule(schema)}\n"
    if asked.callable_tools():
        return _calls_grammar(asked, asked.callable_tools(), f"start: answer | calls\n{answer}")
    return f"start: answer\n{answer}"


def _checked_schema(asked: ChatCompletionRequest) -> Mapping[str, Any] | None:
    if asked.response_format is None or asked.response_format.type == "text":
        return None
    named = asked.response_format.json_schema
    if asked.response_format.type == "json_object" or named is None:
        return ANY_OBJECT
    what = f"response_format '{named.name}'"
    _check(json_rule(named.schema_), what, "response_format.json_schema.schema", "invalid_json_schema")
    return named.schema_


def _calls_grammar(asked: ChatCompletionRequest, tools: Sequence[Tool], start: str) -> str:
    names = [tool.name for tool in asked.offered_tools()]
    for tool in tools:
        param = f"tools[{names.index(tool.name)}].function.parameters"
        _check(json_rule(arguments_schema(tool)), f"function '{tool.name}'", param, "invalid_function_parameters")
    grammar = start + calls_rules(tools, one=asked.wants_one_call())
    try:
        check_grammar(grammar)
    except BadGrammar as error:  # each schema by itself is good
        message = f"The tools are too much for one grammar: {shorten(str(error))}."
        raise ApiError(400, message, param="tools", code="invalid_function_parameters") from error
    return grammar


def _check(rule: str, what: str, param: str, code: str) -> None:
    try:
        check_grammar(f"start: {rule}\n")
    except BadGrammar as error:
        message = f"Invalid schema for {what}: {shorten(str(error))}."
        raise ApiError(400, message, param=param, code=code) from error
