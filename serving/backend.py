"""What answers behind the HTTP edge, as the edge sees it."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Protocol

from cache.hashing import BlockHash, TokenIds
from serving.chat import ChatMessage
from serving.protocol import SamplingParams, TokenBatch
from serving.tool_calls import Tool
from serving.vocabulary import TokenPiece


class Backend(Protocol):
    """One model. Any method may raise ApiError to tell the client something specific."""

    @property
    def model_name(self) -> str: ...

    @property
    def max_model_len(self) -> int:
        """Tokens that prompt and answer share."""

    @property
    def vocab_size(self) -> int:
        """Token ids that a client names must be smaller."""

    @property
    def created(self) -> int:
        """When the model came up, in seconds since the epoch."""

    def is_ready(self) -> bool:
        """True once the model answers."""

    def render(self, messages: Sequence[ChatMessage], tools: Sequence[Tool] = ()) -> TokenIds:
        """The prompt's token ids, `(num_tokens,)`. Called from worker threads. Raises ChatTemplateError."""

    def tokenize(self, text: str) -> TokenIds:
        """The token ids of a plain prompt, `(num_tokens,)`. Called from worker threads."""

    def recall(self, token_ids: TokenIds, tenant: str) -> TokenIds:
        """The prompt `token_ids` with the ids that its answers were made of, as far as they are known: the same text.

        Called from worker threads. Only what `generate` has answered to the same `tenant` is known.
        """

    def decode_tokens(self, token_ids: Sequence[int]) -> str:
        """The text of a prompt of token ids, special tokens shown. Called from worker threads."""

    def token_piece(self, token_id: int) -> TokenPiece:
        """One token by itself, to name it beside its log-probability."""

    def generate(
        self,
        token_ids: TokenIds,
        sampling: SamplingParams,
        session_id: str | None,
        use_cache: bool,
        request_id: str,
        num_choices: int,
        tenant: str,
    ) -> AsyncGenerator[TokenBatch, None]:
        """The answers to one prompt, in batches; `choice` counts from 0 up to `num_choices`, exclusive.

        Each choice ends with a batch that has its `finish_reason` and its own `usage`, in which the prompt's part
        is that of the choice. The generator is closed, or cancelled at its await, as soon as the client hangs up.
        """

    async def purge(self, tenant: str, session_id: str | None, root_hash: BlockHash | None) -> Mapping[str, Any]:
        """Delete the tenant's KV, or only that of one session or one fingerprint; the receipt as JSON values.

        Raises ApiError unless everybody who might hold some of it was reached.
        """

    async def warehouse_stats(self) -> Mapping[str, Any]:
        """What the warehouse holds, as JSON values."""
