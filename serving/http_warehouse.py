"""`POST /warehouse/purge`: a client has KV of its own deleted, and gets a receipt.

The body says what, by exactly one key:

    {"session": "my-agent"}    what was stored under this `x-session-id`, but for history that other sessions share
    {"tenant": true}           all that was stored with the caller's API key
    {"fingerprint": "5f1c..."} what was stored by one model with its settings, as `tokenloft warehouse stats` names it

Whatever it says, a caller reaches only what was stored with its own key. A server without keys has one tenant.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints, model_validator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cache.hashing import HASH_BYTES, BlockHash
from serving.backend import Backend
from serving.http_errors import model_not_ready
from serving.http_requests import SESSION_ID, read_request
from serving.http_settings import HttpSettings

PURGE_PATH = "/warehouse/purge"


def _only_true(value: bool) -> bool:
    if not value:
        raise ValueError("should be true, or not there")
    return value


class PurgeRequest(BaseModel):
    """What to delete. Strict: a purge that misunderstands deletes too much or too little."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    session: Annotated[str, StringConstraints(pattern=rf"^{SESSION_ID}$")] | None = None
    tenant: Annotated[bool, AfterValidator(_only_true)] | None = None
    fingerprint: Annotated[str, StringConstraints(pattern=rf"^[0-9a-f]{{{2 * HASH_BYTES}}}$")] | None = None

    @model_validator(mode="before")
    @classmethod
    def _names_one_thing(cls, body: Any) -> Any:
        if isinstance(body, dict) and len(body) != 1:
            raise ValueError('name one of "session", "tenant" and "fingerprint"')
        return body

    @model_validator(mode="after")
    def _names_something(self) -> Self:
        if self.session is None and self.tenant is None and self.fingerprint is None:
            raise ValueError("null names nothing")
        return self


@dataclass(frozen=True)
class PurgeEndpoint:
    """See the module's docstring."""

    backend: Backend
    settings: HttpSettings

    async def answer(self, request: Request) -> Response:
        """The receipt: see `cache.messages.PurgeReceipt`. Raises ApiError."""
        asked = await read_request(request, PurgeRequest, self.settings.max_body_bytes)
        if not self.backend.is_ready():
            raise model_not_ready(self.settings.retry_after_s)
        tenant = self.settings.tenant(request.headers.get("authorization", ""))
        root_hash = None if asked.fingerprint is None else BlockHash(bytes.fromhex(asked.fingerprint))
        return JSONResponse(dict(await self.backend.purge(tenant, asked.session, root_hash)))
