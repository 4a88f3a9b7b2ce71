"""A running server as the target of a load: streaming completions over HTTP, timed as a client sees them.

Owns the request's body, what the stream's chunks say about tokens and time, and the names of what can go wrong. Refuses
to know when requests are sent.
"""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import httpx

from server.bench.load import Answer, Failure
from server.bench.sse import Event, EventParser
from server.bench.workload import BenchRequest

CONNECT_TIMEOUT_S = 10.0
# uvicorn closes an idle connection after 5 seconds; one that is used at that moment fails for no fault of the server.
KEEPALIVE_S = 2.0

CONNECT_ERROR = "connect_error"
TIMEOUT = "timeout"
CONNECTION_LOST = "connection_lost"
STREAM_CUT = "stream_cut"
BAD_STREAM = "bad_stream"


class OnlineTarget:
    """Sends each request to the model of its prompt; those without a prompt go to `backbone`."""

    def __init__(
        self, url: str, key: str | None, *, backbone: str, tasks: Sequence[str], read_timeout_s: float = 300.0
    ) -> None:
        """`tasks[i]` is what request `prompt` i is sent to. A stream silent for `read_timeout_s` is given up."""
        self._backbone = backbone
        self._tasks = tasks
        self._http = httpx.AsyncClient(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(read_timeout_s, connect=CONNECT_TIMEOUT_S, pool=None),
            # The load says how many requests run at once; a pool that makes them wait would measure itself.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEPALIVE_S),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def metrics(self) -> str | None:
        """The text of `/metrics`; None where it cannot be read: it may be kept from clients."""
        try:
            response = await self._http.get("/metrics")
        except httpx.RequestError:
            return None
        return response.text if response.is_success else None

    async def answer(self, request: BenchRequest) -> Answer:
        stream = CompletionStream(asyncio.get_running_loop().time)
        try:
            failure = await self._stream(request, stream)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            failure = _failure(CONNECT_ERROR, error)
        except httpx.TimeoutException as error:
            failure = _failure(TIMEOUT, error)
        except httpx.TransportError as error:
            failure = _failure(CONNECTION_LOST, error)
        except httpx.RequestError as error:
            # A body that is not what its headers say (httpx.DecodingError).
            failure = _failure(BAD_STREAM, error)
        return Answer(
            token_times_s=stream.token_times_s,
            ended_s=stream.now(),
            num_cached_tokens=stream.num_cached_tokens,
            failure=failure,
        )

    async def _stream(self, request: BenchRequest, stream: "CompletionStream") -> Failure | None:
        body = {
            "model": self._backbone if request.prompt is None else self._tasks[request.prompt],
            "prompt": list(request.token_ids),
            "max_tokens": request.num_new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        parser = EventParser()
        async with self._http.stream("POST", "/v1/completions", json=body) as response:
            if not response.is_success:
                return _refusal(response.status_code, await response.aread())
            async for piece in response.aiter_bytes():
                for event in parser.feed(piece):
                    stream.take(event)
        return stream.failure_at_end()


class CompletionStream:
    """What the events of one completion say.

    A chunk carries the usage so far, and so tells how many tokens are new: several when the server sent them together,
    or held back bytes that were no character yet. Their times are spread evenly over the gap that they came after.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.token_times_s: list[float] = []
        self.num_cached_tokens = 0
        self._failure: Failure | None = None
        self._is_done = False

    def take(self, event: Event) -> None:
        """Account for one event."""
        if event.data == "[DONE]":
            self._is_done = True
            return
        try:
            value: Any = json.loads(event.data)
            if event.name == "error" or "error" in value:
                self._fail(value["error"])
                return
            usage = value.get("usage")
            # Other servers send the usage at the end alone: there a chunk is taken for a token.
            num_tokens = usage["completion_tokens"] if usage else len(self.token_times_s) + bool(value["choices"])
            self._add_tokens(int(num_tokens) - len(self.token_times_s))
            if usage:
                self.num_cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        except (ValueError, KeyError, TypeError, AttributeError):
            self._failure = Failure(kind=BAD_STREAM, message=f"an event that is no chunk: {event.data[:200]}")

    def failure_at_end(self) -> Failure | None:
        """What went wrong, once the stream has ended."""
        if self._failure is None and not self._is_done:
            return Failure(kind=STREAM_CUT, message="the stream ended without data: [DONE]")
        return self._failure

    def _fail(self, error: Mapping[str, Any]) -> None:
        self._failure = Failure(kind=str(error.get("code") or "error"), message=str(error.get("message")))

    def _add_tokens(self, count: int) -> None:
        if count <= 0:
            return
        now_s = self.now()
        last_s = self.token_times_s[-1] if self.token_times_s else now_s
        self.token_times_s += [last_s + (now_s - last_s) * (i + 1) / count for i in range(count)]


def _failure(kind: str, error: Exception) -> Failure:
    return Failure(kind=kind, message=str(error) or type(error).__name__)


def _refusal(status: int, body: bytes) -> Failure:
    """A refused request, named by the server's error code."""
    try:
        error = json.loads(body)["error"]
        return Failure(kind=str(error["code"] or error["type"]), message=str(error["message"]), status=status)
    except (ValueError, KeyError, TypeError):
        return Failure(kind=f"http_{status}", message=body[:200].decode("utf-8", "replace"), status=status)
