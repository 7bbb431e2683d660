"""Reading a request: content type, bounded body, JSON, schema, session id. Whatever is wrong is an ApiError.

Bodies are read and parsed here, not by FastAPI, because its own errors have another shape.
"""

import re
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import Request

from serving.http_edge import read_body
from serving.http_errors import ApiError, from_pydantic, malformed_json, unsupported_content_type

M = TypeVar("M", bound=BaseModel)

SESSION_ID = r"[\x21-\x7e]{1,256}"
"""Pattern of a session's id: printable ASCII without spaces."""

_SESSION_ID = re.compile(SESSION_ID, re.ASCII)


async def read_request(request: Request, schema: type[M], max_body_bytes: int) -> M:
    """The body as `schema` says it must be."""
    _check_content_type(request.headers.get("content-type", ""))
    body = await read_body(request, max_body_bytes)
    try:
        parsed = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise malformed_json(str(error)) from error
    try:
        return schema.model_validate(parsed)
    except ValidationError as error:
        raise from_pydantic(error, parsed) from error


def session_id_of(request: Request) -> str | None:
    """The conversation that the client says this belongs to."""
    session_id = request.headers.get("x-session-id", "")
    if session_id and not _SESSION_ID.fullmatch(session_id):
        message = "'x-session-id' must be 1 to 256 printable ASCII characters without spaces."
        raise ApiError(400, message, param="x-session-id", code="invalid_value")
    return session_id or None


def _check_content_type(content_type: str) -> None:
    # Insisting on JSON also keeps web pages out: a browser asks first before it sends JSON to another site.
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise unsupported_content_type(content_type)
