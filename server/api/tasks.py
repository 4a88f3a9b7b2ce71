"""`/v1/tasks`: upload prompts, look at them, roll them out and back, take them away."""

from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request
from starlette.responses import Response

from prompt_store.manifest import PromptVersion
from server import errors
from server.api.common_schemas import documented_errors
from server.api.context import RequestContext
from server.api.dependencies import CurrentCaller, CurrentContext, ReadyRuntime
from server.api.strict_json import StrictJSONRoute
from server.api.task_schemas import (
    MAX_VERSION,
    Deleted,
    TaskList,
    TaskObject,
    TaskPage,
    TaskStatsObject,
    TaskUpdate,
    VersionList,
    VersionObject,
    VersionPage,
)
from server.api.upload_form import OPENAPI_BODY, receive_form, to_upload
from server.errors import InvalidRequestError, PromptmuxError, TaskNotFoundError
from server.runtime.ownership import check_may_read
from server.runtime.service import Runtime
from server.runtime.tasks import TaskService
from server.tenancy.keys import Caller

VersionNumber = Annotated[int, Path(ge=1, le=MAX_VERSION)]

router = APIRouter(route_class=StrictJSONRoute, tags=["tasks"])


@router.post(
    "/v1/tasks/{task}/versions",
    status_code=201,
    response_model=VersionObject,
    summary="Upload a prompt",
    openapi_extra=OPENAPI_BODY,
    responses={
        200: {"model": VersionObject, "description": "The task has this very prompt already; this is its version."},
        **documented_errors(
            errors.InvalidRequestError,
            errors.ConflictError,
            errors.PayloadTooLargeError,
            errors.UnsupportedFileError,
            errors.PromptMismatchError,
            errors.StorageQuotaExceededError,
            errors.RequestTimeoutError,
            errors.StorageFullError,
            errors.UnavailableError,
        ),
    },
)
async def upload_version(
    task: str, request: Request, runtime: ReadyRuntime, caller: CurrentCaller, context: CurrentContext
) -> Response:
    """A file and its configuration as PEFT's `save_pretrained` writes them, checked strictly against the backbone.

    It is on disk when the answer comes. On any error nothing is stored. A body that takes too long to arrive is
    refused with 408 and the code `upload_timeout`. With `gate_threshold` the version stays inactive until the gate's
    check, which goes on after the answer, has passed.
    """
    uploads = runtime.metrics.prompt_uploads_total
    try:
        async with receive_form(request, runtime.settings.upload_timeout_s) as form, runtime.uploading():
            upload = await to_upload(form, task)
            view, is_new = await runtime.call(runtime.parts.tasks.upload, caller, upload)
    except PromptmuxError as error:
        uploads.labels(result=error.code).inc()
        raise
    uploads.labels(result="created" if is_new else "existing").inc()
    _note(context, view.version)
    content = VersionObject.of(view, caller).model_dump_json()
    return Response(
        content,
        status_code=201 if is_new else 200,
        headers={"location": f"/v1/tasks/{task}/versions/{view.version.version}"},
        media_type="application/json",
    )


@router.get(
    "/v1/tasks",
    response_model=TaskList,
    summary="List tasks",
    responses=documented_errors(errors.InvalidRequestError),
)
async def list_tasks(page: Annotated[TaskPage, Query()], runtime: ReadyRuntime, caller: CurrentCaller) -> Response:
    """The caller's own tasks and the shared ones, by name."""

    def read() -> str:
        views, has_more = runtime.parts.tasks.list_tasks(caller.tenant, limit=page.limit, after=page.after)
        return TaskList(data=[TaskObject.of(view) for view in views], has_more=has_more).model_dump_json()

    return await _written_by(runtime, read)


@router.get("/v1/tasks/{task}", summary="One task", responses=documented_errors(errors.TaskNotFoundError))
async def get_task(task: str, runtime: ReadyRuntime, caller: CurrentCaller) -> TaskObject:
    return TaskObject.of(await runtime.call(runtime.parts.tasks.get_task, caller.tenant, task))


@router.patch(
    "/v1/tasks/{task}",
    summary="Roll out, roll back, pin, try a canary",
    responses=documented_errors(
        errors.InvalidRequestError, errors.TaskNotFoundError, errors.ConflictError, errors.PromptCorruptError
    ),
)
async def update_task(task: str, body: TaskUpdate, runtime: ReadyRuntime, caller: CurrentCaller) -> TaskObject:
    """Atomic. Rows that are running keep the version that they hold."""
    if body.active_version is None and body.pinned is None and body.canary_change == "keep":
        raise InvalidRequestError("Give active_version, pinned or canary.")
    tasks = runtime.parts.tasks
    try:
        view = await runtime.call(
            tasks.update_task,
            caller,
            task,
            active_version=body.active_version,
            expected_version=body.expected_version,
            pinned=body.pinned,
            canary=body.canary_change,
        )
    except TaskNotFoundError as error:
        error.param = await runtime.call(_unknown_field, tasks, caller, task, body)
        raise
    return TaskObject.of(view)


def _unknown_field(tasks: TaskService, caller: Caller, task: str, body: TaskUpdate) -> str:
    """The field that names a version which is not there; `task` where there is no such task to change."""
    canary = None if body.canary is None else body.canary.version
    fields = {"active_version": body.active_version, "canary.version": canary}
    field = "task"
    try:
        tasks.get_task(caller.tenant, task)
        for name, version in fields.items():
            if version is not None:
                field = name
                tasks.get_version(caller.tenant, task, version)
    except TaskNotFoundError:
        return field
    return "task"


