"""One request for text from its rows' outputs to its HTTP response: whole or as events.

Owns what all routes that generate have in common: the response's head and usage, the digest header, the collecting of
rows, the start of a stream, and what happens when the client leaves. What a choice looks like is the `ChoiceWriter`'s.
"""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from fastapi import Request
from starlette.responses import Response

from server import errors
from server.api.common_schemas import documented_errors
from server.api.context import RequestContext
from server.api.sampling_schemas import StreamOptions
from server.api.sse import EventStream, cancel_on_disconnect, write_json
from server.engine.request import PromptRef, RowOutput
from server.errors import PromptmuxError
from server.runtime.generation import Generation, GenerationSpec
from server.runtime.in_flight import RunningGeneration
from server.runtime.service import Runtime
from server.runtime.streams import RowStream, merge_outputs
from server.tenancy.keys import Caller

Json = dict[str, Any]

DIGEST_HEADER = "x-prompt-digest"
# A stream's status is sent when its first output is there, so that a prompt that cannot be loaded is a 503 and not a
# 200 with an error in it; but not later than this, for proxies that wait for headers.
FIRST_OUTPUT_TIMEOUT_S = 1.0
# nginx's: the client was gone before the answer.
CLIENT_CLOSED_REQUEST = 499

DIGEST_HEADER_DOCUMENTED = {
    DIGEST_HEADER: {
        "description": "Digest of the prompt that answered; absent without a prompt or with several.",
        "schema": {"type": "string"},
    }
}


def prompt_identity(prompt: PromptRef | None) -> Json | None:
    if prompt is None:
        return None
    return {"task": prompt.task, "version": prompt.version, "digest": prompt.digest}


def usage_of(running: RunningGeneration) -> Json:
    """What the request has used so far."""
    generation = running.generation
    prompt_tokens = generation.num_prompt_tokens
    completion_tokens = running.meter.completion_tokens
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "virtual_tokens": generation.num_virtual_tokens,
        "prompt_tokens_details": {"cached_tokens": running.meter.cached_tokens},
    }


class ResponseWriter(ABC):
    """Writes the JSON of one request, whole or in chunks, as plain dicts: it runs once a token."""

    def __init__(
        self,
        running: RunningGeneration,
        *,
        id_prefix: str,
        whole_object: str,
        chunk_object: str,
        model: str,
        system_fingerprint: str,
        prompt: PromptRef | None,
    ) -> None:
        self._running = running
        self._whole_object = whole_object
        self.chunk_head: Json = {
            "id": f"{id_prefix}-{running.generation.generation_id}",
            "object": chunk_object,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": system_fingerprint,
            "prompt": prompt_identity(prompt),
        }

    @abstractmethod
    def whole_choice(self, output: RowOutput) -> Json:
        """The choice that a row's merged outputs are."""

    @abstractmethod
    def chunk_choices(self, outputs: Sequence[RowOutput]) -> list[Json]:
        """The choices of the chunks that these outputs are; none for what has nothing to show yet."""

    def whole(self, outputs: Sequence[RowOutput]) -> Json:
        """The whole response; `outputs` has one merged output a row."""
        choices = [self.whole_choice(output) for output in outputs]
        choices.sort(key=lambda choice: choice["index"])
        return {**self.chunk_head, "object": self._whole_object, "choices": choices, "usage": self.usage()}

    def usage(self) -> Json:
        return usage_of(self._running)


class StreamWriter:
    """The events of a streamed response."""

    def __init__(self, writer: ResponseWriter, options: StreamOptions | None) -> None:
        self._writer = writer
        self._include_usage = bool(options and options.include_usage)
        self._continuous_usage = bool(options and options.continuous_usage_stats)

    def chunks(self, outputs: Sequence[RowOutput]) -> list[Json]:
        return [self._chunk([choice]) for choice in self._writer.chunk_choices(outputs)]

    def last_chunks(self) -> list[Json]:
        if not self._include_usage:
            return []
        return [{**self._writer.chunk_head, "choices": [], "usage": self._writer.usage()}]

    def _chunk(self, choices: list[Json]) -> Json:
        chunk: Json = {**self._writer.chunk_head, "choices": choices}
        if self._continuous_usage:
            chunk["usage"] = self._writer.usage()
        elif self._include_usage:
            chunk["usage"] = None
        return chunk


