"""What OpenAI's two completion endpoints have in common: sampling parameters, usage, log-probabilities, models.

Requests are validated strictly (no "5" for 5). Unknown fields are ignored, as OpenAI's clients expect, but a
known field whose effect would silently be missing is named by `unsupported_parameter`. Answers hold every key
that OpenAI's schema requires, null where we have nothing; what was not set is not sent.
"""

import re
from dataclasses import asdict
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from serving.protocol import SamplingParams, Usage

INT32_MAX = 2**31 - 1
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
MAX_CHOICES = 16
MAX_TOP_LOGPROBS = 20
MAX_STOP_STRINGS, MAX_STOP_CHARS = 4, 1024
MAX_NAMED_TOKENS = 1024
"""Entries of `logit_bias`, and of `stop_token_ids`."""

StopString = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARS)]
TokenId = Annotated[int, Field(ge=0, le=INT32_MAX)]

_TOKEN_ID = re.compile(r"0|[1-9]\d{0,9}", re.ASCII)


class Incoming(BaseModel):
    """A part of a request."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class StreamOptions(Incoming):
    include_usage: bool | None = None


class TokenloftOptions(Incoming):
    """Our extension of the request. Its keys are strict: a misspelt one is refused."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    cache: bool = True
    """False: nothing stored is looked up for this request and nothing of it is kept."""


class GenerationRequest(Incoming):
    """What a request says about the answer, whatever its prompt looks like. Null is the same as absent, throughout."""

    neutral: ClassVar[dict[str, tuple[object, ...]]] = {}
    """Fields that are understood only where they ask for nothing, with the values, null aside, that do."""

    model: str
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(default=None, ge=INT64_MIN, le=INT64_MAX)
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)] | None = None
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = Field(default=None, max_length=MAX_NAMED_TOKENS)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    tokenloft: TokenloftOptions | None = None
    # Not OpenAI's own, but common among servers of open models.
    top_k: int | None = Field(default=None, ge=-1, le=INT32_MAX)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100)
    min_tokens: int | None = Field(default=None, ge=0)
    ignore_eos: bool | None = None
    stop_token_ids: list[TokenId] | None = Field(default=None, max_length=MAX_NAMED_TOKENS)

    @field_validator("logit_bias")
    @classmethod
    def _bias_is_by_token_id(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        for key, value in (bias or {}).items():
            if not _TOKEN_ID.fullmatch(key):
                raise PydanticCustomError("token_id", "its keys should be token ids such as '42'")
            if not -100 <= value <= 100:
                raise PydanticCustomError("bias", "its values should be from -100 to 100")
        return bias

    @field_validator("stream_options")
    @classmethod
    def _stream_options_need_a_stream(cls, options: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if options is not None and not info.data.get("stream"):
            raise PydanticCustomError("stream_options", "only allowed when 'stream' is true")
        return options

    def unsupported_parameter(self) -> str | None:
        """Name of the first parameter that asks for something this server would not do."""
        for name, neutral in self.neutral.items():
            value = getattr(self, name)
            if value is not None and value not in neutral:
                return name
        return None

    @property
    def requested_max_tokens(self) -> tuple[str, int] | None:
        """Name and value of the bound that the client set, None if it left that to us."""
        return None if self.max_tokens is None else ("max_tokens", self.max_tokens)

    @property
    def num_logprobs(self) -> int | None:
        """Most likely tokens to be told beside each token; None: no log-probabilities at all."""
        raise NotImplementedError

    @property
    def num_choices(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def use_cache(self) -> bool:
        return self.tokenloft is None or self.tokenloft.cache

    def named_token_ids(self) -> dict[str, list[int]]:
        """Token ids that the parameters name, by parameter."""
        return {
            "logit_bias": [int(key) for key in self.logit_bias or ()],
            "stop_token_ids": self.stop_token_ids or [],
        }

    def sampling(self, max_tokens: int, default_seed: int) -> SamplingParams:
        """Sampling with OpenAI's defaults filled in."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=_or(self.temperature, 1.0),
            top_p=_or(self.top_p, 1.0),
            seed=default_seed if self.seed is None else self.seed,
            stop=tuple(stop),
            top_k=max(0, self.top_k or 0),  # -1 is another way to say all
            min_p=_or(self.min_p, 0.0),
            presence_penalty=_or(self.presence_penalty, 0.0),
            frequency_penalty=_or(self.frequency_penalty, 0.0),
            repetition_penalty=_or(self.repetition_penalty, 1.0),
            logit_bias=tuple((int(key), float(value)) for key, value in (self.logit_bias or {}).items()),
            min_tokens=self.min_tokens or 0,
            ignore_eos=bool(self.ignore_eos),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            num_logprobs=self.num_logprobs,
        )


class OtherServersExtras(Incoming):
    """Parameters of other servers that this one does not have; see `OTHER_SERVERS_NEUTRAL`."""

    prompt_logprobs: Any = None
    use_beam_search: Any = None
    length_penalty: Any = None
    bad_words: Any = None
    allowed_token_ids: Any = None
    include_stop_str_in_output: Any = None
    skip_special_tokens: Any = None
    truncate_prompt_tokens: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None


OTHER_SERVERS_NEUTRAL: dict[str, tuple[object, ...]] = {
    "prompt_logprobs": (),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
}


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


class UsagePlan(Outgoing):
    """What the engine meant to do about the stored part of the prompt."""

    kind: Literal["load", "compute", "both"]
    load_tokens: int
    compute_tokens: int
    estimated_s: float


class TokenloftUsage(Outgoing):
    """Our extension of the usage."""

    cached: CachedByTier
    computed: ComputedByRole
    load_s: float
    ttft_s: float
    saved_s: float
    """Estimate: computing what was reused, less loading it."""
    route: str
    """Why the router chose this replica."""
    plan: UsagePlan | None
    """None if nothing was stored but what the pool had, or if there are several prompts."""


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
                saved_s=usage.saved_s,
                route=usage.reason,
                plan=None if usage.plan is None else UsagePlan(**asdict(usage.plan)),
            ),
        )


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


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
