"""`POST …/versions/{version}/gate`: have a version's probes asked again."""

from typing import Annotated

from fastapi import APIRouter, Path

from server import errors
from server.api.common_schemas import documented_errors
from server.api.dependencies import CurrentCaller, ReadyRuntime
from server.api.strict_json import StrictJSONRoute
from server.api.task_schemas import MAX_VERSION, VersionObject

router = APIRouter(route_class=StrictJSONRoute, tags=["tasks"])


@router.post(
    "/v1/tasks/{task}/versions/{version}/gate",
    status_code=202,
    summary="Run a version's gate again",
    responses=documented_errors(errors.InvalidRequestError, errors.TaskNotFoundError, errors.UnavailableError),
)
async def run_gate(
    task: str, version: Annotated[int, Path(ge=1, le=MAX_VERSION)], runtime: ReadyRuntime, caller: CurrentCaller
) -> VersionObject:
    """Its probes are asked in the background; `GET` the version to see how far that is. A gate that has not ended goes
    on as it is. 400 for a version that was uploaded without a threshold.

    If it passes and its upload wanted it active, it becomes active, unless the active version changes meanwhile. An
    active version that fails stays active.
    """
    return VersionObject.of(await runtime.call(runtime.parts.tasks.restart_gate, caller, task, version), caller)
