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


class TextPart(Incoming):
    type: Literal["text"]
    text: str


class Message(Incoming):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(min_length=1)] | None = Field(default=None, validate_default=True)
    name: str | None = None
    tool_calls: list[Any] | None = None

    @field_validator("content")
    @classmethod
    def _only_an_assistant_may_be_silent(cls, content: Any, info: ValidationInfo) -> Any:
        if content is None and info.data.get("role") not in (None, "assistant"):
            raise PydanticCustomError("missing", "only an assistant's message may be without content")
        return content

    @field_validator("tool_calls")
    @classmethod
    def _no_tool_calls(cls, tool_calls: list[Any] | None) -> list[Any] | None:
        if tool_calls:
            raise PydanticCustomError("unsupported", "tool calls are not supported by this server")
        return tool_calls

    def as_chat_message(self) -> ChatMessage:
        """The message as the template sees it.

        Text parts are joined by newlines, as vLLM does. `developer` is OpenAI's newer name for `system`, and
        templates know only the older one.
        """
        text = self.content or ""
        if not isinstance(text, str):
            text = "\n".join(part.text for part in text)
        return ChatMessage("system" if self.role == "developer" else self.role, text, self.name)


class ChatCompletionRequest(GenerationRequest, OtherServersExtras):
    """Body of `POST /v1/chat/completions`."""

    neutral: ClassVar[dict[str, tuple[object, ...]]] = {
        "tools": ([],),
        "tool_choice": ("none",),
        "functions": ([],),
        "function_call": ("none",),
        "response_format": ({"type": "text"},),
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
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    function_call: Any = None
    response_format: dict[str, Any] | None = None
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
    content: str
    refusal: None


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
