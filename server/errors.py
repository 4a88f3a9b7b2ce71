"""The error tree of the server: every error that a client can see.

    PromptmuxError                      500 internal_error
    ├── InvalidRequestError             400 invalid_request
    │   └── ContextLengthExceededError  400 context_length_exceeded
    ├── AuthenticationError             401 invalid_api_key
    ├── PermissionDeniedError           403 insufficient_scope
    ├── TaskNotFoundError               404 model_not_found
    ├── NotFoundError                   404 not_found
    ├── MethodNotAllowedError           405 method_not_allowed
    ├── RequestTimeoutError             408 request_timeout
    ├── ConflictError                   409 conflict            (x-should-retry: false)
    ├── PayloadTooLargeError            413 payload_too_large
    ├── UnsupportedFileError            415 unsupported_file
    ├── PromptMismatchError             422 prompt_mismatch
    ├── QuotaExceededError              429 quota_exceeded      (Retry-After)
    │   ├── RateLimitExceededError      429 rate_limit_exceeded (Retry-After)
    │   └── StorageQuotaExceededError   429 storage_quota_exceeded (Retry-After, x-should-retry: false)
    ├── UnavailableError                503 unavailable         (Retry-After)
    │   ├── QueueFullError              503 queue_full
    │   ├── LoadingError                503 loading
    │   ├── DrainingError               503 draining
    │   ├── StoreUnavailableError       503 store_unavailable
    │   └── EngineFailedError           503 engine_failed
    ├── PromptCorruptError              503 prompt_corrupt      (x-should-retry: false)
    ├── StorageFullError                507 storage_full
    ├── IsolationError                  500 isolation_violation
    └── NumericalError                  500 non_finite_logits

Each class knows its HTTP status and its OpenAI `type` and `code`; nothing else in the project chooses a status.
This module imports nothing of the project.
"""

import math
from collections.abc import Mapping
from typing import ClassVar

MAX_RETRY_AFTER_S = 30


