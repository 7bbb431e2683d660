"""OpenAI's older completions: a prompt as text or token ids goes in, text comes out, no messages."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PlainValidator
from pydantic_core import PydanticCustomError

from serving.openai_schema import (
    MAX_TOP_LOGPROBS,
    OTHER_SERVERS_NEUTRAL,
    CompletionUsage,
    GenerationRequest,
    OtherServersExtras,
    Outgoing,
)

MAX_PROMPTS = 32
DEFAULT_MAX_TOKENS = 16
"""OpenAI's default at this endpoint."""

TextPrompt = str | list[int]
"""A text, or the token ids of one."""


def _as_prompts(value: Any) -> list[TextPrompt]:
    """The four shapes that a prompt may have, as a list of prompts."""
    prompts: list[Any] = value if _is_list_of_prompts(value) else [value]
    if len(prompts) > MAX_PROMPTS:
        raise PydanticCustomError("too_long", "it should hold at most {limit} prompts", {"limit": MAX_PROMPTS})
    if not all(_is_prompt(prompt) for prompt in prompts) or len({type(prompt) for prompt in prompts}) > 1:
        raise PydanticCustomError(
            "prompt_type", "it should be a text, a list of texts, a list of token ids, or a list of such lists"
        )
    if not prompts or not all(prompts):
        raise PydanticCustomError("empty", "it should not be empty")
    return prompts


def _is_list_of_prompts(value: Any) -> bool:
    """Also true of an empty list, which holds nothing either way."""
    return isinstance(value, list) and not (value and isinstance(value[0], int))


def _is_prompt(value: Any) -> bool:
    # type() and not isinstance(): true and false are no token ids.
    return isinstance(value, str) or (isinstance(value, list) and all(type(one) is int for one in value))


class CompletionRequest(GenerationRequest, OtherServersExtras):
    """Body of `POST /v1/completions`."""

    neutral: ClassVar[dict[str, tuple[object, ...]]] = {
        "suffix": ("",),
        "response_format": ({"type": "text"},),
        "add_special_tokens": (True,),
        **OTHER_SERVERS_NEUTRAL,
    }

    prompt: Annotated[list[TextPrompt], PlainValidator(_as_prompts)]
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    best_of: int | None = None
    suffix: str | None = None
    response_format: dict[str, Any] | None = None
    add_special_tokens: Any = None

    def unsupported_parameter(self) -> str | None:
        # As many as are wanted means that none is left out.
        if self.best_of not in (None, self.num_choices):
            return "best_of"
        return super().unsupported_parameter()

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def is_token_prompt(self) -> bool:
        return not isinstance(self.prompt[0], str)

    def name_of_prompt(self, number: int) -> str:
        """How the client would write prompt `number`."""
        return "prompt" if len(self.prompt) == 1 else f"prompt[{number}]"


class TextLogprobs(Outgoing):
    """Lists of equal length, one entry for each token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    """The most likely tokens and the chosen one."""
    text_offset: list[int]
    """Characters of the choice's text before the token."""


class TextChoice(Outgoing):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: str | None


class TextCompletion(Outgoing):
    """A whole answer, or a chunk of one."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: CompletionUsage | None = None
    """In chunks set, if only to null, where the client asked for usage."""
