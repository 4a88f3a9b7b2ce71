"""What routes are given: the runtime, the caller, and the refusal of requests that cannot be served now."""

from typing import Annotated

from fastapi import Depends, Request

from server.api.auth import caller_of
from server.api.context import RequestContext, context_of
from server.runtime.service import Runtime
from server.tenancy.keys import Caller


async def get_runtime(request: Request) -> Runtime:
    runtime = request.app.state.runtime
    assert isinstance(runtime, Runtime)
    return runtime


async def get_ready_runtime(request: Request) -> Runtime:
    """Raises LoadingError, DrainingError or EngineFailedError while no request can be taken."""
    runtime = await get_runtime(request)
    runtime.check_ready()
    return runtime


async def get_caller(request: Request) -> Caller:
    return caller_of(request)


async def get_context(request: Request) -> RequestContext:
    context = context_of(request)
    context.endpoint = getattr(request.scope.get("route"), "path", context.endpoint)
    return context


AnyRuntime = Annotated[Runtime, Depends(get_runtime)]
ReadyRuntime = Annotated[Runtime, Depends(get_ready_runtime)]
CurrentCaller = Annotated[Caller, Depends(get_caller)]
CurrentContext = Annotated[RequestContext, Depends(get_context)]
