"""`POST /v1/classify`: which of some labels goes best with each input, by the likelihood of the labels' own tokens.

Every pair of an input and a label is one row; all rows go in one batch.
"""

import time
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.classify_schemas import ClassifyRequest, ClassifyResponse
from server.api.dependencies import CurrentCaller, CurrentContext, ReadyRuntime
from server.api.generation_response import (
    CLIENT_CLOSED_REQUEST,
    DIGEST_HEADER_DOCUMENTED,
    Json,
    collect,
    digest_header,
    documented_generation_errors,
    json_response,
    prompt_identity,
    start,
    usage_of,
)
from server.api.sampling_input import check_reference, check_text, check_unicode, value_or
from server.api.strict_json import StrictJSONRoute
from server.engine.request import PromptRef, RowOutput, SamplingParams
from server.errors import InvalidRequestError
from server.runtime.classification import (
    LABELS_KEY,
    ScoredInput,
    labels_of_metadata,
    score,
    softmax,
    tokenize_inputs,
)
from server.runtime.generation import GenerationSpec
from server.runtime.in_flight import RunningGeneration
from server.runtime.receipts import RequestOrigin
from server.runtime.service import Runtime
from server.tenancy.keys import Caller

router = APIRouter(route_class=StrictJSONRoute)


@router.post(
    "/v1/classify",
    response_model=ClassifyResponse,
    summary="Choose among labels",
    tags=["inference"],
    responses={200: {"headers": DIGEST_HEADER_DOCUMENTED}, **documented_generation_errors()},
)
async def classify(
    body: ClassifyRequest, request: Request, runtime: ReadyRuntime, caller: CurrentCaller, context: CurrentContext
) -> Response:
    """400 when neither the request nor the prompt's version names labels."""
    backbone = runtime.parts.backbone
    inputs = _inputs(body.input, runtime.settings.max_prompts)
    given = _given_labels(body.labels)
    reference = check_reference(body.model, "model")
    if given is None:
        reference, labels = await _labels_of_version(runtime, caller, reference, context.origin)
    else:
        labels = given
    max_rows = runtime.settings.max_waiting_rows
    if len(inputs) * len(labels) > max_rows:
        raise InvalidRequestError(
            f"input: {len(inputs)} inputs × {len(labels)} labels; one request may have {max_rows} pairs", param="input"
        )
    scored = await runtime.run_tokenizer(
        sum(map(len, inputs)) * (len(labels) + 1),
        tokenize_inputs,
        inputs,
        labels,
        runtime.parts.codec,
        separator=body.separator if body.separator is None else check_unicode(body.separator, "separator"),
        add_special_tokens=value_or(body.add_special_tokens, True),
        max_model_len=backbone.max_model_len,
        max_tokens=runtime.settings.max_request_tokens,
    )
    running = await start(
        _to_spec(scored, reference, value_or(body.priority, 0)), runtime=runtime, caller=caller, context=context
    )
    outputs = await collect(running, request, runtime)
    if outputs is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    answer = {
        "id": f"classify-{running.generation.generation_id}",
        "object": "list",
        "created": int(time.time()),
        "model": body.model,
        "system_fingerprint": backbone.fingerprint,
        "prompt": prompt_identity(running.generation.items[0].prompt),
        "labels": list(labels),
        "data": _data(running, outputs, scored, labels),
        "usage": usage_of(running),
    }
    return json_response(answer, digest_header(running.generation))


def _inputs(value: Any, max_inputs: int) -> list[str]:
    if isinstance(value, str):
        return [check_text(value, "input")]
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise InvalidRequestError("input: must be a string or a list of strings", param="input")
    if not 1 <= len(value) <= max_inputs:
        raise InvalidRequestError(f"input: must have 1 to {max_inputs} items, got {len(value)}", param="input")
    return [check_text(text, f"input.{index}") for index, text in enumerate(value)]


def _given_labels(labels: Sequence[str] | None) -> tuple[str, ...] | None:
    if labels is None:
        return None
    if len(set(labels)) < len(labels):
        raise InvalidRequestError("labels: must be distinct", param="labels")
    return tuple(check_unicode(label, f"labels.{index}") for index, label in enumerate(labels))


async def _labels_of_version(
    runtime: Runtime, caller: Caller, reference: str, origin: RequestOrigin
) -> tuple[str, tuple[str, ...]]:
    """The labels of the version that `reference` stands for now, and a reference to that very version."""
    ref: PromptRef | None = await runtime.resolve(caller, reference, origin=origin)
    labels = None
    if ref is not None:
        found = await runtime.call(runtime.parts.tasks.get_version, caller.tenant, ref.task, ref.version)
        labels = labels_of_metadata(found.version.metadata)
        reference = f"{ref.task}@{ref.version}"
    if labels is None:
        raise InvalidRequestError(
            f"labels: required, for the prompt's metadata has no {LABELS_KEY!r} (a list of distinct texts)",
            param="labels",
        )
    return reference, labels


def _to_spec(scored: Sequence[ScoredInput], reference: str, priority: int) -> GenerationSpec:
    rows = tuple(row for item in scored for row in item.rows)
    return GenerationSpec(
        prompts=rows,
        references=(reference,) * len(rows),
        n=1,
        sampling=SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=0),
        priority=priority,
        param="input",
    )


def _data(
    running: RunningGeneration, outputs: Sequence[RowOutput], scored: Sequence[ScoredInput], labels: Sequence[str]
) -> list[Json]:
    entries = {output.row_id: output.prompt_logprobs or () for output in outputs}
    of_row = iter(entries[row.row_id] for row in running.generation.rows)
    data: list[Json] = []
    for index, item in enumerate(scored):
        probs = softmax([score(next(of_row), item.start) for _ in item.rows])
        best = max(range(len(labels)), key=probs.__getitem__)
        data.append({"index": index, "label": labels[best], "probs": probs, "num_classes": len(labels)})
    return data
