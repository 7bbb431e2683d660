"""OpenAI's chat completions, as far as this server speaks them: requests, answers, stream chunks.

Requests are validated strictly (no "5" for 5). Unknown fields are ignored, as OpenAI's clients expect, but a
known field whose effect would silently be missing is named by `unsupported_parameter`. Answers hold every key
that OpenAI's schema requires, null where we have nothing; what was not set is not sent.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from serving.chat import ChatMessage
from serving.protocol import SamplingParams, Usage

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
MAX_STOP_STRINGS = 4

StopString = Annotated[str, StringConstraints(min_length=1)]


class Incoming(BaseModel):
    """A part of a request."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


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


class StreamOptions(Incoming):
    include_usage: bool | None = None


class TokenloftOptions(Incoming):
    """Our extension of the request. Its keys are strict: a misspelt one is refused."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    cache: bool = True
    """False: nothing stored is looked up for this request and nothing of it is kept."""


class NotYetSupported(Incoming):
    """Parameters that are understood only where they ask for nothing; see `_NEUTRAL`."""

    n: int | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    function_call: Any = None
    response_format: dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    logit_bias: dict[str, float] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    modalities: list[str] | None = None
    audio: Any = None
    web_search_options: Any = None
    # Not OpenAI's own, but sent by clients of other servers.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None

    def unsupported_parameter(self) -> str | None:
        """Name of the first parameter that asks for something this server would not do."""
        for name, neutral in _NEUTRAL.items():
            value = getattr(self, name)
            if value is not None and value not in neutral:
                return name
        return None


_NEUTRAL: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "top_k": (0, -1),
    "min_p": (0,),
    "repetition_penalty": (1,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
}
"""Values, null aside, that ask for nothing."""


class ChatCompletionRequest(NotYetSupported):
    """Body of `POST /v1/chat/completions`. Null is the same as absent, throughout."""

    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """OpenAI's newer name for `max_tokens`; it counts where both are given."""
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=INT64_MIN, le=INT64_MAX)
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    tokenloft: TokenloftOptions | None = None

    @field_validator("stream_options")
    @classmethod
    def _stream_options_need_a_stream(cls, options: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if options is not None and not info.data.get("stream"):
            raise PydanticCustomError("stream_options", "only allowed when 'stream' is true")
        return options

    @property
    def requested_max_tokens(self) -> tuple[str, int] | None:
        """Name and value of the bound that the client set, None if it left the rest of the context to us."""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return None if self.max_tokens is None else ("max_tokens", self.max_tokens)

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def use_cache(self) -> bool:
        return self.tokenloft is None or self.tokenloft.cache

    def chat_messages(self) -> list[ChatMessage]:
        return [message.as_chat_message() for message in self.messages]

    def sampling(self, max_tokens: int, default_seed: int) -> SamplingParams:
        """Sampling with OpenAI's defaults filled in."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=default_seed if self.seed is None else self.seed,
            stop=tuple(stop),
        )


class Outgoing(BaseModel):
    """A part of an answer. Only what was set is sent, so a null is there on purpose."""

    model_config = ConfigDict(frozen=True)

    def as_json(self) -> bytes:
        return self.model_dump_json(exclude_unset=True).encode("utf-8")


class PromptTokensDetails(Outgoing):
    cached_tokens: int
    audio_tokens: int


class CompletionTokensDetails(Outgoing):
    reasoning_tokens: int
    audio_tokens: int
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class CachedByTier(Outgoing):
    """Prompt tokens whose KV was found, by the tier it came from. They add up to `cached_tokens`."""

    device: int
    dram: int
    disk: int
    remote: int


class ComputedByRole(Outgoing):
    """Prompt tokens whose KV was computed, by the role that did it."""

    prefill: int
    decode: int


class TokenloftUsage(Outgoing):
    """Our extension of the usage."""

    cached: CachedByTier
    computed: ComputedByRole
    load_s: float
    ttft_s: float
    route: str
    """Why the router chose this replica."""


class CompletionUsage(Outgoing):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails
    tokenloft: TokenloftUsage

    @classmethod
    def of(cls, usage: Usage) -> "CompletionUsage":
        return cls(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            total_tokens=usage.prompt_tokens + usage.completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=usage.cached_tokens, audio_tokens=0),
            completion_tokens_details=CompletionTokensDetails(
                reasoning_tokens=0, audio_tokens=0, accepted_prediction_tokens=0, rejected_prediction_tokens=0
            ),
            tokenloft=TokenloftUsage(
                cached=CachedByTier(
                    device=usage.device_tokens,
                    dram=usage.dram_tokens,
                    disk=usage.disk_tokens,
                    remote=usage.remote_tokens,
                ),
                computed=ComputedByRole(prefill=usage.prefill_tokens, decode=usage.decode_computed_tokens),
                load_s=usage.load_s,
                ttft_s=usage.ttft_s,
                route=usage.reason,
            ),
        )


class AnswerMessage(Outgoing):
    role: Literal["assistant"]
    content: str
    refusal: None


class Choice(Outgoing):
    index: int
    message: AnswerMessage
    logprobs: None
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
    logprobs: None
    finish_reason: str | None


class ChatCompletionChunk(Outgoing):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: CompletionUsage | None = None
    """Set, if only to null, where the client asked for usage."""


class ModelCard(Outgoing):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    """Our extension: tokens that prompt and answer share."""


class ModelList(Outgoing):
    object: Literal["list"]
    data: list[ModelCard]