class PromptmuxError(Exception):
    """Base of all errors that reach a client.

    `param` names the offending field of the request, or is None. `code` may be narrowed by an instance.
    `retry_after_s`, where set, becomes the `Retry-After` header; `should_retry`, where set, becomes `x-should-retry`.
    """

    status: ClassVar[int] = 500
    error_type: ClassVar[str] = "server_error"
    default_code: ClassVar[str] = "internal_error"
    retry_after_s: ClassVar[int | None] = None
    should_retry: ClassVar[bool | None] = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code if code is not None else self.default_code

    def to_body(self) -> dict[str, dict[str, str | None]]:
        """The error body of the HTTP contract: `{"error": {message, type, param, code}}`."""
        return {"error": {"message": self.message, "type": self.error_type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Headers that tell a client whether and when to try again."""
        headers: dict[str, str] = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(self.retry_after_s)
        if self.should_retry is not None:
            headers["x-should-retry"] = "true" if self.should_retry else "false"
        return headers


class InvalidRequestError(PromptmuxError):
    """A field of the request is wrong; `param` names it."""

    status = 400
    error_type = "invalid_request_error"
    default_code = "invalid_request"


class ContextLengthExceededError(InvalidRequestError):
    """Prompt tokens, virtual tokens and new tokens together do not fit the backbone."""

    default_code = "context_length_exceeded"


class AuthenticationError(PromptmuxError):
    status = 401
    error_type = "authentication_error"
    default_code = "invalid_api_key"


class PermissionDeniedError(PromptmuxError):
    status = 403
    error_type = "permission_error"
    default_code = "insufficient_scope"


class TaskNotFoundError(PromptmuxError):
    """The task, version or digest is unknown, or another tenant's: the two are not told apart."""

    status = 404
    error_type = "invalid_request_error"
    default_code = "model_not_found"


class NotFoundError(PromptmuxError):
    status = 404
    error_type = "invalid_request_error"
    default_code = "not_found"


class MethodNotAllowedError(PromptmuxError):
    status = 405
    error_type = "invalid_request_error"
    default_code = "method_not_allowed"


class RequestTimeoutError(PromptmuxError):
    """The body did not arrive in time; its connection is closed."""

    status = 408
    error_type = "invalid_request_error"
    default_code = "request_timeout"


class ConflictError(PromptmuxError):
    """A compare-and-swap was lost, or the version is active."""

    status = 409
    error_type = "conflict_error"
    default_code = "conflict"
    should_retry = False


class PayloadTooLargeError(PromptmuxError):
    status = 413
    error_type = "invalid_request_error"
    default_code = "payload_too_large"


class UnsupportedFileError(PromptmuxError):
    """The uploaded bytes are not a safetensors file that the strict header check accepts."""

    status = 415
    error_type = "invalid_request_error"
    default_code = "unsupported_file"


class PromptMismatchError(PromptmuxError):
    """The file is sound, but does not fit the backbone or its own configuration."""

    status = 422
    error_type = "invalid_request_error"
    default_code = "prompt_mismatch"


class QuotaExceededError(PromptmuxError):
    """The tenant has as much as it may have. `retry_in_s` is rounded up, to 1 to 30 s, for `Retry-After`.

    `helps_waiting` false: the same request would be refused for ever, which clients that retry by themselves are told.
    """

    status = 429
    error_type = "rate_limit_error"
    default_code = "quota_exceeded"
    retry_after_s = 1

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_in_s: float | None = None,
        helps_waiting: bool = True,
        more_headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, param=param, code=code)
        self._retry_in_s = retry_in_s
        self._helps_waiting = helps_waiting
        self._more_headers = dict(more_headers or {})

    def headers(self) -> dict[str, str]:
        headers = super().headers() | self._more_headers
        if self._retry_in_s is not None:
            headers["Retry-After"] = str(min(max(math.ceil(self._retry_in_s), 1), MAX_RETRY_AFTER_S))
        if not self._helps_waiting:
            headers["x-should-retry"] = "false"
        return headers


class RateLimitExceededError(QuotaExceededError):
    """The tenant's requests or tokens of a minute are used up."""

    default_code = "rate_limit_exceeded"


class StorageQuotaExceededError(QuotaExceededError):
    """The tenant's stored prompts, bytes or virtual tokens are used up: deleting some helps, waiting does not."""

    default_code = "storage_quota_exceeded"
    retry_after_s = MAX_RETRY_AFTER_S
    should_retry = False


class UnavailableError(PromptmuxError):
    status = 503
    error_type = "service_unavailable_error"
    default_code = "unavailable"
    retry_after_s = 1


class QueueFullError(UnavailableError):
    default_code = "queue_full"


class LoadingError(UnavailableError):
    default_code = "loading"
    retry_after_s = 5


class DrainingError(UnavailableError):
    default_code = "draining"
    retry_after_s = 5


class StoreUnavailableError(UnavailableError):
    """The database of a shared store is away: what is remembered is served, nothing can be changed."""

    default_code = "store_unavailable"
    retry_after_s = 5


class EngineFailedError(UnavailableError):
    """The step loop ended with an exception; only a restart helps."""

    default_code = "engine_failed"
    retry_after_s = 30


class PromptCorruptError(PromptmuxError):
    """The stored bytes no longer have their digest; the prompt is quarantined and never served."""

    status = 503
    error_type = "service_unavailable_error"
    default_code = "prompt_corrupt"
    should_retry = False


class StorageFullError(PromptmuxError):
    status = 507
    error_type = "server_error"
    default_code = "storage_full"


class IsolationError(PromptmuxError):
    """The plan of a step and the ledger of owners disagree: the row ends, no token of that step is delivered."""

    default_code = "isolation_violation"


class NumericalError(PromptmuxError):
    """A row's logits are not finite; that row ends, its neighbours do not notice."""

    default_code = "non_finite_logits"
