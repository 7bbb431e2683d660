"""The parts of a chat request and its answer that are about structure: response format, tools, tool calls."""

import json
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from serving.openai_schema import Incoming, Outgoing
from serving.tool_calls import Tool, ToolCall

MAX_TOOLS = 128

Name = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
"""Of a function that leaves them out."""


class JsonSchemaFormat(Incoming):
    """What a schema is for. `strict` makes no difference: an answer always follows its schema."""

    name: Name
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Incoming):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = Field(default=None, validate_default=True)

    @field_validator("json_schema")
    @classmethod
    def _schema_where_the_type_says_so(
        cls, json_schema: JsonSchemaFormat | None, info: ValidationInfo
    ) -> JsonSchemaFormat | None:
        if json_schema is None and info.data.get("type") == "json_schema":
            raise PydanticCustomError("missing", "needed where 'type' is 'json_schema'")
        return json_schema


class FunctionDefinition(Incoming):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolDefinition(Incoming):
    type: Literal["function"]
    function: FunctionDefinition

    def as_tool(self) -> Tool:
        parameters = self.function.parameters
        return Tool(self.function.name, NO_PARAMETERS if parameters is None else parameters, self.function.description)


class NamedFunction(Incoming):
    name: str


class NamedToolChoice(Incoming):
    type: Literal["function"]
    function: NamedFunction


class SentFunctionCall(Incoming):
    name: str
    arguments: str

    @field_validator("arguments")
    @classmethod
    def _arguments_are_an_object(cls, arguments: str) -> str:
        try:
            is_object = isinstance(json.loads(arguments or "{}"), dict)
        except (ValueError, RecursionError):
            is_object = False
        if not is_object:
            raise PydanticCustomError("arguments", "it should be a JSON object, written as a string")
        return arguments or "{}"


class SentToolCall(Incoming):
    """A call of an earlier turn, as the client got it."""

    id: str
    type: Literal["function"] = "function"
    function: SentFunctionCall

    def as_tool_call(self) -> ToolCall:
        return ToolCall(self.id, self.function.name, self.function.arguments)


class CalledFunction(Outgoing):
    name: str
    arguments: str


class MessageToolCall(Outgoing):
    id: str
    type: Literal["function"]
    function: CalledFunction

    @classmethod
    def of(cls, call: ToolCall) -> "MessageToolCall":
        return cls(id=call.id, type="function", function=CalledFunction(name=call.name, arguments=call.arguments))


class DeltaToolCall(MessageToolCall):
    """A call in a stream; it comes whole."""

    index: int

    @classmethod
    def at(cls, index: int, call: ToolCall) -> "DeltaToolCall":
        function = CalledFunction(name=call.name, arguments=call.arguments)
        return cls(index=index, id=call.id, type="function", function=function)