@router.post(
    "/v1/tasks/{task}/rollback",
    summary="Undo the last activation",
    responses=documented_errors(errors.TaskNotFoundError, errors.ConflictError),
)
async def rollback_task(task: str, runtime: ReadyRuntime, caller: CurrentCaller) -> TaskObject:
    """The version that was active before is again; repeated, it goes further back, as far as 64 activations.

    Versions that are deleted, quarantined or held back by a gate are passed over. 409 when none was active before.
    """
    return TaskObject.of(await runtime.call(runtime.parts.tasks.rollback, caller, task))


@router.delete("/v1/tasks/{task}", summary="Delete a task", responses=documented_errors(errors.TaskNotFoundError))
async def delete_task(task: str, runtime: ReadyRuntime, caller: CurrentCaller) -> Deleted:
    """All its versions with it; the name cannot be used again.

    Rows in flight finish if they hold the prompt's prefix or its numbers are in memory. Those whose prompt had still
    to be read get 404.
    """
    await runtime.call(runtime.parts.tasks.delete_task, caller, task)
    return Deleted(object="task", task=task)


@router.get("/v1/tasks/{task}/stats", summary="A task's numbers", responses=documented_errors(errors.TaskNotFoundError))
async def get_stats(task: str, runtime: ReadyRuntime, caller: CurrentCaller) -> TaskStatsObject:
    """Requests, tokens and latencies of the caller's tenant, over all versions, since the server started."""
    return TaskStatsObject.of(task, await runtime.call(runtime.parts.tasks.stats, caller.tenant, task))


@router.get(
    "/v1/tasks/{task}/versions",
    response_model=VersionList,
    summary="A task's history",
    responses=documented_errors(errors.InvalidRequestError, errors.TaskNotFoundError),
)
async def list_versions(
    task: str, page: Annotated[VersionPage, Query()], runtime: ReadyRuntime, caller: CurrentCaller
) -> Response:
    """Newest first."""

    def read() -> str:
        views, has_more = runtime.parts.tasks.list_versions(caller.tenant, task, limit=page.limit, after=page.after)
        return VersionList(data=[VersionObject.of(view, caller) for view in views], has_more=has_more).model_dump_json()

    return await _written_by(runtime, read)


@router.get(
    "/v1/tasks/{task}/versions/{version}",
    summary="One version",
    responses=documented_errors(errors.InvalidRequestError, errors.TaskNotFoundError),
)
async def get_version(task: str, version: VersionNumber, runtime: ReadyRuntime, caller: CurrentCaller) -> VersionObject:
    view = await runtime.call(runtime.parts.tasks.get_version, caller.tenant, task, version)
    return VersionObject.of(view, caller)


@router.delete(
    "/v1/tasks/{task}/versions/{version}",
    summary="Delete a version",
    responses=documented_errors(errors.InvalidRequestError, errors.TaskNotFoundError, errors.ConflictError),
)
async def delete_version(task: str, version: VersionNumber, runtime: ReadyRuntime, caller: CurrentCaller) -> Deleted:
    """409 for the active one and for the canary.

    Rows in flight finish if they hold the prompt's prefix or its numbers are in memory. Those whose prompt had still
    to be read get 404.
    """
    await runtime.call(runtime.parts.tasks.delete_version, caller, task, version)
    return Deleted(object="prompt_version", task=task, version=version)


_DOWNLOAD = documented_errors(errors.InvalidRequestError, errors.TaskNotFoundError, errors.PromptCorruptError)


@router.get(
    "/v1/tasks/{task}/versions/{version}/file",
    summary="Download a prompt's file",
    response_class=Response,
    responses={
        200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}},
        304: {"description": "The client has it already."},
        **_DOWNLOAD,
    },
)
async def get_file(
    task: str, version: VersionNumber, request: Request, runtime: ReadyRuntime, caller: CurrentCaller
) -> Response:
    """The bytes as uploaded, their digest checked now. `ETag` is the digest. 403 for a shared one of another tenant."""
    read = runtime.parts.tasks.read_file
    return await _download(request, runtime, caller, task, version, read, "application/octet-stream")


@router.get(
    "/v1/tasks/{task}/versions/{version}/config",
    summary="Download a prompt's configuration",
    response_class=Response,
    responses={
        200: {"content": {"application/json": {"schema": {"type": "object"}}}},
        304: {"description": "The client has it already."},
        **_DOWNLOAD,
    },
)
async def get_config(
    task: str, version: VersionNumber, request: Request, runtime: ReadyRuntime, caller: CurrentCaller
) -> Response:
    """`adapter_config.json` as uploaded. A version never changes, so its digest is the `ETag` here too."""
    read = runtime.parts.tasks.read_config
    return await _download(request, runtime, caller, task, version, read, "application/json")


async def _written_by(runtime: Runtime, read: Callable[[], str]) -> Response:
    """JSON that is read and written in one thread: a page may have a thousand objects with metadata of kilobytes."""
    return Response(await runtime.call(read), media_type="application/json")


async def _download(
    request: Request,
    runtime: Runtime,
    caller: Caller,
    task: str,
    version: int,
    read: Callable[[PromptVersion], bytes],
    media_type: str,
) -> Response:
    view = await runtime.call(runtime.parts.tasks.get_version, caller.tenant, task, version)
    found = check_may_read(caller, view.version)
    if _has_it(request, found):
        return Response(status_code=304, headers=_etag(found))
    return Response(await runtime.call(read, found), headers=_etag(found), media_type=media_type)


def _etag(version: PromptVersion) -> dict[str, str]:
    return {"etag": f'"{version.digest}"'}


def _has_it(request: Request, version: PromptVersion) -> bool:
    """If-None-Match, compared weakly, as a GET's is."""
    given = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    return "*" in given or f'"{version.digest}"' in given


def _note(context: RequestContext, version: PromptVersion) -> None:
    context.task, context.digest = version.task, version.digest
