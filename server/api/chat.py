"""`POST /v1/chat/completions`: a conversation through the backbone's own chat template; JSON or server-sent events."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.chat_input import check_chat, num_chars, to_messages, to_spec
from server.api.chat_output import ChatWriter
from server.api.chat_schemas import ChatCompletionChunk, ChatCompletionRequest, ChatCompletionResponse
from server.api.dependencies import CurrentCaller, CurrentContext, ReadyRuntime
from server.api.generation_response import DIGEST_HEADER_DOCUMENTED, documented_generation_errors, respond
from server.api.sampling_input import value_or
from server.api.strict_json import StrictJSONRoute
from server.runtime.in_flight import RunningGeneration

router = APIRouter(route_class=StrictJSONRoute)


@router.post(
    "/v1/chat/completions",
    response_model=ChatCompletionResponse,
    summary="Answer a conversation",
    tags=["inference"],
    responses={
        200: {
            "description": "The answer; with `stream`, server-sent events whose data are chunks, the first of each "
            "choice with its role, then `data: [DONE]`. A failure in mid-stream is an `event: error` whose data is an "
            "error body. Silent streams carry `: ping` comments.",
            "headers": DIGEST_HEADER_DOCUMENTED,
            "content": {"text/event-stream": {"schema": ChatCompletionChunk.model_json_schema()}},
        },
        **documented_generation_errors(),
    },
)
async def create_chat_completion(
    body: ChatCompletionRequest, request: Request, runtime: ReadyRuntime, caller: CurrentCaller, context: CurrentContext
) -> Response:
    """400 when the backbone has no chat template, or its template refuses the messages."""
    check_chat(body)
    backbone, codec = runtime.parts.backbone, runtime.parts.codec
    template = runtime.parts.require_chat_template()
    messages = to_messages(body.messages)
    text = await runtime.run_tokenizer(
        num_chars(messages),
        template.render,
        messages,
        add_generation_prompt=value_or(body.add_generation_prompt, True),
    )
    spec = to_spec(
        body,
        text,
        vocab_size=backbone.vocab_size,
        max_model_len=backbone.max_model_len,
        max_request_tokens=runtime.settings.max_request_tokens,
    )

    def make_writer(running: RunningGeneration) -> ChatWriter:
        return ChatWriter(
            running,
            codec,
            model=body.model,
            system_fingerprint=backbone.fingerprint,
            num_top=value_or(body.top_logprobs, 0),
        )

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
