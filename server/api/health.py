"""Routes without a key: is the process alive, can it take requests, what is it, what has it counted."""

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.responses import Response

from server import __version__
from server.api.common_schemas import ErrorResponse
from server.api.dependencies import AnyRuntime

router = APIRouter(tags=["health"])


class Health(BaseModel):
    status: Literal["alive", "ready"]


class Version(BaseModel):
    version: str


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


@router.get("/version", summary="Version of the server")
async def version() -> Version:
    return Version(version=__version__)


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(runtime: AnyRuntime) -> Response:
    content, content_type = runtime.render_metrics()
    return Response(content, headers={"content-type": content_type})
