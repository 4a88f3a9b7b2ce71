"""`GET …/versions/{version}/inspect`: what a prompt's numbers say, and how far they are from another version's."""

from typing import Annotated

from fastapi import APIRouter, Path, Query
from starlette.responses import Response

from prompt_store.manifest import PromptVersion
from server import errors
from server.api.common_schemas import documented_errors
from server.api.dependencies import CurrentCaller, ReadyRuntime
from server.api.inspect_schemas import InspectionObject, InspectQuery
from server.api.strict_json import StrictJSONRoute
from server.api.task_schemas import MAX_VERSION
from server.errors import TaskNotFoundError
from server.runtime.inspection import inspect
from server.runtime.ownership import check_may_read
from server.runtime.parts import Parts
from server.tenancy.keys import Caller

router = APIRouter(route_class=StrictJSONRoute, tags=["tasks"])


@router.get(
    "/v1/tasks/{task}/versions/{version}/inspect",
    response_model=InspectionObject,
    summary="Look into a prompt",
    responses=documented_errors(
        errors.InvalidRequestError,
        errors.TaskNotFoundError,
        errors.PromptMismatchError,
        errors.PromptCorruptError,
    ),
)
async def inspect_version(
    task: str,
    version: Annotated[int, Path(ge=1, le=MAX_VERSION)],
    query: Annotated[InspectQuery, Query()],
    runtime: ReadyRuntime,
    caller: CurrentCaller,
) -> Response:
    """The tokens of the vocabulary nearest to each virtual token, its norm beside the vocabulary's, and, with
    `against`, how far another version of the task is. 403 for a shared one of another tenant.

    Prefixes hold keys and values, which lie next to no token: norms and distances are given layer by layer. 400 for
    `against` of another kind.
    """
    parts = runtime.parts
    # One at a time: a prompt may be large, and the engine needs the CPU more.
    async with runtime.inspecting():
        answer = await runtime.call(_inspect, parts, caller, task, version, query)
    return Response(answer, media_type="application/json")


def _inspect(parts: Parts, caller: Caller, task: str, version: int, query: InspectQuery) -> str:
    """The answer's JSON, which may have megabytes: written here, in a thread, and not on the event loop."""
    tasks = parts.tasks
    found = check_may_read(caller, tasks.get_version(caller.tenant, task, version).version)
    against = _find_against(parts, caller, found, query.against) if query.against is not None else None
    inspection = inspect(
        tasks.read_prompt(found),
        vocabulary=parts.backbone.vocabulary,
        names=parts.codec,
        top=query.top,
        against=tasks.read_prompt(against) if against is not None else None,
    )
    return InspectionObject.of(
        found, inspection, vocabulary=parts.backbone.vocabulary, against=against
    ).model_dump_json()


def _find_against(parts: Parts, caller: Caller, version: PromptVersion, reference: str) -> PromptVersion:
    try:
        if not reference.startswith("sha256:"):
            found = parts.tasks.get_version(caller.tenant, version.task, int(reference)).version
        else:
            found = parts.tasks.find(caller.tenant, f"{version.task}@{reference}")
    except TaskNotFoundError as error:
        raise TaskNotFoundError(error.message, param="against") from error
    return check_may_read(caller, found)
