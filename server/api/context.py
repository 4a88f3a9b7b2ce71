"""What is known of a request while it is handled: its id, its caller, and what its access line will say.

The outermost middleware makes one `RequestContext` a request and puts it into the ASGI scope; everything further in
adds what it learns.
"""

import re
import time
import uuid
from dataclasses import dataclass, field

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import Scope

from server.runtime.in_flight import RunningGeneration
from server.runtime.receipts import RequestOrigin
from server.tenancy.keys import Caller

REQUEST_ID_HEADER = "x-request-id"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_SCOPE_KEY = "promptmux.context"


@dataclass(slots=True)
class RequestContext:
    """Filled in as the request goes inwards. `arrived_at_s` is on the monotonic clock.

    `endpoint` is the route's template, known once a route that takes the context was found.
    """

    request_id: str
    arrived_at_s: float = field(default_factory=time.monotonic)
    caller: Caller | None = None
    task: str | None = None
    digest: str | None = None
    running: RunningGeneration | None = None
    endpoint: str = "other"
    error_code: str | None = None

    @property
    def origin(self) -> RequestOrigin:
        """What a receipt says of where the request comes from."""
        key_id = self.caller.key_id if self.caller is not None else None
        return RequestOrigin(request_id=self.request_id, key_id=key_id, endpoint=self.endpoint)


def choose_request_id(given: str | None) -> str:
    """The client's id if it is a plain word of 1 to 128 letters, digits, '.', '_' and '-', else a new one."""
    return given if given is not None and _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def attach_context(scope: Scope) -> RequestContext:
    context = RequestContext(choose_request_id(Headers(scope=scope).get(REQUEST_ID_HEADER)))
    scope[_SCOPE_KEY] = context
    return context


def context_of(source: Request | Scope) -> RequestContext:
    """The context of a request that came through the middleware."""
    scope = source.scope if isinstance(source, Request) else source
    context = scope[_SCOPE_KEY]
    assert isinstance(context, RequestContext)
    return context
