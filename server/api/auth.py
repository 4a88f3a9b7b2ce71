"""Who may call what: deny by default, in front of every route.

Owns the list of open paths and the scope that each of the others needs. The middleware is outside the router, so that
a route someone adds later is closed until a rule opens it. Refuses to know how keys are looked up (`server.tenancy`).
"""

import re

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from prompt_store.errors import PromptStoreError
from server.api.context import context_of
from server.errors import PermissionDeniedError
from server.loopback import is_loopback
from server.runtime.service import Runtime
from server.runtime.store_errors import to_client_error
from server.tenancy.keys import Caller
from server.tenancy.keys import Scope as KeyScope

OPEN_PATHS = frozenset({"/livez", "/readyz", "/health", "/version", "/metrics"})
READ_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})

_HOST = re.compile(r"(?:\[(?P<ipv6>[^\[\]]*)\]|(?P<name>[^:\[\]/@]*))(?::\d*)?")

# The first rule that matches holds. A path that none matches needs a key, of whatever scope.
_RULES: tuple[tuple[re.Pattern[str], bool, KeyScope], ...] = (
    # A prompt's bytes are what its owner trained: calling it does not include taking it away.
    (re.compile(r"/v1/tasks/[^/]+/versions/[^/]+/(file|config|inspect)"), True, "write"),
    # It changes nothing, and tells no more than calling both versions would.
    (re.compile(r"/v1/tasks/[^/]+/compare"), False, "infer"),
    (re.compile(r"/v1/tasks(/.*)?"), True, "infer"),
    (re.compile(r"/v1/tasks(/.*)?"), False, "write"),
    (re.compile(r"/v1/audit"), True, "admin"),
    # What a tenant teaches its prompts is for those who may make them.
    (re.compile(r"/v1/(files|fine_tuning)(/.*)?"), True, "write"),
    (re.compile(r"/v1/(files|fine_tuning)(/.*)?"), False, "write"),
    # The operator's: they speak of all tenants.
    (re.compile(r"/v1/(keys|tenants)(/.*)?"), True, "admin"),
    (re.compile(r"/v1/((keys|tenants)(/.*)?|reload)"), False, "admin"),
    (re.compile(r"/metrics"), True, "infer"),
    (re.compile(r"/(tokenize|detokenize)"), False, "infer"),
    (re.compile(r"/tokenizer_info"), True, "infer"),
    (re.compile(r"/v1/.*"), True, "infer"),
    (re.compile(r"/v1/.*"), False, "infer"),
)


def required_scope(method: str, path: str) -> KeyScope | None:
    """The scope that a key needs for this; None: any key will do."""
    is_read = method in READ_METHODS
    return next((scope for rule, reads, scope in _RULES if reads is is_read and rule.fullmatch(path)), None)


class AuthMiddleware:
    """Puts the caller into the request's context. Raises 401 and 403, and 503 while keys cannot be looked up yet."""

    def __init__(self, app: ASGIApp, runtime: Runtime) -> None:
        self._app = app
        self._runtime = runtime

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._is_open(scope["path"]):
            context_of(scope).caller = await self._authorize(scope)
        await self._app(scope, receive, send)

    def _is_open(self, path: str) -> bool:
        settings = self._runtime.settings
        if path == "/metrics" and (settings.metrics_key_required == "on" or settings.metrics_port is not None):
            return False
        return path in OPEN_PATHS

    async def _authorize(self, scope: Scope) -> Caller:
        headers = Headers(scope=scope)
        authorization = headers.get("authorization")
        keys = self._runtime.keys
        caller = keys.check_cached(authorization)
        if caller is None:
            try:
                caller = await self._runtime.call(keys.check, authorization)
            except PromptStoreError as error:
                raise to_client_error(error) from error
        if keys.is_keyless:
            _refuse_foreign_pages(headers)
        needed = required_scope(scope["method"], scope["path"])
        if needed is not None and not caller.can(needed):
            raise PermissionDeniedError(f"The API key lacks the scope {needed!r}.")
        return caller


def _refuse_foreign_pages(headers: Headers) -> None:
    """Without keys, a page from elsewhere in a browser on this machine must not act for its user.

    Not by its own name, which the browser gives as the origin; and not by a name of its own that it has made point at
    this machine (DNS rebinding): then the browser takes the server for the page's own and may give no origin, but the
    name is in `Host`. A server without keys listens on loopback alone, so a name of this machine is always right.
    """
    host = headers.get("host", "")
    found = _HOST.fullmatch(host)
    if found is None or not is_loopback((found["ipv6"] or found["name"] or "").lower()):
        raise PermissionDeniedError(
            "Without API keys the server answers only as localhost or a loopback address.", code="cross_origin"
        )
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2] != host:
        raise PermissionDeniedError("Requests from pages of another origin need an API key.", code="cross_origin")


def caller_of(request: Request) -> Caller:
    """The caller that the middleware found."""
    caller = context_of(request.scope).caller
    assert caller is not None, "the route is open, it has no caller"
    return caller
