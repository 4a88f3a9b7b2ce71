"""The one table that turns the store's errors into errors that a client sees."""

from collections.abc import Iterator
from contextlib import contextmanager

from prompt_store import errors as store
from server.errors import (
    ConflictError,
    InvalidRequestError,
    NotFoundError,
    PayloadTooLargeError,
    PromptCorruptError,
    PromptMismatchError,
    PromptmuxError,
    QuotaExceededError,
    StorageFullError,
    StorageQuotaExceededError,
    StoreUnavailableError,
    TaskNotFoundError,
    UnavailableError,
    UnsupportedFileError,
)

# The class, and a code narrower than the class' own. Looked up along the error's bases, most special first.
_TABLE: dict[type[store.PromptStoreError], tuple[type[PromptmuxError], str | None]] = {
    store.InvalidValue: (InvalidRequestError, "invalid_value"),
    store.InvalidName: (InvalidRequestError, "invalid_name"),
    store.InvalidConfig: (InvalidRequestError, "invalid_config"),
    store.UnsupportedFile: (UnsupportedFileError, None),
    store.FileTooLarge: (PayloadTooLargeError, None),
    store.PromptMismatch: (PromptMismatchError, None),
    store.TaskNotFound: (TaskNotFoundError, None),
    store.KeyNotFound: (NotFoundError, None),
    store.TrainingNotFound: (NotFoundError, None),
    store.VersionConflict: (ConflictError, "version_conflict"),
    store.VersionActive: (ConflictError, "version_active"),
    store.GateNotPassed: (ConflictError, "gate_not_passed"),
    store.QuotaExceeded: (StorageQuotaExceededError, None),
    store.TooManyJobs: (QuotaExceededError, "too_many_jobs"),
    store.PromptCorrupt: (PromptCorruptError, None),
    store.StorageFull: (StorageFullError, None),
    store.StoreInUse: (UnavailableError, "storage_failed"),
    store.StorageFailed: (UnavailableError, "storage_failed"),
    store.StorageUnavailable: (StoreUnavailableError, None),
}


def to_client_error(error: store.PromptStoreError) -> PromptmuxError:
    """The error that a client sees. One that the table does not know becomes a 500 that tells nothing."""
    for kind in type(error).__mro__:
        if kind in _TABLE:
            made, code = _TABLE[kind]
            return made(error.message, param=error.param, code=code)
    return PromptmuxError("The prompt store failed.")


@contextmanager
def client_errors() -> Iterator[None]:
    """Translates what the store raises inside."""
    try:
        yield
    except store.PromptStoreError as error:
        raise to_client_error(error) from error
