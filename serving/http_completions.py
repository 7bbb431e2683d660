"""`POST /v1/completions`: up to `MAX_PROMPTS` prompts, each an answer of its own that is routed by itself."""

import asyncio
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response

from cache.hashing import TokenIds, as_token_ids
from serving.choices import merged
from serving.http_edge import EventStream, request_id_of, run_while_connected
from serving.http_errors import ApiError, empty_prompt
from serving.http_generation import Generation
from serving.http_requests import session_id_of
from serving.text_completion import TextAnswer
from serving.text_schema import DEFAULT_MAX_TOKENS, CompletionRequest, TextPrompt

COMPLETIONS_PATH = "/v1/completions"


@dataclass(frozen=True)
class CompletionsEndpoint:
    """See the module's docstring."""

    generation: Generation

    async def answer(self, request: Request) -> Response:
        """The whole road of one request. Raises ApiError for whatever the client did wrong."""
        asked = await self._read(request)
        session_id, request_id = session_id_of(request), request_id_of(request)
        token_ids = await self._tokenize(asked, self.generation.tenant_of(request))
        samplings = [
            self.generation.sampling(
                asked, len(ids), "prompt", param=asked.name_of_prompt(i), default_max_tokens=DEFAULT_MAX_TOKENS
            )
            for i, ids in enumerate(token_ids)
        ]
        answer = await self._text_answer(asked, request_id)
        streams = [
            self.generation.batches(request, asked, ids, sampling, session_id, f"{request_id}-{i}")
            for i, (ids, sampling) in enumerate(zip(token_ids, samplings, strict=True))
        ]
        batches = merged(streams, asked.num_choices)
        if asked.stream:
            return EventStream(answer.events(batches, asked.include_usage))
        whole = await run_while_connected(answer.collect(batches), request.receive)
        return Response(whole.as_json(), media_type="application/json")

    async def _read(self, request: Request) -> CompletionRequest:
        asked = await self.generation.read(request, CompletionRequest)
        if asked.echo and asked.logprobs is not None:
            message = "'echo' with 'logprobs' is not supported: the prompt's own log-probabilities are not computed."
            raise ApiError(400, message, param="echo", code="unsupported_parameter")
        return asked

    async def _tokenize(self, asked: CompletionRequest, tenant: str) -> list[TokenIds]:
        # In a thread: a long text takes long enough to hold up every other stream.
        return await asyncio.to_thread(
            lambda: [self._token_ids(asked, prompt, i, tenant) for i, prompt in enumerate(asked.prompt)]
        )

    def _token_ids(self, asked: CompletionRequest, prompt: TextPrompt, number: int, tenant: str) -> TokenIds:
        param = asked.name_of_prompt(number)
        if not isinstance(prompt, str):
            self.generation.check_token_ids(param, prompt)
            return as_token_ids(prompt)
        token_ids = self.generation.backend.tokenize(prompt)
        if not len(token_ids):
            raise empty_prompt(param)
        return self.generation.recalled(asked, token_ids, tenant)

    async def _text_answer(self, asked: CompletionRequest, request_id: str) -> TextAnswer:
        backend = self.generation.backend
        return TextAnswer(
            f"cmpl-{request_id}",
            int(self.generation.clock()),
            backend.model_name,
            backend.token_piece,
            num_choices=asked.num_choices,
            num_prompts=len(asked.prompt),
            with_logprobs=asked.num_logprobs is not None,
            echoes=await asyncio.to_thread(self._echoes, asked) if asked.echo else (),
        )

    def _echoes(self, asked: CompletionRequest) -> list[str]:
        decode = self.generation.backend.decode_tokens
        return [prompt if isinstance(prompt, str) else decode(prompt) for prompt in asked.prompt]
