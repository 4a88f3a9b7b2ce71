"""Turns what the operating system and the database raise into the store's own errors, in one place."""

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError

from prompt_store.errors import (
    PromptStoreError,
    StorageFailed,
    StorageFull,
    StorageUnavailable,
    VersionConflict,
)

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_POSTGRESQL_DISK_FULL = "53100"
# Of PostgreSQL, when it is shutting down, starting up, out of connections, or a standby that takes no writes; beside
# the class 08, which is of connections, and errors of the driver, which have no code.
_POSTGRESQL_AWAY = ("57P01", "57P02", "57P03", "53300", "25006")


@contextmanager
def storage_errors() -> Iterator[None]:
    """Raise StorageFull, StorageFailed or VersionConflict for the OSErrors and database errors of a block."""
    try:
        yield
    except IntegrityError as error:
        raise VersionConflict(
            "Another writer changed the same task at the same moment; look again and retry."
        ) from error
    except (OSError, SQLAlchemyError, sqlite3.Error) as error:
        raise _translate(error) from error


def is_unreachable(error: BaseException) -> bool:
    """Whether it is the connection to a database server that failed, or the server that takes none."""
    if not isinstance(error, DBAPIError) or not hasattr(error.orig, "sqlstate"):
        return False
    code: str | None = getattr(error.orig, "sqlstate", None)
    if code is None:
        return error.connection_invalidated or type(error.orig).__name__ in ("OperationalError", "ConnectionTimeout")
    return code.startswith("08") or code in _POSTGRESQL_AWAY


def _translate(error: OSError | SQLAlchemyError | sqlite3.Error) -> PromptStoreError:
    if _is_full(error):
        return StorageFull("There is no space left for the prompt store; nothing was changed.")
    if is_unreachable(error):
        return StorageUnavailable("The prompt store's database cannot be reached; nothing was changed.")
    # The text of the error may hold paths and statements, which are for the log and not for clients.
    return StorageFailed(
        f"The prompt store could not be read or written ({type(error).__name__}); nothing was changed."
    )


def _is_full(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in _NO_SPACE
    cause = getattr(error, "orig", error)
    return (
        getattr(cause, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
        or getattr(cause, "sqlstate", None) == _POSTGRESQL_DISK_FULL
    )
