"""What a tenant may use, and what it uses now: requests and tokens a minute, rows, and the limits on what it stores.

Owns the buckets of the minute, the count of rows in the engine, and a cache of a second over the limits that the store
has, so that a quota costs no query a request and a changed one is in force within a second. A request is charged when
it is admitted, with its prompt's tokens and all the new ones that it may make; when it ends, what it did not make is
given back. A limit that the store leaves open is the server's default, and open there it is none. Counts are this
server's own: each replica grants its tenants their limits.

Refuses to know HTTP but for the names of the headers that clients of OpenAI's API read, and how the store holds what
a tenant has stored to its limits (it does so in the transaction of the upload).
"""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Protocol

from prompt_store.manifest import Quota
from server.errors import MAX_RETRY_AFTER_S, QuotaExceededError, RateLimitExceededError
from server.tenancy.buckets import TokenBucket

# A changed quota is in force after at most so long.
CACHE_TTL_S = 1.0
# Tenants whose use is remembered; of those that use nothing now the longest unseen go first.
MAX_TENANTS = 10_000
MAX_RESET_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """None is no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_running_rows: int | None = None
    max_prompts: int | None = None
    max_prompt_bytes: int | None = None
    max_virtual_tokens: int | None = None

    def under(self, quota: Quota | None) -> "Limits":
        """Those of the quota, and these where it leaves one open."""
        given = {name: getattr(quota, name) for name in LIMIT_NAMES} if quota is not None else {}
        return replace(self, **{name: value for name, value in given.items() if value is not None})


LIMIT_NAMES = tuple(field.name for field in fields(Limits))


@dataclass(frozen=True, slots=True)
class Use:
    """What a tenant has taken: of this minute's requests and tokens, and rows that are in the engine."""

    requests: int
    tokens: int
    rows: int


class QuotaStore(Protocol):
    def get_quota(self, tenant: str) -> Quota | None: ...


@dataclass(slots=True)
class _Account:
    limits: Limits
    fresh_until_s: float = float("-inf")
    requests: TokenBucket | None = None
    tokens: TokenBucket | None = None
    num_rows: int = 0


@dataclass(slots=True)
class Reservation:
    """What a request was charged; `settle` it once, when it ends."""

    tenant: str
    num_prompt_tokens: int
    num_new_tokens: int
    num_rows: int
    headers: Mapping[str, str] = field(default_factory=dict)
    is_settled: bool = False


