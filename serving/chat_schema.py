"""OpenAI's chat completions: the request's messages and what only chat has, the answer, its chunks."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from serving.chat import ChatMessage
from serving.openai_schema import (
    MAX_TOP_LOGPROBS,
    OTHER_SERVERS_NEUTRAL,
    CompletionUsage,
    GenerationRequest,
    Incoming,
    OtherServersExtras,
    Outgoing,
)
from serving.tool_calls import Tool
from serving.tool_schema import (
    MAX_TOOLS,
    DeltaToolCall,
    MessageToolCall,
    NamedToolChoice,
    ResponseFormat,
    SentToolCall,
    ToolDefinition,
)


class TextPart(Incoming):
    type: Literal["text"]
    text: str


class Message(Incoming):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(min_length=1)] | None = Field(default=None, validate_default=True)
    name: str | None = None
    tool_calls: list[SentToolCall] | None = None
    tool_call_id: str | None = None

    @field_validator("content")
    @classmethod
    def _only_an_assistant_may_be_silent(cls, content: Any, info: ValidationInfo) -> Any:
        if content is None and info.data.get("role") not in (None, "assistant"):
            raise PydanticCustomError("missing", "only an assistant's message may be without content")
        return content

    @field_validator("tool_calls")
    @classmethod
    def _only_an_assistant_calls_tools(
        cls, tool_calls: list[SentToolCall] | None, info: ValidationInfo
    ) -> list[SentToolCall] | None:
        if tool_calls and info.data.get("role") not in (None, "assistant"):
            raise PydanticCustomError("role", "only an assistant's message may have tool calls")
        return tool_calls

    def as_chat_message(self) -> ChatMessage:
        """The message as the template sees it.

        Text parts are joined by newlines, as vLLM does. `developer` is OpenAI's newer name for `system`, and
        templates know only the older one.
        """
        text = self.content or ""
        if not isinstance(text, str):
            text = "\n".join(part.text for part in text)
        role = "system" if self.role == "developer" else self.role
        calls = tuple(call.as_tool_call() for call in self.tool_calls or ())
        return ChatMessage(role, text, self.name, calls, self.tool_call_id)


class ChatCompletionRequest(GenerationRequest, OtherServersExtras):
    """Body of `POST /v1/chat/completions`."""

    neutral: ClassVar[dict[str, tuple[object, ...]]] = {
        "functions": ([],),
        "function_call": ("none",),
        "modalities": (["text"],),
        "audio": (),
        "web_search_options": (),
        "echo": (False,),
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
        "chat_template": (),
        "chat_template_kwargs": ({},),
        **OTHER_SERVERS_NEUTRAL,
    }

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """OpenAI's newer name for `max_tokens`; it counts where both are given."""
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: Annotated[list[ToolDefinition], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: list[Any] | None = None
    function_call: Any = None
    response_format: ResponseFormat | None = None
    modalities: list[str] | None = None
    audio: Any = None
    web_search_options: Any = None
    echo: Any = None
    add_generation_prompt: Any = None
    continue_final_message: Any = None
    chat_template: Any = None
    chat_template_kwargs: Any = None

    @field_validator("top_logprobs")
    @classmethod
    def _top_logprobs_need_logprobs(cls, number: int | None, info: ValidationInfo) -> int | None:
        if number and not info.data.get("logprobs"):
            raise PydanticCustomError("top_logprobs", "only allowed when 'logprobs' is true")
        return number

    @field_validator("tools")
    @classmethod
    def _tools_differ(cls, tools: list[ToolDefinition] | None) -> list[ToolDefinition] | None:
        names = [tool.function.name for tool in tools or ()]
        if len(set(names)) < len(names):
            raise PydanticCustomError("names", "its functions should have different names")
        return tools

    @field_validator("tool_choice")
    @classmethod
    def _choice_is_among_the_tools(cls, choice: Any, info: ValidationInfo) -> Any:
        if choice in (None, "none") or "tools" not in info.data:
            return choice
        names = [tool.function.name for tool in info.data["tools"] or ()]
        if not names:
            raise PydanticCustomError("tools", "only allowed with 'tools'")
        if isinstance(choice, NamedToolChoice) and choice.function.name not in names:
            raise PydanticCustomError("name", "the function it names should be among 'tools'")
        return choice

    @property
    def requested_max_tokens(self) -> tuple[str, int] | None:
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return super().requested_max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None

    def chat_messages(self) -> list[ChatMessage]:
        return [message.as_chat_message() for message in self.messages]

    def offered_tools(self) -> tuple[Tool, ...]:
        """All of them. The model is told of them even where it may not call any, so that prompts share their front."""
        return tuple(tool.as_tool() for tool in self.tools or ())

    def callable_tools(self) -> tuple[Tool, ...]:
        """Those that the answer may call."""
        return () if self.tool_choice == "none" else self.forced_tools() or self.offered_tools()

    def forced_tools(self) -> tuple[Tool, ...]:
        """Those of which the answer must call one; none if it is free not to."""
        if self.tool_choice == "required":
            return self.offered_tools()
        if not isinstance(self.tool_choice, NamedToolChoice):
            return ()
        name = self.tool_choice.function.name
        return tuple(tool for tool in self.offered_tools() if tool.name == name)

    def wants_one_call(self) -> bool:
        """An answer that must be calls is one call only."""
        return isinstance(self.tool_choice, NamedToolChoice) or self.parallel_tool_calls is False


class TopLogprob(Outgoing):
    """A token that could have been chosen."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenLogprob(TopLogprob):
    """A token of the answer."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(Outgoing):
    content: list[ChosenLogprob]
    refusal: None


class AnswerMessage(Outgoing):
    role: Literal["assistant"]
    content: str | None
    """Null where there are tool calls and nothing else."""
    refusal: None
    tool_calls: list[MessageToolCall] | None = None
    """Set where there are some."""


class Choice(Outgoing):
    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: str


class ChatCompletion(Outgoing):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: CompletionUsage


class Delta(Outgoing):
    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: None = None
    tool_calls: list[DeltaToolCall] | None = None


class ChunkChoice(Outgoing):
    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None
    finish_reason: str | None


class ChatCompletionChunk(Outgoing):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: CompletionUsage | None = None
    """Set, if only to null, where the client asked for usage."""
