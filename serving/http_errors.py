"""Everything that can go wrong at the HTTP edge, in OpenAI's error shape.

    {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}

Foreign errors (pydantic, FastAPI, Starlette) are translated here and nowhere else. `param` names the field as
a client would write it: `messages[0].content`. A body never holds a traceback or the text of an internal
error, and it is ASCII, so nothing that a client sent can make it unencodable.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

INVALID_REQUEST = "invalid_request_error"
SERVER_ERROR = "server_error"
RATE_LIMIT = "rate_limit_error"

BUSY_RETRY_AFTER_S = 1
"""What a client is told to wait when there is no room for its request."""

PromptKind = Literal["messages", "prompt"]
"""The field that an endpoint's prompt comes in."""

_MAX_QUOTED_CHARS = 120
_PROMPT_IS = {"messages": "The messages are", "prompt": "The prompt is"}
_PROMPT_AFTER = {"messages": "messages", "prompt": "a prompt"}
_HTTP_CODES = {404: "unknown_url", 405: "method_not_allowed"}


class ApiError(Exception):
    """What a client should hear: a status, a sentence, and the field and code where there are any.

    A backend may raise it; whatever else a backend raises is an internal error to the client.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """The error as JSON in OpenAI's shape, on one line."""
        error = {"message": self.message, "type": self._type(), "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode("ascii")

    def _type(self) -> str:
        if self.status == 429:
            return RATE_LIMIT
        return SERVER_ERROR if self.status >= 500 else INVALID_REQUEST

    def response(self) -> Response:
        return Response(self.body(), self.status, self.headers, media_type="application/json")


def malformed_json(reason: str) -> ApiError:
    return ApiError(400, f"The body is not valid JSON: {reason}.", code="invalid_json")


def body_too_large(max_body_bytes: int) -> ApiError:
    message = f"The body is larger than the {max_body_bytes} bytes that this server accepts."
    return ApiError(413, message, code="request_too_large", headers={"connection": "close"})


def unsupported_content_type(content_type: str) -> ApiError:
    sent = f"'{shorten(content_type)}'" if content_type else "none"
    return ApiError(415, f"Send 'Content-Type: application/json'; got {sent}.", code="unsupported_content_type")


def invalid_api_key() -> ApiError:
    message = "Missing or unknown API key. Send it as 'Authorization: Bearer KEY'."
    return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


def model_not_found(model: str, served: str) -> ApiError:
    message = f"The model '{shorten(model)}' does not exist; this server has '{served}'."
    return ApiError(404, message, param="model", code="model_not_found")


def model_not_ready(retry_after_s: int) -> ApiError:
    message = f"The model is not ready yet. Try again in {retry_after_s} s."
    return ApiError(503, message, code="model_not_ready", headers={"retry-after": str(retry_after_s)})


def unsupported_parameter(param: str) -> ApiError:
    message = f"'{param}' is not supported by this server with this value; leave it out."
    return ApiError(400, message, param=param, code="unsupported_parameter")


def too_many_requests(max_requests: int) -> ApiError:
    message = f"This server answers at most {max_requests} requests at once. Try again in {BUSY_RETRY_AFTER_S} s."
    return overloaded(message)


def overloaded(message: str) -> ApiError:
    """The request was in order, but there is no room for it now."""
    return ApiError(429, message, code="overloaded", headers={"retry-after": str(BUSY_RETRY_AFTER_S)})


def prompt_too_long(prompt: PromptKind, num_tokens: int, max_model_len: int, param: str) -> ApiError:
    message = (
        f"{_PROMPT_IS[prompt]} {num_tokens} tokens long, but the model's context holds {max_model_len} tokens "
        "and at least one of them must be left for the answer."
    )
    return ApiError(400, message, param=param, code="context_length_exceeded")


def answer_too_long(prompt: PromptKind, param: str, max_tokens: int, num_tokens: int, max_model_len: int) -> ApiError:
    message = (
        f"'{param}' asks for {max_tokens} tokens after {_PROMPT_AFTER[prompt]} of {num_tokens} tokens, but the model's "
        f"context holds {max_model_len} tokens: at most {max_model_len - num_tokens} are left."
    )
    return ApiError(400, message, param=param, code="context_length_exceeded")


def min_tokens_too_large(min_tokens: int, max_tokens: int) -> ApiError:
    message = f"'min_tokens' asks for at least {min_tokens} tokens, but the answer may have at most {max_tokens}."
    return ApiError(400, message, param="min_tokens", code="invalid_value")


def unknown_token_id(param: str, token_id: int, vocab_size: int) -> ApiError:
    message = f"'{param}' names the token id {shorten(str(token_id))}; the model's ids are 0 to {vocab_size - 1}."
    return ApiError(400, message, param=param, code="invalid_value")


def empty_prompt(param: str) -> ApiError:
    return ApiError(400, f"'{param}' has no tokens.", param=param, code="invalid_value")


def purge_incomplete(who: str) -> ApiError:
    message = f"Not everything was purged: {who} did not answer. Send the request again."
    return ApiError(503, message, code="purge_incomplete", headers={"retry-after": str(BUSY_RETRY_AFTER_S)})


def internal_error(request_id: str) -> ApiError:
    message = f"The server failed to answer this request. Its log has the cause under request id {request_id}."
    return ApiError(500, message, code="internal_error")


def from_validation_errors(errors: Sequence[Mapping[str, Any]], body: object) -> ApiError:
    """Translate pydantic's errors about `body` into one that names the field.

    Of several errors the deepest counts: it comes from the branch of a union that fits best.
    """
    located = [(_walk(error["loc"], body), error) for error in errors]
    deepest = max((steps for steps, _ in located), key=len)
    here = [error for steps, error in located if steps == deepest]
    reasons = "; or ".join(dict.fromkeys(str(error["msg"]) for error in here))
    param = _spell(deepest) or None
    return ApiError(
        400,
        f"Invalid '{shorten(param)}': {shorten(reasons)}." if param else f"Invalid body: {shorten(reasons)}.",
        param=param,
        code=_code(here[0]["type"]),
    )


def from_pydantic(error: ValidationError, body: object) -> ApiError:
    return from_validation_errors(error.errors(include_url=False, include_context=False), body)


def from_http_exception(error: HTTPException, method: str, path: str) -> ApiError:
    """Unknown routes and wrong methods, and whatever else the framework refuses."""
    reasons = {404: f"Unknown URL: {method} {shorten(path)}.", 405: f"{method} is not allowed for {shorten(path)}."}
    message = reasons.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, message, code=_HTTP_CODES.get(error.status_code), headers=error.headers)


