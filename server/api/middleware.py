"""What surrounds every request: its id, its limits of bytes and of time, its access line and its place in the metrics.

Pure ASGI, so that a stream pays nothing a token. `ObserveMiddleware` is outermost and turns whatever is raised further
in into an error body, once, whoever raises it; nothing of an unexpected exception reaches the client.
"""

import asyncio
import re
import time
from collections.abc import Sequence

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.context import REQUEST_ID_HEADER, RequestContext, attach_context, context_of
from server.api.errors import error_response
from server.errors import InvalidRequestError, PayloadTooLargeError, PromptmuxError, RequestTimeoutError
from server.logs import AccessLine, log_access
from server.metrics import Metrics

# Statuses with which a request is refused before it runs.
_REJECTED = frozenset({400, 401, 403, 404, 408, 409, 413, 415, 422, 429, 503, 507})
_UPLOAD_PATH = re.compile(r"/v1/tasks/[^/]+/versions")
_TRAINING_FILE_PATH = re.compile(r"/v1/files")
# What a form has around its file.
_FORM_BYTES = 64 * 1024

# After a refusal the client is still sending. Reading on for a moment lets it see the answer before the connection
# ends; whoever sends more than this is cut off.
_LINGER_BYTES = 16 * 1024 * 1024
_LINGER_S = 1.0

_log = structlog.get_logger("promptmux.api")


class ObserveMiddleware:
    """Request id, errors, access line, metrics."""

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: Sequence[BaseRoute]) -> None:
        self._app = app
        self._metrics = metrics
        self._routes = tuple(routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = attach_context(scope)
        # A HEAD is a GET whose body is not sent: the server underneath sees to that, by its own scope.
        inner = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        status: int | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID_HEADER] = context.request_id
                if status == 405 and (allowed := self._allowed_methods(scope)):
                    headers["allow"] = ", ".join(allowed)
                if context.running is not None:
                    headers.update(context.running.reservation.headers)
            await send(message)

        try:
            await self._app(inner, receive, send_with_id)
        except PromptmuxError as error:
            context.error_code = error.code
            if status is None:
                await error_response(error)(scope, receive, send_with_id)
        except ClientDisconnect:
            # Gone in the middle of its own body; there is nobody to answer.
            self._metrics.client_disconnects_total.inc()
        except Exception:
            _log.exception("unexpected_error", request_id=context.request_id, endpoint=self._endpoint(scope))
            internal = PromptmuxError("An internal error occurred.")
            context.error_code = internal.code
            if status is None:
                await error_response(internal)(scope, receive, send_with_id)
        finally:
            # 499: the client was gone before there was anything to answer.
            self._record(scope, context, status if status is not None else 499)

    def _record(self, scope: Scope, context: RequestContext, status: int) -> None:
        endpoint = self._endpoint(scope)
        self._metrics.requests_total.labels(endpoint=endpoint, status=str(status)).inc()
        if status in _REJECTED and context.error_code is not None:
            self._metrics.requests_rejected_total.labels(reason=context.error_code).inc()
        running = context.running
        meter = running.meter if running is not None else None
        log_access(
            AccessLine(
                request_id=context.request_id,
                method=scope["method"],
                endpoint=endpoint,
                status=status,
                e2e_ms=(time.monotonic() - context.arrived_at_s) * 1000,
                tenant=context.caller.tenant if context.caller is not None else None,
                task=context.task,
                digest=context.digest,
                prompt_tokens=running.generation.num_prompt_tokens if running is not None else None,
                completion_tokens=meter.completion_tokens if meter is not None else None,
                queue_ms=meter.queue_s * 1000 if meter is not None and meter.queue_s is not None else None,
                ttft_ms=meter.ttft_s * 1000 if meter is not None and meter.ttft_s is not None else None,
                finish_reason=meter.finish_reason if meter is not None else None,
                error_code=context.error_code,
            )
        )

    def _allowed_methods(self, scope: Scope) -> list[str]:
        """Of all routes of a path; the framework names those of the first one alone."""
        methods: set[str] = set()
        for route in self._routes:
            if route.matches(scope)[0] is not Match.NONE:
                methods |= getattr(route, "methods", None) or set()
        return sorted(methods | {"HEAD"} if "GET" in methods else methods)

    def _endpoint(self, scope: Scope) -> str:
        """The route's template: paths themselves would make a series a task."""
        route = scope.get("route")
        if route is None:
            # Refused before it was routed: no key, or too large.
            route = next((route for route in self._routes if route.matches(scope)[0] is not Match.NONE), None)
        path = getattr(route, "path", None)
        return path if isinstance(path, str) else "other"


