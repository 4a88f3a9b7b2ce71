"""Who is calling: API keys turned into a tenant and its scopes.

Owns the rule for servers without keys (everyone is tenant `default` with every scope; such a server listens on
loopback only) and a cache of a second, so that a key costs no query a request. Refuses to know HTTP beyond the text of
an `Authorization` header, and how keys are stored: the store compares them.
"""

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from prompt_store.names import DEFAULT_TENANT
from server.errors import AuthenticationError

Scope = Literal["infer", "write", "admin"]
ALL_SCOPES: frozenset[str] = frozenset({"infer", "write", "admin"})

# A revoked key works for at most so long.
CACHE_TTL_S = 1.0
MAX_CACHED_KEYS = 4096


@dataclass(frozen=True, slots=True)
class Caller:
    """A request's tenant and what it may do. `key_id` is None on a server without keys."""

    tenant: str
    scopes: frozenset[str]
    key_id: str | None = None

    def can(self, scope: Scope) -> bool:
        """`admin` includes the other scopes; they do not include each other."""
        return scope in self.scopes or "admin" in self.scopes


LOCAL_CALLER = Caller(tenant=DEFAULT_TENANT, scopes=ALL_SCOPES)


class StoredKey(Protocol):
    @property
    def id(self) -> str: ...
    @property
    def tenant(self) -> str: ...
    @property
    def scopes(self) -> frozenset[str]: ...


class KeyStore(Protocol):
    """The part of the store that knows keys; both calls may block on its database."""

    def has_keys(self) -> bool: ...
    def verify_key(self, secret: str) -> StoredKey | None: ...


class KeyRing:
    """Identifies callers. Any thread may use it; `check` may block on the database, `check_cached` never does."""

    def __init__(self, store: KeyStore, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._lock = threading.Lock()
        # Keyed by the secret's hash: secrets are not kept in memory. None is a secret that no key has.
        self._known: OrderedDict[bytes, tuple[float, Caller | None]] = OrderedDict()
        # Of revocations: what was looked up before one is not remembered after it.
        self._num_revoked = 0
        self._keyless_until_s = 0.0
        # A server that has once asked for keys never falls back to letting everyone in when the last one goes.
        self._has_had_keys = False

    @property
    def is_keyless(self) -> bool:
        """Whether the last look found a store without keys."""
        return not self._has_had_keys and self._keyless_until_s > 0.0

    def check_cached(self, authorization: str | None) -> Caller | None:
        """The caller if a look within the last second found it, else None: ask `check`."""
        now = self._clock()
        if not self._has_had_keys and now < self._keyless_until_s:
            return LOCAL_CALLER
        secret = _bearer(authorization)
        if secret is None:
            return None
        with self._lock:
            found = self._known.get(_hash(secret))
        return found[1] if found is not None and now < found[0] else None

    def check(self, authorization: str | None) -> Caller:
        """The caller. Raises `AuthenticationError` without a key or with a wrong one."""
        now = self._clock()
        if not self._has_had_keys:
            if not self._store.has_keys():
                self._keyless_until_s = now + CACHE_TTL_S
                return LOCAL_CALLER
            self._has_had_keys = True
        secret = _bearer(authorization)
        if secret is None:
            raise AuthenticationError("No API key was given: send it as 'Authorization: Bearer <key>'.")
        digest = _hash(secret)
        with self._lock:
            found, num_revoked = self._known.get(digest), self._num_revoked
        if found is not None and now < found[0]:
            caller = found[1]
        else:
            caller = self._look_up(secret)
            self._remember(digest, caller, now + CACHE_TTL_S, num_revoked)
        if caller is None:
            raise AuthenticationError("The API key is not valid.")
        return caller

    def forget(self, key_id: str) -> None:
        """The key was revoked: this server refuses it at once."""
        with self._lock:
            self._num_revoked += 1
            for digest, (_, caller) in list(self._known.items()):
                if caller is not None and caller.key_id == key_id:
                    del self._known[digest]

    def require_keys(self) -> None:
        """A key was made: from now on this server asks for one."""
        self._has_had_keys = True

    def _remember(self, digest: bytes, caller: Caller | None, until_s: float, num_revoked: int) -> None:
        with self._lock:
            if num_revoked != self._num_revoked:
                return
            self._known[digest] = (until_s, caller)
            self._known.move_to_end(digest)
            while len(self._known) > MAX_CACHED_KEYS:
                self._known.popitem(last=False)

    def _look_up(self, secret: str) -> Caller | None:
        key = self._store.verify_key(secret)
        return Caller(tenant=key.tenant, scopes=frozenset(key.scopes), key_id=key.id) if key is not None else None


def _bearer(authorization: str | None) -> str | None:
    """The secret of a `Bearer` header; None when there is no such header."""
    if authorization is None:
        return None
    scheme, _, secret = authorization.partition(" ")
    secret = secret.strip()
    return secret if scheme.lower() == "bearer" and secret else None


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()
