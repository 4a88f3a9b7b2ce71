"""The catalog in one SQLite file: durability settings, and notice of other processes' changes.

Everything that only SQLite understands is in this module, but for how its errors read (`faults`). Writers exclude each
other by the folder's lock, which whoever opens the file holds around `changing` and `appending`.
"""

import threading
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, create_engine, event
from sqlalchemy.orm import Session

from prompt_store.database import Database
from prompt_store.faults import storage_errors

BUSY_TIMEOUT_MS = 10_000


class SqliteDatabase(Database):
    def __init__(self, file: Path) -> None:
        super().__init__(create_engine(URL.create("sqlite", database=str(file))))
        event.listen(self.engine, "connect", _set_up)
        event.listen(self.engine, "begin", _begin)
        self._write_engine = self.engine.execution_options(is_writer=True)
        self._watch_lock = threading.Lock()
        self._watch: Any = None

    def changing(self, tenant: str | None, task: str | None) -> AbstractContextManager[None]:
        # Each write is a transaction of its own: what lies between two of them is kept in order by their caller.
        return nullcontext()

    def appending(self, log: str) -> AbstractContextManager[None]:
        return nullcontext()

    def change_token(self) -> int | None:
        with storage_errors(), self._watch_lock:
            # data_version speaks of changes made by other connections, so that this one must stay the same and idle.
            if self._watch is None:
                self._watch = self.engine.raw_connection()
            cursor = self._watch.cursor()
            try:
                return int(cursor.execute("PRAGMA data_version").fetchone()[0])
            finally:
                cursor.close()

    def prepare_copy(self) -> None:
        """Nothing to do: SQLite ends nobody's transaction."""

    def finish_copy(self, session: Session) -> None:
        """Nothing to do: SQLite's next id is one above the highest."""

    def close(self) -> None:
        with self._watch_lock:
            if self._watch is not None:
                self._watch.close()
                self._watch = None
        super().close()

    def _read_session(self) -> AbstractContextManager[Session]:
        return Session(self.engine)

    def _write_session(self) -> AbstractContextManager[Session]:
        return Session(self._write_engine, expire_on_commit=False)


def _set_up(connection: Any, _record: Any) -> None:
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


def _begin(connection: Connection) -> None:
    # A writer takes the lock at once: a lock upgraded halfway fails instead of waiting.
    is_writer = connection.get_execution_options().get("is_writer", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if is_writer else "BEGIN")
