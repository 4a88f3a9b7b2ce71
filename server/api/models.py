"""`GET /v1/models`: what the caller may put into `model`, as OpenAI's clients list it."""

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel

from server import errors
from server.api.common_schemas import documented_errors
from server.api.dependencies import CurrentCaller, ReadyRuntime
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


@router.get("/v1/models", summary="List the tasks that can be called", responses=documented_errors())
async def list_models(runtime: ReadyRuntime, caller: CurrentCaller) -> ModelList:
    """The backbone's own name (no prompt) first, then the caller's active tasks and the shared ones, by name."""
    tasks = await runtime.call(runtime.parts.tasks.list_callable, caller.tenant)
    models = [_model(runtime, task.task, created=int(task.created_at.timestamp()), owner=task.tenant) for task in tasks]
    return ModelList(data=[_backbone(runtime), *models])


@router.get("/v1/models/{model:path}", summary="One model", responses=documented_errors(errors.TaskNotFoundError))
async def get_model(model: str, runtime: ReadyRuntime, caller: CurrentCaller) -> Model:
    """A task, `task@version`, `task@sha256:<hex>`, or the backbone's name."""
    if model == runtime.parts.backbone.name:
        return _backbone(runtime)
    version = await runtime.call(runtime.parts.tasks.find, caller.tenant, model)
    return _model(runtime, model, created=int(version.created_at.timestamp()), owner=version.tenant)


def _backbone(runtime: Runtime) -> Model:
    return _model(runtime, runtime.parts.backbone.name, created=runtime.started_at, owner=OWNER)


def _model(runtime: Runtime, name: str, *, created: int, owner: str) -> Model:
    backbone = runtime.parts.backbone
    return Model(id=name, created=created, owned_by=owner, root=backbone.name, max_model_len=backbone.max_model_len)
