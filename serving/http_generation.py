"""What both completion endpoints do between a request and its tokens: check it against the model, sample, generate."""

import random
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import TypeVar

from starlette.requests import Request

from cache.hashing import TokenIds
from serving.backend import Backend
from serving.http_errors import (
    PromptKind,
    answer_too_long,
    min_tokens_too_large,
    model_not_found,
    model_not_ready,
    prompt_too_long,
    unknown_token_id,
    unsupported_parameter,
)
from serving.http_metrics import Metrics
from serving.http_requests import read_request
from serving.http_settings import HttpSettings
from serving.http_traffic import began_at
from serving.openai_schema import GenerationRequest
from serving.protocol import SamplingParams, TokenBatch

G = TypeVar("G", bound=GenerationRequest)


@dataclass(frozen=True)
class Generation:
    """The common part of the endpoints."""

    backend: Backend
    settings: HttpSettings
    metrics: Metrics
    clock: Callable[[], float]
    rng: random.Random

    async def read(self, request: Request, schema: type[G]) -> G:
        """The request, if this model can answer it. Raises ApiError."""
        asked = await read_request(request, schema, self.settings.max_body_bytes)
        check_model(asked.model, self.backend)
        param = asked.unsupported_parameter()
        if param is not None:
            raise unsupported_parameter(param)
        if not self.backend.is_ready():
            raise model_not_ready(self.settings.retry_after_s)
        for param, token_ids in asked.named_token_ids().items():
            self.check_token_ids(param, token_ids)
        return asked

    def tenant_of(self, request: Request) -> str:
        """Whose request it is."""
        return self.settings.tenant(request.headers.get("authorization", ""))

    def recalled(self, asked: GenerationRequest, token_ids: TokenIds, tenant: str) -> TokenIds:
        """The prompt in the ids that its answers were made of: see `Backend.recall`. Called from worker threads.

        Those may be more ids than the tokenizer's own. A prompt that would be too long for it stays as it is.
        """
        recalled = self.backend.recall(token_ids, tenant)
        max_tokens = 1 if asked.requested_max_tokens is None else asked.requested_max_tokens[1]
        return recalled if len(recalled) + max_tokens <= self.backend.max_model_len else token_ids

    def check_token_ids(self, param: str, token_ids: list[int]) -> None:
        """Raise ApiError unless the model knows all of `token_ids`, which the client named in `param`."""
        size = self.backend.vocab_size
        for token_id in token_ids:
            if not 0 <= token_id < size:
                raise unknown_token_id(param, token_id, size)

    def sampling(
        self,
        asked: GenerationRequest,
        num_tokens: int,
        prompt: PromptKind,
        *,
        param: str | None = None,
        default_max_tokens: int | None = None,
    ) -> SamplingParams:
        """How to answer a prompt of `num_tokens`. Without bounds the answer may fill the rest of the context.

        `param` names the prompt in errors, if `prompt` does not. Raises ApiError if the context is too short.
        """
        max_model_len = self.backend.max_model_len
        left = max_model_len - num_tokens
        if left < 1:
            raise prompt_too_long(prompt, num_tokens, max_model_len, param or prompt)
        max_tokens = left if default_max_tokens is None else min(left, default_max_tokens)
        if asked.requested_max_tokens is not None:
            name, max_tokens = asked.requested_max_tokens
            if max_tokens > left:
                raise answer_too_long(prompt, name, max_tokens, num_tokens, max_model_len)
        if asked.min_tokens is not None and asked.min_tokens > max_tokens:
            raise min_tokens_too_large(asked.min_tokens, max_tokens)
        return asked.sampling(max_tokens, self.rng.getrandbits(63))

    def batches(
        self,
        request: Request,
        asked: GenerationRequest,
        token_ids: TokenIds,
        sampling: SamplingParams,
        session_id: str | None,
        generation_id: str,
    ) -> AsyncGenerator[TokenBatch, None]:
        """The answers to one prompt, measured as they pass. `generation_id` is the prompt's own."""
        generated = self.backend.generate(
            token_ids,
            sampling,
            session_id,
            asked.use_cache,
            generation_id,
            asked.num_choices,
            self.tenant_of(request),
        )
        return self.metrics.watched(generated, request.scope["path"], began_at(request.scope))


def check_model(model: str, backend: Backend) -> None:
    """Raise ApiError if `model` is another than is served."""
    if model != backend.model_name:
        raise model_not_found(model, backend.model_name)