async def respond(
    spec: GenerationSpec,
    make_writer: Callable[[RunningGeneration], ResponseWriter],
    *,
    streams: bool,
    stream_options: StreamOptions | None,
    request: Request,
    runtime: Runtime,
    caller: Caller,
    context: RequestContext,
) -> Response:
    """Runs `spec` and answers with what `make_writer`'s writer makes of it."""
    running = await start(spec, runtime=runtime, caller=caller, context=context)
    writer = make_writer(running)
    headers = digest_header(running.generation)
    if streams:
        return await _stream(running, StreamWriter(writer, stream_options), request, runtime, context, headers)
    outputs = await collect(running, request, runtime)
    if outputs is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    answer = await write_json(lambda: dump_json(writer.whole(outputs)), outputs)
    return Response(answer, headers=headers, media_type="application/json")


async def start(
    spec: GenerationSpec, *, runtime: Runtime, caller: Caller, context: RequestContext
) -> RunningGeneration:
    """Submits `spec` and notes for the access line what answers it."""
    origin = context.origin
    generation = await runtime.prepare(caller, spec, origin=origin)
    # The first item's prompt stands for all.
    prompt = generation.items[0].prompt
    context.task = prompt.task if prompt is not None else None
    context.digest = prompt.digest if prompt is not None else None
    running = runtime.submit(generation, arrived_at_s=context.arrived_at_s, origin=origin)
    context.running = running
    return running


async def collect(running: RunningGeneration, request: Request, runtime: Runtime) -> list[RowOutput] | None:
    """One output a row, to the end of all. None when the client left; raises the first row's error."""
    stream = running.stream
    outputs: list[RowOutput] = []
    try:
        async with cancel_on_disconnect(request.receive, partial(_abandon, stream, runtime)):
            while not stream.is_finished:
                news = await stream.read()
                _raise_error(news)
                outputs.extend(news)
        return None if stream.is_closed else merge_outputs(outputs)
    finally:
        stream.close()


def digest_header(generation: Generation) -> dict[str, str]:
    digests = generation.digests
    return {DIGEST_HEADER: digests[0]} if len(digests) == 1 and digests[0] is not None else {}


def json_response(value: Any, headers: dict[str, str] | None = None) -> Response:
    return Response(dump_json(value), headers=headers, media_type="application/json")


def dump_json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")


def documented_generation_errors(*more: type[PromptmuxError]) -> dict[int | str, dict[str, Any]]:
    """The errors that every route which runs rows may answer with."""
    return documented_errors(
        errors.InvalidRequestError,
        errors.ContextLengthExceededError,
        errors.TaskNotFoundError,
        errors.PayloadTooLargeError,
        errors.RequestTimeoutError,
        errors.QuotaExceededError,
        errors.RateLimitExceededError,
        errors.QueueFullError,
        errors.DrainingError,
        errors.EngineFailedError,
        errors.PromptCorruptError,
        errors.IsolationError,
        errors.NumericalError,
        *more,
    )


async def _stream(
    running: RunningGeneration,
    writer: StreamWriter,
    request: Request,
    runtime: Runtime,
    context: RequestContext,
    headers: dict[str, str],
) -> Response:
    stream = running.stream
    try:
        async with cancel_on_disconnect(request.receive, partial(_abandon, stream, runtime)):
            first = await stream.read(FIRST_OUTPUT_TIMEOUT_S)
        _raise_error(first)
    except BaseException:
        stream.close()
        raise
    if stream.is_closed:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return EventStream(
        stream,
        writer,
        first=first,
        context=context,
        metrics=runtime.metrics,
        ping_interval_s=runtime.settings.ping_interval_s,
        slow_reader_timeout_s=runtime.settings.slow_reader_timeout_s,
        headers=headers,
    )


def _abandon(stream: RowStream, runtime: Runtime) -> None:
    """The client has left."""
    if not stream.is_finished:
        runtime.metrics.client_disconnects_total.inc()
        stream.close()


def _raise_error(outputs: Sequence[RowOutput]) -> None:
    for output in outputs:
        if output.error is not None:
            raise output.error
