"""Server-sent events: how a stream of chunks is framed, kept alive and ended.

Owns the bytes on the wire (`data:` lines, `: ping` comments, the `event: error` block, `data: [DONE]`; no `id:` and no
`retry:`, at which clients break), what happens to a reader that has stopped reading or is gone, and one send a step
however many rows had news in it. Refuses to know what a chunk says.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.context import RequestContext
from server.engine.request import RowOutput
from server.errors import PromptmuxError
from server.metrics import Metrics
from server.runtime.streams import RowStream

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
# Twenty alternatives each take about a hundredth of a second.
MAX_INLINE_ENTRIES = 512


def data_event(value: Any) -> bytes:
    """One event. ASCII only: clients that split lines as Python does would also split at U+2028."""
    return b"data: " + json.dumps(value, separators=(",", ":")).encode("ascii") + b"\n\n"


def error_event(error: PromptmuxError) -> bytes:
    """The event of a failure in mid-stream, its message also as a comment for eyes."""
    comment = " ".join(error.message.encode("ascii", "replace").decode("ascii").split())
    return f"event: error\n: {comment}\n".encode("ascii") + data_event(error.to_body())


class ChunkWriter(Protocol):
    """Turns a step's outputs into events, and says what comes after the last one."""

    def chunks(self, outputs: Sequence[RowOutput]) -> list[Any]: ...
    def last_chunks(self) -> list[Any]: ...


async def write_json(write: Callable[[], bytes], outputs: Sequence[RowOutput]) -> bytes:
    """What `write` makes of these outputs: in a thread where they have log-probabilities of many tokens, as those of a
    long prompt that is echoed; they would hold up the event loop, and with it all other streams.
    """
    num_entries = sum(len(output.logprobs) + len(output.prompt_logprobs or ()) for output in outputs)
    return write() if num_entries <= MAX_INLINE_ENTRIES else await run_in_threadpool(write)


@asynccontextmanager
async def cancel_on_disconnect(receive: Receive, on_disconnect: Callable[[], None]) -> AsyncIterator[None]:
    """Calls `on_disconnect` if the client goes while the body runs. The request's own body must have been read."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        on_disconnect()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)


class EventStream(Response):
    """Streams a request's rows until the last one ends, its client goes, or its client stops reading.

    `first` are outputs that were read already. Whatever happens, no row outlives the response.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        stream: RowStream,
        writer: ChunkWriter,
        *,
        first: Sequence[RowOutput],
        context: RequestContext,
        metrics: Metrics,
        ping_interval_s: float,
        slow_reader_timeout_s: float,
        headers: dict[str, str],
    ) -> None:
        # `no` keeps nginx from collecting the events before it passes them on.
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers})
        # The length is not known, whatever the base class counted.
        del self.headers["content-length"]
        self._stream = stream
        self._writer = writer
        self._first = first
        self._context = context
        self._metrics = metrics
        self._ping_interval_s = ping_interval_s
        self._slow_reader_timeout_s = slow_reader_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            # One limit for all sends, put on and taken off around each: half the cost of a limit a token.
            async with cancel_on_disconnect(receive, self._give_up), asyncio.timeout(None) as limit:
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                async for body, is_last in self._bodies():
                    limit.reschedule(asyncio.get_running_loop().time() + self._slow_reader_timeout_s)
                    await send({"type": "http.response.body", "body": body, "more_body": not is_last})
                    limit.reschedule(None)
        except TimeoutError:
            # A send was blocked for too long.
            self._give_up()
        finally:
            self._stream.close()

    async def _bodies(self) -> AsyncIterator[tuple[bytes, bool]]:
        outputs: Sequence[RowOutput] = self._first
        while True:
            error = next((output.error for output in outputs if output.error is not None), None)
            if error is not None:
                self._context.error_code = error.code
                sound = [output for output in outputs if output.error is None]
                yield await self._write(sound) + error_event(error) + DONE, True
                return
            events = await self._write(outputs)
            if self._stream.is_finished:
                if not self._stream.is_closed:
                    yield events + self._events(self._writer.last_chunks()) + DONE, True
                return
            if events:
                yield events, False
            outputs = await self._stream.read(self._ping_interval_s)
            if not outputs and not self._stream.is_finished:
                yield PING, False

    async def _write(self, outputs: Sequence[RowOutput]) -> bytes:
        return await write_json(lambda: self._events(self._writer.chunks(outputs)), outputs)

    def _give_up(self) -> None:
        """The client is gone, or as good as gone."""
        if not self._stream.is_closed:
            if not self._stream.is_finished:
                self._metrics.client_disconnects_total.inc()
            self._stream.close()

    @staticmethod
    def _events(chunks: Sequence[Any]) -> bytes:
        return b"".join(data_event(chunk) for chunk in chunks)
