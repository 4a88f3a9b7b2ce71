"""JSON bodies read strictly, before the framework sees them.

Python's reader takes NaN, Infinity, numbers that overflow to infinity, and a key given twice. None of them is one
value that client and server agree on, so each is refused, naming the field where one can be named. What a body may be
made of at all is bounded first (`json_bounds`).
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from fastapi.routing import APIRoute
from starlette.responses import Response

from server.api.json_bounds import check_bounds
from server.errors import InvalidRequestError

# Longer bodies are read in a thread: one of many small objects takes a tenth of a second a megabyte.
MAX_INLINE_BYTES = 128 * 1024
# More than any field is for: each unknown key would become an error of its own.
MAX_KEYS = 1024


def parse_json(body: bytes) -> Any:
    """The value of `body`. Raises InvalidRequestError."""
    check_bounds(body)
    has_non_finite = False

    def to_float(text: str) -> float:
        nonlocal has_non_finite
        value = float(text)
        has_non_finite = has_non_finite or not math.isfinite(value)
        return value

    # The reader of a long list of numbers would let no other thread run, and the event loop's is one of them.
    parse_int = int if len(body) <= MAX_INLINE_BYTES else _to_int
    try:
        value = json.loads(
            body.decode("utf-8"),
            parse_int=parse_int,
            parse_float=to_float,
            parse_constant=to_float,
            object_pairs_hook=_to_object,
        )
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"The body is not UTF-8: byte {error.start} cannot be decoded.") from None
    except json.JSONDecodeError as error:
        raise InvalidRequestError(f"The body is not JSON: {error.msg} at character {error.pos}.") from None
    except RecursionError:
        raise InvalidRequestError("The body is nested too deeply.") from None
    except ValueError:
        # Python refuses to convert integers of thousands of digits.
        raise InvalidRequestError("The body holds a number that is too long.") from None
    if has_non_finite:
        path = _find_non_finite(value, ())
        raise InvalidRequestError("Numbers must be finite.", param=".".join(path)[:200] if path else None)
    return value


def _to_int(text: str) -> int:
    return int(text)


def _to_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_KEYS:
        raise InvalidRequestError(f"An object has more than {MAX_KEYS} fields.")
    value = dict(pairs)
    if len(value) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise InvalidRequestError("A key is given twice in one object.", param=twice[:200])
    return value


def _find_non_finite(value: Any, path: tuple[str, ...]) -> tuple[str, ...] | None:
    if isinstance(value, float) and not math.isfinite(value):
        return path
    children: Any = ()
    if isinstance(value, dict):
        children = value.items()
    elif isinstance(value, list):
        children = enumerate(value)
    for key, child in children:
        found = _find_non_finite(child, (*path, str(key)))
        if found is not None:
            return found
    return None


class _ParsedRequest(Request):
    """A request whose body is read already."""

    parsed: Any = None

    async def json(self) -> Any:
        return self.parsed


class StrictJSONRoute(APIRoute):
    """A route whose JSON body is read by `parse_json`.

    The body is read before FastAPI's own handler, which would turn every error on the way into a plain 400.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        has_json_body = self.body_field is not None

        async def handle_strictly(request: Request) -> Response:
            if not has_json_body:
                return await handle(request)
            # Also keeps a web page from posting here unasked: browsers send other types without a preflight.
            if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                raise InvalidRequestError("Content-Type must be application/json.", code="unsupported_content_type")
            parsed = _ParsedRequest(request.scope, request.receive)
            body = await parsed.body()
            is_short = len(body) <= MAX_INLINE_BYTES
            parsed.parsed = parse_json(body) if is_short else await run_in_threadpool(parse_json, body)
            return await handle(parsed)

        return handle_strictly
