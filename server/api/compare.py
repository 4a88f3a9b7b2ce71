"""`POST /v1/tasks/{task}/compare`: two versions of a task, or one and the bare backbone, answer the same inputs."""

import asyncio
from collections.abc import Sequence

from fastapi import APIRouter, Request
from starlette.responses import Response

from prompt_store.manifest import PromptVersion
from server.api.common_schemas import PromptIdentity
from server.api.compare_schemas import CompareInput, CompareRequest, ComparisonObject, LogprobChange
from server.api.dependencies import CurrentCaller, CurrentContext, ReadyRuntime
from server.api.generation_response import CLIENT_CLOSED_REQUEST, documented_generation_errors
from server.api.sampling_input import check_unicode, value_or
from server.api.sse import cancel_on_disconnect
from server.api.strict_json import StrictJSONRoute
from server.errors import InvalidRequestError, PermissionDeniedError, PromptmuxError
from server.runtime.answers import tokenize_questions
from server.runtime.comparison import MAX_INPUTS, Comparison, compare
from server.runtime.ownership import may_change
from server.runtime.service import Runtime
from server.tenancy.keys import Caller

DEFAULT_MAX_TOKENS = 32

router = APIRouter(route_class=StrictJSONRoute, tags=["tasks"])


@router.post(
    "/v1/tasks/{task}/compare",
    response_model=ComparisonObject,
    summary="Compare two versions' answers",
    responses=documented_generation_errors(),
)
async def compare_versions(
    task: str,
    body: CompareRequest,
    request: Request,
    runtime: ReadyRuntime,
    caller: CurrentCaller,
    context: CurrentContext,
) -> Response:
    """Both answer greedily, in the same batches, behind all other requests of the tenant.

    Inputs default to the probes that came with the second version, else with the first, at most 256 of them; 400 when
    neither has any. Probes are shown where the answers differ, so that using them needs the scope `write` of the tenant
    whose task it is.
    Completions, where they are known, are scored too.
    """
    context.task = task
    found = [
        None if number is None else await _find_version(runtime, caller, task, number, f"versions.{place}")
        for place, number in enumerate(body.versions)
    ]
    if found == [None, None]:
        # A name that is nobody's is no task, however little of it is asked.
        await runtime.call(runtime.parts.tasks.get_task, caller.tenant, task)
    inputs_of: int | None = None
    texts: Sequence[tuple[str, str | None]]
    if body.inputs is not None:
        param, texts = "inputs", _given_inputs(body.inputs)
    else:
        if not all(version is None or may_change(caller, version) for version in found):
            raise PermissionDeniedError(
                "A version's probes are what its owner tests it by: comparing by them needs the scope 'write' of its "
                "tenant. Send inputs instead."
            )
        param, (inputs_of, texts) = "versions", await _probes(runtime, found)
    questions = await runtime.run_tokenizer(
        sum(len(prompt) + len(completion or "") for prompt, completion in texts),
        tokenize_questions,
        texts,
        runtime.parts.codec,
        max_model_len=runtime.parts.backbone.max_model_len,
        param=param,
    )
    first, second = (_reference(runtime, version) for version in found)
    comparing = asyncio.ensure_future(
        compare(
            runtime,
            caller,
            (first, second),
            questions,
            max_tokens=value_or(body.max_tokens, DEFAULT_MAX_TOKENS),
            param=param,
            origin=context.origin,
        )
    )

    def give_up() -> None:
        """The client has left."""
        if comparing.cancel():
            runtime.metrics.client_disconnects_total.inc()

    try:
        async with cancel_on_disconnect(request.receive, give_up):
            await asyncio.wait([comparing])
    finally:
        comparing.cancel()
    if comparing.cancelled():
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    answer = _to_object(task, found, inputs_of, comparing.result())
    return Response(answer.model_dump_json(), media_type="application/json")


async def _find_version(runtime: Runtime, caller: Caller, task: str, number: int, param: str) -> PromptVersion:
    try:
        return (await runtime.call(runtime.parts.tasks.get_version, caller.tenant, task, number)).version
    except PromptmuxError as error:
        error.param = param
        raise


def _reference(runtime: Runtime, version: PromptVersion | None) -> str:
    return runtime.parts.backbone.name if version is None else f"{version.task}@{version.version}"


def _given_inputs(inputs: Sequence[CompareInput]) -> list[tuple[str, str | None]]:
    texts: list[tuple[str, str | None]] = []
    for index, item in enumerate(inputs):
        check_unicode(item.prompt, f"inputs.{index}.prompt")
        if item.completion is not None:
            check_unicode(item.completion, f"inputs.{index}.completion")
        texts.append((item.prompt, item.completion))
    return texts


async def _probes(
    runtime: Runtime, versions: Sequence[PromptVersion | None]
) -> tuple[int, list[tuple[str, str | None]]]:
    """The version whose probes are used, and those; the last version that has some."""
    for version in reversed(versions):
        if version is not None:
            probes = await runtime.call(runtime.parts.tasks.read_probes, version)
            if probes:
                return version.version, [(probe.prompt, probe.completion) for probe in probes[:MAX_INPUTS]]
    raise InvalidRequestError("inputs: required, for neither version was uploaded with probes", param="inputs")


def _to_object(
    task: str, versions: Sequence[PromptVersion | None], inputs_of: int | None, comparison: Comparison
) -> ComparisonObject:
    logprob = None
    if comparison.logprobs is not None:
        first, second = comparison.logprobs
        logprob = LogprobChange(
            first=first, second=second, mean_change=second - first, num_scored=comparison.num_scored
        )
    return ComparisonObject(
        task=task,
        versions=[
            None
            if version is None
            else PromptIdentity(task=version.task, version=version.version, digest=version.digest)
            for version in versions
        ],
        num_inputs=comparison.num_inputs,
        inputs_of=inputs_of,
        agreement=comparison.agreement,
        exact_match=None if comparison.exact_match is None else list(comparison.exact_match),
        logprob=logprob,
        num_different=comparison.num_different,
        differences=list(comparison.differences),
    )
