"""`POST /v1/completions`: JSON or server-sent events, one prompt or many, one task or many."""

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from server import errors
from server.api.common_schemas import documented_errors
from server.api.completion_input import to_spec
from server.api.completion_output import CompletionWriter, Json
from server.api.completion_schemas import CompletionChunk, CompletionRequest, CompletionResponse, StreamOptions
from server.api.context import RequestContext
from server.api.dependencies import CurrentCaller, CurrentContext, ReadyRuntime
from server.api.sse import EventStream, cancel_on_disconnect
from server.api.strict_json import StrictJSONRoute
from server.engine.request import RowOutput
from server.runtime.generation import Generation
from server.runtime.service import RunningGeneration, Runtime
from server.runtime.streams import RowStream, merge_outputs

DIGEST_HEADER = "x-prompt-digest"
# A stream's status is sent when its first output is there, so that a prompt that cannot be loaded is a 503 and not a
# 200 with an error in it; but not later than this, for proxies that wait for headers.
FIRST_OUTPUT_TIMEOUT_S = 1.0
# nginx's: the client was gone before the answer.
CLIENT_CLOSED_REQUEST = 499

router = APIRouter(route_class=StrictJSONRoute)


class CompletionChunkWriter:
    """The events of a streamed completion."""

    def __init__(self, writer: CompletionWriter, options: StreamOptions | None) -> None:
        self._writer = writer
        self._include_usage = bool(options and options.include_usage)
        self._continuous_usage = bool(options and options.continuous_usage_stats)

    def chunks(self, outputs: Sequence[RowOutput]) -> list[Json]:
        choices = [choice for output in outputs if (choice := self._writer.choice(output)) is not None]
        return [self._chunk([choice]) for choice in choices]

    def last_chunks(self) -> list[Json]:
        return [{**self._writer.head, "choices": [], "usage": self._writer.usage()}] if self._include_usage else []

    def _chunk(self, choices: list[Json]) -> Json:
        chunk: Json = {**self._writer.head, "choices": choices}
        if self._continuous_usage:
            chunk["usage"] = self._writer.usage()
        elif self._include_usage:
            chunk["usage"] = None
        return chunk


@router.post(
    "/v1/completions",
    response_model=CompletionResponse,
    summary="Complete a prompt",
    tags=["inference"],
    responses={
        200: {
            "description": "The completion; with `stream`, server-sent events whose data are chunks, then "
            "`data: [DONE]`. A failure in mid-stream is an `event: error` whose data is an error body. Silent streams "
            "carry `: ping` comments.",
            "headers": {
                DIGEST_HEADER: {
                    "description": "Digest of the prompt that answered; absent without a prompt or with several.",
                    "schema": {"type": "string"},
                }
            },
            "content": {"text/event-stream": {"schema": CompletionChunk.model_json_schema()}},
        },
        **documented_errors(
            errors.InvalidRequestError,
            errors.ContextLengthExceededError,
            errors.TaskNotFoundError,
            errors.PayloadTooLargeError,
            errors.QueueFullError,
            errors.DrainingError,
            errors.EngineFailedError,
            errors.PromptCorruptError,
            errors.IsolationError,
            errors.NumericalError,
        ),
    },
)
async def create_completion(
    body: CompletionRequest, request: Request, runtime: ReadyRuntime, caller: CurrentCaller, context: CurrentContext
) -> Response:
    backbone, codec = runtime.parts.backbone, runtime.parts.codec
    spec = to_spec(
        body,
        vocab_size=backbone.vocab_size,
        max_model_len=backbone.max_model_len,
        backbone_name=backbone.name,
        max_prompts=runtime.settings.max_prompts,
    )
    generation = await runtime.prepare(caller, spec)
    _note(context, generation)
    running = runtime.submit(generation, arrived_at_s=context.arrived_at_s)
    context.running = running
    writer = CompletionWriter(
        running,
        codec,
        model=body.model or backbone.name,
        system_fingerprint=backbone.fingerprint,
        echo=bool(body.echo),
        names_tasks=body.tasks is not None,
    )
    headers = _digest_header(generation)
    if body.stream:
        chunk_writer = CompletionChunkWriter(writer, body.stream_options)
        return await _stream(running, chunk_writer, request, runtime, context, headers)
    outputs = await _collect(running, request, runtime)
    if outputs is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return _json(writer.whole(outputs), headers)


async def _stream(
    running: RunningGeneration,
    writer: CompletionChunkWriter,
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


async def _collect(running: RunningGeneration, request: Request, runtime: Runtime) -> list[RowOutput] | None:
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


def _abandon(stream: RowStream, runtime: Runtime) -> None:
    """The client has left."""
    if not stream.is_finished:
        runtime.metrics.client_disconnects_total.inc()
        stream.close()


def _raise_error(outputs: Sequence[RowOutput]) -> None:
    for output in outputs:
        if output.error is not None:
            raise output.error


def _note(context: RequestContext, generation: Generation) -> None:
    """For the access line: the first item's prompt stands for all."""
    prompt = generation.items[0].prompt
    context.task = prompt.task if prompt is not None else None
    context.digest = prompt.digest if prompt is not None else None


def _digest_header(generation: Generation) -> dict[str, str]:
    digests = generation.digests
    return {DIGEST_HEADER: digests[0]} if len(digests) == 1 and digests[0] is not None else {}


def _json(value: Any, headers: dict[str, str]) -> Response:
    body = json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")
    return Response(body, headers=headers, media_type="application/json")
