"""`POST /v1/chat/completions`."""

import asyncio
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response

from cache.hashing import TokenIds
from serving.chat import ChatTemplateError
from serving.chat_schema import ChatCompletionRequest
from serving.completion import Completion
from serving.http_edge import EventStream, request_id_of, run_while_connected
from serving.http_errors import ApiError
from serving.http_generation import Generation
from serving.http_requests import session_id_of

CHAT_PATH = "/v1/chat/completions"


@dataclass(frozen=True)
class ChatEndpoint:
    """See the module's docstring."""

    generation: Generation

    async def answer(self, request: Request) -> Response:
        """The whole road of one request. Raises ApiError for whatever the client did wrong."""
        asked = await self.generation.read(request, ChatCompletionRequest)
        session_id = session_id_of(request)
        token_ids = await self._render(asked)
        sampling = self.generation.sampling(asked, len(token_ids), "messages")
        request_id = request_id_of(request)
        batches = self.generation.batches(request, asked, token_ids, sampling, session_id, request_id)
        completion = self._completion(asked, request_id)
        if asked.stream:
            return EventStream(completion.events(batches, asked.include_usage))
        whole = await run_while_connected(completion.collect(batches), request.receive)
        return Response(whole.as_json(), media_type="application/json")

    async def _render(self, asked: ChatCompletionRequest) -> TokenIds:
        # In a thread: a long history takes long enough to tokenise to hold up every other stream.
        try:
            return await asyncio.to_thread(self.generation.backend.render, asked.chat_messages())
        except ChatTemplateError as error:
            raise ApiError(400, str(error), param="messages", code="chat_template_error") from error

    def _completion(self, asked: ChatCompletionRequest, request_id: str) -> Completion:
        backend = self.generation.backend
        return Completion(
            f"chatcmpl-{request_id}",
            int(self.generation.clock()),
            backend.model_name,
            backend.token_piece,
            num_choices=asked.num_choices,
            with_logprobs=asked.num_logprobs is not None,
        )