async def answer_http_exception(request: Request, error: Exception) -> Response:
    """Exception handler for the framework's own `HTTPException`."""
    assert isinstance(error, HTTPException)
    return from_http_exception(error, request.method, request.url.path).response()


async def answer_framework_validation(request: Request, error: Exception) -> Response:
    """Exception handler for parameters that FastAPI itself validated."""
    assert isinstance(error, RequestValidationError)
    return from_validation_errors(error.errors(), error.body).response()


def shorten(text: str) -> str:
    """`text` fit for a sentence in a message: a client's own words may be megabytes long."""
    return text if len(text) <= _MAX_QUOTED_CHARS else text[:_MAX_QUOTED_CHARS] + "..."


def _walk(loc: Sequence[int | str], body: object) -> tuple[int | str, ...]:
    """`loc` without the names that pydantic adds for the branches of a union.

    Only steps that exist in the body are kept, and a key that is missing from an object.
    """
    steps: list[int | str] = []
    here: Any = body
    for step in loc:
        if isinstance(here, dict) and isinstance(step, str):
            steps.append(step)
            here = here.get(step)
        elif isinstance(here, list) and isinstance(step, int):
            steps.append(step)
            here = here[step] if step < len(here) else None
    return tuple(steps)


def _spell(steps: Sequence[int | str]) -> str:
    spelled = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)
    return spelled.removeprefix(".")


def _code(error_type: str) -> str:
    if error_type == "missing":
        return "missing_required_parameter"
    if error_type == "extra_forbidden":
        return "unknown_parameter"
    return "invalid_type" if error_type.endswith("_type") else "invalid_value"
