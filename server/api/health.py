"""Routes without a key: is the process alive, can it take requests, what is it, what has it counted."""

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.responses import Response

from server import __version__
from server.api.common_schemas import ErrorResponse
from server.api.dependencies import AnyRuntime
from server.engine.status import CompiledState

router = APIRouter(tags=["health"])


class Health(BaseModel):
    status: Literal["alive", "ready"]


class ServedBackbone(BaseModel):
    """The model that is served and the way it is run: packed, or dense for models that attend by themselves.

    `kernel` computes the attention of packed backbones. `compiled` is off, compiling, trial (there is a package; each
    size of step is served by what was faster), failed (the log says why) or stopped. `compiled_sizes` are those that
    are served compiled: s stands for steps of s to 2s - 1 tokens.
    """

    name: str
    fingerprint: str
    path: Literal["packed", "dense"]
    dtype: str
    device: str
    max_model_len: int
    kernel: Literal["native", "triton", "gather"]
    quantization: Literal["none", "int8"]
    compiled: CompiledState
    compiled_sizes: list[int]


class Version(BaseModel):
    """`backbone` is null until it has been loaded and has passed its gate."""

    version: str
    backbone: ServedBackbone | None


@router.get("/livez", summary="Is the process alive?", responses={503: {"model": ErrorResponse}})
async def livez(runtime: AnyRuntime) -> Health:
    """503 `engine_failed` when the step loop has ended or hangs: only a restart helps."""
    runtime.check_alive()
    return Health(status="alive")


@router.get("/readyz", summary="Can it take requests?", responses={503: {"model": ErrorResponse}})
@router.get("/health", summary="The same as /readyz", responses={503: {"model": ErrorResponse}})
async def readyz(runtime: AnyRuntime) -> Health:
    """503 `loading`, `draining` or `engine_failed` while it cannot."""
    runtime.check_ready()
    return Health(status="ready")


@router.get("/version", summary="Version of the server, and the backbone that it serves")
async def version(runtime: AnyRuntime) -> Version:
    backbone = runtime.backbone
    if backbone is None:
        return Version(version=__version__, backbone=None)
    return Version(
        version=__version__,
        backbone=ServedBackbone(
            name=backbone.name,
            fingerprint=backbone.fingerprint,
            path=backbone.path,
            dtype=backbone.dtype_name,
            device=backbone.device_name,
            max_model_len=backbone.max_model_len,
            kernel=backbone.kernel,
            quantization=backbone.quantization,
            compiled=backbone.compiled_state,
            compiled_sizes=backbone.compiled_sizes,
        ),
    )


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(runtime: AnyRuntime) -> Response:
    """Behind a key where the settings say so, and where it has a port of its own."""
    runtime.refresh_gauges()
    content, content_type = runtime.metrics.render()
    return Response(content, headers={"content-type": content_type})
