"""Every error as `{"error": {message, type, param, code}}`: ours, the framework's own, and those nobody expected.

Owns the translation of framework errors into the tree of `server.errors`. Values that a client sent are not repeated
in messages; field names are, shortened.
"""

import json
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from server.api.context import context_of
from server.errors import (
    InvalidRequestError,
    MethodNotAllowedError,
    NotFoundError,
    PayloadTooLargeError,
    PromptmuxError,
)

_MAX_PARAM_CHARS = 200
# Where FastAPI looked for the value; clients know the field by its own name.
_SOURCES = frozenset({"body", "query", "path", "header", "cookie"})

_WORDS = {
    "int_type": "must be an integer",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be a string",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "string_unicode": "must be valid Unicode text",
    "finite_number": "must be a finite number",
    "too_short": "has fewer than {min_length} items",
    "too_long": "has more than {max_length} items",
    "string_too_short": "has fewer than {min_length} characters",
    "string_too_long": "has more than {max_length} characters",
    "string_pattern_mismatch": "must match {pattern}",
    "int_parsing": "must be an integer",
}


def error_response(error: PromptmuxError, headers: dict[str, str] | None = None) -> Response:
    """The whole response of an error."""
    # ASCII only: a message may name a field that holds half a surrogate pair.
    body = json.dumps(error.to_body(), separators=(",", ":")).encode("ascii")
    return Response(body, error.status, error.headers() | (headers or {}), media_type="application/json")


def from_validation(errors: Sequence[Any]) -> InvalidRequestError:
    """The first of Pydantic's errors as ours; `param` is the dotted path of the field."""
    first = errors[0]
    loc = [str(part) for part in first["loc"]]
    if loc and loc[0] in _SOURCES:
        loc = loc[1:]
    path = ".".join(loc)[:_MAX_PARAM_CHARS]
    kind = first["type"]
    if kind == "extra_forbidden":
        return InvalidRequestError(f"Unknown field {path!r}.", param=path)
    if kind == "missing":
        what = f"Field {path!r} is required." if path else "A JSON body is required."
        return InvalidRequestError(what, param=path or None)
    if kind == "value_error":
        reason = str(first.get("ctx", {}).get("error", first["msg"]))
    else:
        words = _WORDS.get(kind, "").format_map(first.get("ctx", {}))
        reason = words or first["msg"].removeprefix("Input should be ").strip()
        if kind not in _WORDS and first["msg"].startswith("Input should be "):
            reason = f"must be {reason}"
    return InvalidRequestError(f"{path}: {reason}." if path else f"The body {reason}.", param=path or None)


def from_http_exception(error: HTTPException, request: Request) -> PromptmuxError:
    """The framework's own refusals: no such route, no such method, a form that cannot be read."""
    if error.status_code == 404:
        return NotFoundError(f"There is nothing at {request.method} {request.url.path[:_MAX_PARAM_CHARS]}.")
    if error.status_code == 405:
        return MethodNotAllowedError(f"{request.method} is not allowed here.")
    if error.status_code == 413:
        return PayloadTooLargeError("The body is too large.")
    if 400 <= error.status_code < 500:
        return InvalidRequestError(str(error.detail))
    return PromptmuxError("An internal error occurred.")


def install_error_handlers(app: FastAPI) -> None:
    """What is raised in routes and dependencies; the middleware catches the rest."""

    async def on_promptmux_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, PromptmuxError)
        return _answer(request, error)

    async def on_validation_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _answer(request, from_validation(error.errors()))

    async def on_http_exception(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        headers = dict(error.headers) if error.headers and error.status_code == 405 else None
        return _answer(request, from_http_exception(error, request), headers)

    app.add_exception_handler(PromptmuxError, on_promptmux_error)
    app.add_exception_handler(RequestValidationError, on_validation_error)
    app.add_exception_handler(HTTPException, on_http_exception)


def _answer(request: Request, error: PromptmuxError, headers: dict[str, str] | None = None) -> Response:
    context_of(request).error_code = error.code
    return error_response(error, headers)
