"""`GET /v1/models`: what the caller may put into `model`, as OpenAI's clients list it."""

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.responses import Response

from server import errors
from server.api.common_schemas import documented_errors
from server.api.dependencies import CurrentCaller, ReadyRuntime
from server.api.generation_response import dump_json
from server.runtime.service import Runtime

OWNER = "promptmux"

router = APIRouter(tags=["inference"])


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    root: str
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


@router.get(
    "/v1/models",
    response_model=ModelList,
    summary="List the tasks that can be called",
    responses=documented_errors(),
)
async def list_models(runtime: ReadyRuntime, caller: CurrentCaller) -> Response:
    """The backbone's own name (no prompt) first, then the caller's active tasks and the shared ones, by name."""
    return Response(await runtime.call(_list, runtime, caller.tenant), media_type="application/json")


@router.get("/v1/models/{model:path}", summary="One model", responses=documented_errors(errors.TaskNotFoundError))
async def get_model(model: str, runtime: ReadyRuntime, caller: CurrentCaller) -> Model:
    """A task, `task@version`, `task@sha256:<hex>`, or the backbone's name."""
    if model == runtime.parts.backbone.name:
        return _backbone(runtime)
    return await runtime.call(_find, runtime, caller.tenant, model)


def _find(runtime: Runtime, tenant: str, name: str) -> Model:
    """A task is as old as in the list, a version of it as itself."""
    tasks = runtime.parts.tasks
    version = tasks.find(tenant, name)
    created_at = tasks.get_task(tenant, name).task.created_at if name == version.task else version.created_at
    return _model(runtime, name, created=int(created_at.timestamp()), owner=version.tenant)


def _list(runtime: Runtime, tenant: str) -> bytes:
    """The answer's JSON, written in a thread and a page at a time: a list of ten thousand would hold up the loop."""
    first = _backbone(runtime).model_dump()
    pieces = [b'{"object":"list","data":[' + dump_json(first)]
    for page in runtime.parts.tasks.callable_pages(tenant):
        models = [
            {**first, "id": task.task, "created": int(task.created_at.timestamp()), "owned_by": task.tenant}
            for task in page
        ]
        pieces.append(b"," + dump_json(models)[1:-1])
    return b"".join((*pieces, b"]}"))


def _backbone(runtime: Runtime) -> Model:
    return _model(runtime, runtime.parts.backbone.name, created=runtime.started_at, owner=OWNER)


def _model(runtime: Runtime, name: str, *, created: int, owner: str) -> Model:
    backbone = runtime.parts.backbone
    return Model(id=name, created=created, owned_by=owner, root=backbone.name, max_model_len=backbone.max_model_len)