class BodyLimitMiddleware:
    """Counts a body's bytes as they come and answers 413 as soon as there are too many, or at once if it is declared;
    and 408 when it is not whole in time.

    Uploads have limits of their own, that of time in `upload_form`. Nothing of a refused body is kept.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_body_bytes: int,
        max_upload_bytes: int,
        max_training_file_bytes: int,
        body_timeout_s: float,
    ) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._upload_limits = (
            (_UPLOAD_PATH, max_upload_bytes),
            (_TRAINING_FILE_PATH, max_training_file_bytes + _FORM_BYTES),
        )
        self._body_timeout_s = body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        upload_limit = next((limit for path, limit in self._upload_limits if path.fullmatch(scope["path"])), None)
        is_upload = scope["method"] == "POST" and upload_limit is not None
        limit = upload_limit if is_upload and upload_limit is not None else self._max_body_bytes
        too_large = PayloadTooLargeError(f"The body is larger than {limit} bytes.")
        num_bytes = 0
        has_overrun = False
        # Its reading has begun, and there is more to come.
        is_partly_read = False
        is_whole = False
        deadline_s = asyncio.get_running_loop().time() + self._body_timeout_s

        async def receive_counted() -> Message:
            nonlocal num_bytes, has_overrun, is_partly_read, is_whole
            if is_whole:
                return await receive()
            is_partly_read = True
            message = await (receive() if is_upload else self._receive_in_time(receive, deadline_s))
            if message["type"] == "http.request":
                is_partly_read = message.get("more_body", False)
                is_whole = not is_partly_read
                num_bytes += len(message.get("body", b""))
                if num_bytes > limit:
                    has_overrun = True
                    raise too_large
            return message

        async def send_watched(message: Message) -> None:
            if (has_overrun or is_partly_read) and message["type"] == "http.response.start":
                # What is still on its way would be taken for the next request.
                MutableHeaders(scope=message)["connection"] = "close"
            if has_overrun and message["type"] == "http.response.body" and not message.get("more_body"):
                await send({**message, "more_body": True})
                await _linger(receive)
                message = {"type": "http.response.body", "body": b"", "more_body": False}
            await send(message)

        declared = _declared_length(scope)
        if declared is not None and declared > limit:
            has_overrun = True
            context_of(scope).error_code = too_large.code
            await error_response(too_large)(scope, receive, send_watched)
            return
        await self._app(scope, receive_counted, send_watched)

    async def _receive_in_time(self, receive: Receive, deadline_s: float) -> Message:
        try:
            async with asyncio.timeout_at(deadline_s):
                return await receive()
        except TimeoutError:
            raise RequestTimeoutError(f"The body did not arrive within {self._body_timeout_s:g} seconds.") from None


async def _linger(receive: Receive) -> None:
    num_bytes = 0
    try:
        async with asyncio.timeout(_LINGER_S):
            while num_bytes < _LINGER_BYTES:
                message = await receive()
                num_bytes += len(message.get("body", b""))
                if message["type"] != "http.request" or not message.get("more_body"):
                    return
    except TimeoutError:
        return


def _declared_length(scope: Scope) -> int | None:
    text = Headers(scope=scope).get("content-length")
    if text is None:
        return None
    if not (text.isascii() and text.isdigit()):
        raise InvalidRequestError("Content-Length is not a number.")
    return int(text) if len(text) < 20 else 1 << 63
