"""`POST /v1/chat/completions`."""

import asyncio
from dataclasses import dataclass, replace

from starlette.requests import Request
from starlette.responses import Response

from cache.hashing import TokenIds
from serving.answer_grammar import answer_grammar
from serving.chat import ChatTemplateError
from serving.chat_schema import ChatCompletionRequest
from serving.completion import Completion
from serving.http_edge import EventStream, request_id_of, run_while_connected
from serving.http_errors import ApiError
from serving.http_generation import Generation
from serving.http_requests import session_id_of
from serving.tool_calls import ToolReader

CHAT_PATH = "/v1/chat/completions"


@dataclass(frozen=True)
class ChatEndpoint:
    """See the module's docstring."""

    generation: Generation

    async def answer(self, request: Request) -> Response:
        """The whole road of one request. Raises ApiError for whatever the client did wrong."""
        asked = await self.generation.read(request, ChatCompletionRequest)
        session_id = session_id_of(request)
        # In threads, both: a long history takes long to tokenise, and a huge schema to check.
        grammar = await asyncio.to_thread(answer_grammar, asked)
        token_ids = await self._render(asked, self.generation.tenant_of(request))
        sampling = replace(self.generation.sampling(asked, len(token_ids), "messages"), grammar=grammar)
        request_id = request_id_of(request)
        batches = self.generation.batches(request, asked, token_ids, sampling, session_id, request_id)
        completion = self._completion(asked, request_id, is_free=grammar is None)
        if asked.stream:
            return EventStream(completion.events(batches, asked.include_usage))
        whole = await run_while_connected(completion.collect(batches), request.receive)
        return Response(whole.as_json(), media_type="application/json")

    async def _render(self, asked: ChatCompletionRequest, tenant: str) -> TokenIds:
        try:
            token_ids = await asyncio.to_thread(
                self.generation.backend.render, asked.chat_messages(), asked.offered_tools()
            )
        except ChatTemplateError as error:
            raise ApiError(400, str(error), param="messages", code="chat_template_error") from error
        return await asyncio.to_thread(self.generation.recalled, asked, token_ids, tenant)

    def _completion(self, asked: ChatCompletionRequest, request_id: str, *, is_free: bool) -> Completion:
        backend = self.generation.backend
        names = frozenset(tool.name for tool in asked.callable_tools())

        def new_reader(choice: int) -> ToolReader:
            # JSON that was asked for as such is no call, however much it looks like one.
            return ToolReader(names, f"call_{request_id}_{choice}_", accepts_bare=is_free)

        return Completion(
            f"chatcmpl-{request_id}",
            int(self.generation.clock()),
            backend.model_name,
            backend.token_piece,
            num_choices=asked.num_choices,
            with_logprobs=asked.num_logprobs is not None,
            new_reader=new_reader if names else None,
        )
