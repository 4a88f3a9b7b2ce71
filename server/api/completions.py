"""`POST /v1/completions`: JSON or server-sent events, one prompt or many, one task or many."""

from collections.abc import Sequence

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.completion_input import to_spec
from server.api.completion_output import CompletionWriter
from server.api.completion_schemas import CompletionChunk, CompletionRequest, CompletionResponse
from server.api.dependencies import CurrentCaller, CurrentContext, ReadyRuntime
from server.api.generation_response import DIGEST_HEADER_DOCUMENTED, documented_generation_errors, respond
from server.api.strict_json import MAX_INLINE_BYTES, StrictJSONRoute
from server.errors import TaskNotFoundError
from server.runtime.in_flight import RunningGeneration
from server.runtime.service import Runtime
from server.tenancy.keys import Caller

router = APIRouter(route_class=StrictJSONRoute)


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
            "headers": DIGEST_HEADER_DOCUMENTED,
            "content": {"text/event-stream": {"schema": CompletionChunk.model_json_schema()}},
        },
        **documented_generation_errors(),
    },
)
async def create_completion(
    body: CompletionRequest, request: Request, runtime: ReadyRuntime, caller: CurrentCaller, context: CurrentContext
) -> Response:
    backbone, codec = runtime.parts.backbone, runtime.parts.codec
    num_bytes = len(await request.body())
    # A body may hold a million token ids, each of which is looked at.
    spec = await runtime.run_tokenizer(
        num_bytes if num_bytes > MAX_INLINE_BYTES else 0,
        to_spec,
        body,
        vocab_size=backbone.vocab_size,
        max_model_len=backbone.max_model_len,
        backbone_name=backbone.name,
        max_prompts=runtime.settings.max_prompts,
    )

    def make_writer(running: RunningGeneration) -> CompletionWriter:
        return CompletionWriter(
            running,
            codec,
            model=body.model or backbone.name,
            system_fingerprint=backbone.fingerprint,
            echo=bool(body.echo),
            names_tasks=body.tasks is not None,
        )

    try:
        return await respond(
            spec,
            make_writer,
            streams=bool(body.stream),
            stream_options=body.stream_options,
            request=request,
            runtime=runtime,
            caller=caller,
            context=context,
        )
    except TaskNotFoundError as error:
        if body.tasks is not None:
            error.param = await _first_unknown(body.tasks, runtime, caller)
        raise


async def _first_unknown(tasks: Sequence[str], runtime: Runtime, caller: Caller) -> str:
    """The field of the first task that the caller cannot call."""
    for index, task in enumerate(tasks):
        try:
            await runtime.resolve(caller, task)
        except TaskNotFoundError:
            return f"tasks.{index}"
    return "tasks"
