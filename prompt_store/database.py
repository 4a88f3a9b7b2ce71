"""The database behind the catalog: engine, transactions, durability settings, and notice of other processes' changes.

Everything that only SQLite understands is in this module.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import URL, Connection, create_engine, event
from sqlalchemy.orm import Session

from prompt_store.faults import storage_errors

BUSY_TIMEOUT_MS = 10_000


class Database:
    """Sessions for reading and for writing. All methods may be called from any thread."""

    def __init__(self, url: URL) -> None:
        self.engine = create_engine(url)
        self._is_sqlite = self.engine.dialect.name == "sqlite"
        if self._is_sqlite:
            event.listen(self.engine, "connect", _set_up_sqlite)
            event.listen(self.engine, "begin", _begin_sqlite)
        self._write_engine = self.engine.execution_options(is_writer=True)
        self._watch_lock = threading.Lock()
        self._watch: Any = None

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A session over one consistent snapshot. Raises StorageFailed."""
        with storage_errors(), Session(self.engine) as session:
            yield session

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """One transaction: committed durably at the end of the block, rolled back by any exception.

        Raises StorageFull or StorageFailed; VersionConflict when another writer won.
        """
        with storage_errors(), Session(self._write_engine, expire_on_commit=False) as session, session.begin():
            yield session

    def change_token(self) -> int | None:
        """A number that differs when anyone may have changed the database, in microseconds; None where unknown."""
        if not self._is_sqlite:
            return None
        with storage_errors(), self._watch_lock:
            # data_version speaks of changes made by other connections, so that this one must stay the same and idle.
            if self._watch is None:
                self._watch = self.engine.raw_connection()
            cursor = self._watch.cursor()
            try:
                return int(cursor.execute("PRAGMA data_version").fetchone()[0])
            finally:
                cursor.close()

    def close(self) -> None:
        with self._watch_lock:
            if self._watch is not None:
                self._watch.close()
                self._watch = None
        self.engine.dispose()


def _set_up_sqlite(connection: Any, _record: Any) -> None:
    # The driver must not send BEGIN by itself: it would do so too late, and never before schema changes.
    connection.isolation_level = None
    cursor = connection.cursor()
    try:
        cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute("PRAGMA foreign_keys=ON")
    finally:
        cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    # A writer takes the lock at once: a lock upgraded halfway fails instead of waiting.
    is_writer = connection.get_execution_options().get("is_writer", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if is_writer else "BEGIN")