class QuotaKeeper:
    """Any thread may use it; `refresh` may block on the database, the others never do."""

    def __init__(self, store: QuotaStore, defaults: Limits, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._defaults = defaults
        self._clock = clock
        self._lock = threading.Lock()
        self._accounts: dict[str, _Account] = {}

    def is_fresh(self, tenant: str) -> bool:
        """Whether the tenant's limits were looked at within the last second; else `refresh` them."""
        with self._lock:
            account = self._accounts.get(tenant)
            return account is not None and self._clock() < account.fresh_until_s

    def refresh(self, tenant: str) -> Limits:
        """The tenant's limits as the store has them now."""
        quota = self._store.get_quota(tenant)
        now_s = self._clock()
        with self._lock:
            account = self._account(tenant)
            # Those that were seen last come last.
            self._accounts[tenant] = self._accounts.pop(tenant)
            account.limits = self._defaults.under(quota)
            account.fresh_until_s = now_s + CACHE_TTL_S
            account.requests = _fit(account.requests, account.limits.requests_per_minute, now_s)
            account.tokens = _fit(account.tokens, account.limits.tokens_per_minute, now_s)
            return account.limits

    def quota_of(self, tenant: str) -> Quota:
        """The limits that an upload is held to. Blocks."""
        limits = self.refresh(tenant)
        return Quota(tenant=tenant, **{name: getattr(limits, name) for name in LIMIT_NAMES})

    @property
    def defaults(self) -> Limits:
        """Of tenants for which the store has none."""
        with self._lock:
            return self._defaults

    def set_defaults(self, defaults: Limits) -> None:
        """In force for each tenant when its limits are looked at next."""
        with self._lock:
            self._defaults = defaults
            for account in self._accounts.values():
                account.fresh_until_s = float("-inf")

    def reserve(self, tenant: str, *, num_prompt_tokens: int, num_new_tokens: int, num_rows: int) -> Reservation:
        """Charges a request, or nothing of it.

        Raises RateLimitExceededError (the minute's requests or tokens are used up), or QuotaExceededError (too many
        rows, or more tokens than a minute ever has).
        """
        now_s = self._clock()
        num_tokens = num_prompt_tokens + num_new_tokens
        with self._lock:
            account = self._account(tenant)
            self._check_rows(account, num_rows)
            self._check_rate("requests", account.requests, 1, now_s, account)
            self._check_rate("tokens", account.tokens, num_tokens, now_s, account)
            if account.requests is not None:
                account.requests.take(1, now_s)
            if account.tokens is not None:
                account.tokens.take(num_tokens, now_s)
            account.num_rows += num_rows
            return Reservation(tenant, num_prompt_tokens, num_new_tokens, num_rows, _headers(account, now_s))

    def settle(self, reservation: Reservation, *, num_new_tokens: int) -> None:
        """The request has ended and has made so many tokens. A second call does nothing."""
        self._give_back(reservation, num_tokens=reservation.num_new_tokens - num_new_tokens, num_requests=0)

    def cancel(self, reservation: Reservation) -> None:
        """The request never ran."""
        num_tokens = reservation.num_prompt_tokens + reservation.num_new_tokens
        self._give_back(reservation, num_tokens=num_tokens, num_requests=1)

    def use_of(self, tenant: str) -> Use:
        now_s = self._clock()
        with self._lock:
            account = self._accounts.get(tenant)
            if account is None:
                return Use(0, 0, 0)
            return Use(_taken(account.requests, now_s), _taken(account.tokens, now_s), account.num_rows)

    def tenants(self) -> list[str]:
        """Those that were seen."""
        with self._lock:
            return sorted(self._accounts)

    def _give_back(self, reservation: Reservation, *, num_tokens: int, num_requests: int) -> None:
        now_s = self._clock()
        with self._lock:
            if reservation.is_settled:
                return
            reservation.is_settled = True
            account = self._account(reservation.tenant)
            account.num_rows -= reservation.num_rows
            if account.tokens is not None:
                account.tokens.take(-num_tokens, now_s)
            if account.requests is not None:
                account.requests.take(-num_requests, now_s)

    def _account(self, tenant: str) -> _Account:
        account = self._accounts.get(tenant)
        if account is None:
            if len(self._accounts) >= MAX_TENANTS:
                idle = next((name for name, known in self._accounts.items() if not known.num_rows), None)
                if idle is not None:
                    del self._accounts[idle]
            account = self._accounts[tenant] = _Account(self._defaults)
        return account

    @staticmethod
    def _check_rows(account: _Account, num_rows: int) -> None:
        limit = account.limits.max_running_rows
        if limit is None or account.num_rows + num_rows <= limit:
            return
        raise QuotaExceededError(
            f"The tenant has {account.num_rows} sequences running or waiting, this request has {num_rows}, and its "
            f"quota is {limit}.",
            param="max_running_rows",
            retry_in_s=1.0,
            helps_waiting=num_rows <= limit,
        )

    @staticmethod
    def _check_rate(what: str, bucket: TokenBucket | None, amount: int, now_s: float, account: _Account) -> None:
        if bucket is None:
            return
        wait_s = bucket.wait_s(amount, now_s)
        if wait_s == 0.0:
            return
        left = max(0, int(bucket.level(now_s)))
        message = f"Rate limit reached: {bucket.per_minute} {what} a minute, {left} left, {amount} needed."
        helps_waiting = amount <= bucket.per_minute
        kind = RateLimitExceededError if helps_waiting else QuotaExceededError
        raise kind(
            message,
            param=f"{what}_per_minute",
            retry_in_s=wait_s if helps_waiting else MAX_RETRY_AFTER_S,
            helps_waiting=helps_waiting,
            more_headers=_headers(account, now_s),
        )


def _fit(bucket: TokenBucket | None, limit: int | None, now_s: float) -> TokenBucket | None:
    if limit is None:
        return None
    if bucket is None:
        return TokenBucket(limit, now_s)
    if bucket.per_minute != limit:
        bucket.set_limit(limit, now_s)
    return bucket


def _taken(bucket: TokenBucket | None, now_s: float) -> int:
    return max(0, round(bucket.per_minute - bucket.level(now_s))) if bucket is not None else 0


def _headers(account: _Account, now_s: float) -> dict[str, str]:
    """As OpenAI sends them; of limits that there are."""
    headers: dict[str, str] = {}
    for what, bucket in (("requests", account.requests), ("tokens", account.tokens)):
        if bucket is not None:
            headers[f"x-ratelimit-limit-{what}"] = str(bucket.per_minute)
            headers[f"x-ratelimit-remaining-{what}"] = str(max(0, int(bucket.level(now_s))))
            headers[f"x-ratelimit-reset-{what}"] = _duration(bucket.wait_s(bucket.per_minute, now_s))
    return headers


def _duration(seconds: float) -> str:
    """As Go writes it: `250ms`, `7s`, `1m12s`."""
    milliseconds = round(min(seconds, MAX_RESET_S) * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest_ms = divmod(milliseconds, 60_000)
    rest = f"{rest_ms / 1000:.3f}".rstrip("0").rstrip(".")
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
