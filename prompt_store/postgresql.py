"""The catalog in PostgreSQL, shared by several replicas: connections, transactions, and one change at a time.

A change (an upload, a roll-out, a deletion) is one transaction however many reads and writes it consists of: the bytes,
the rows and the line in the log of changes become visible together, or not at all. All changes of all replicas exclude
each other by one advisory lock, which is taken before the first statement: a blob is never collected while another
writer is about to refer to it, and the log's order is that of the commits (`changes`). Under the lock READ COMMITTED
sees all that was committed before, so that no change ever meets a serialization failure, and, since it is the first
lock that each takes, none a deadlock: there is nothing to retry but what the caller was told has failed.

Everything that only PostgreSQL understands is in this module, `changes`, `follower` and `database_blobs`, but for how
its errors read (`faults`). The driver (psycopg 3) is an extra: it is imported when a database is opened, by SQLAlchemy.
"""

import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import URL, Connection, Engine, NullPool, QueuePool, create_engine, event, func, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from prompt_store.availability import Availability
from prompt_store.changes import append_change
from prompt_store.database import Database
from prompt_store.errors import StorageFailed, StorageUnavailable
from prompt_store.faults import is_unreachable, storage_errors
from prompt_store.models import Base
from prompt_store.watchdog import OpenSockets

# The server asks from a handful of threads, and one of them at most is making a change.
POOL_SIZE = 8
POOL_TIMEOUT_S = 5.0
# As long as a writer waits for SQLite's lock.
LOCK_TIMEOUT_S = 10.0
# The largest file, written over a slow network. A replica that hangs in a change loses its lock after the second.
STATEMENT_TIMEOUT_S = 60.0
IDLE_TIMEOUT_S = 30.0
CONNECT_TIMEOUT_S = 5
# How long those that are in the middle of something have when the store is closed.
CLOSE_TIMEOUT_S = 5.0
# How long a peer that does not acknowledge what was sent counts as there: a cut cable looks like that.
SILENT_PEER_TIMEOUT_S = 5

# Keys of PostgreSQL's advisory locks, in this database alone: "prmx", and which lock it is.
_LOCK_CLASS = 0x70726D78
_CHANGES_LOCK = 1
_MIGRATION_LOCK = 2
_LOG_LOCKS = {"audit": _CHANGES_LOCK, "training": _CHANGES_LOCK, "receipts": 3}

_UNKNOWN_OUTCOME = (
    "The prompt store's database was lost at the moment when it was to make a change: the change may have been made. "
    "Look before you repeat it."
)


@dataclass(slots=True)
class _Held:
    """The transaction that this thread's sessions are part of."""

    connection: Connection
    has_written: bool = False


class PostgresDatabase(Database):
    def __init__(self, url: URL, availability: Availability) -> None:
        super().__init__(_make_engine(url))
        self.availability = availability
        # Who made a change: a replica need not be told of its own.
        self.origin = _new_origin()
        self._url = url
        self._readers = self.engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        self.sockets = OpenSockets()
        event.listen(self.engine, "connect", self._note_socket)
        self._own_lock = threading.Lock()
        self._local = threading.local()

    @contextmanager
    def changing(self, tenant: str | None, task: str | None) -> Iterator[None]:
        with self._holding(_CHANGES_LOCK) as held:
            yield
            if held.has_written:
                append_change(held.connection, self.origin, tenant, task)

    @contextmanager
    def appending(self, log: str) -> Iterator[None]:
        with self._holding(_LOG_LOCKS[log]):
            yield

    @contextmanager
    def migrating(self) -> Iterator[Engine]:
        """Around an upgrade of the schema, which other replicas that start at the same time wait for."""
        with self._guarded(), self._alone() as engine, engine.connect() as connection, connection.begin():
            _lock(connection, _MIGRATION_LOCK)
            yield engine

    def listening_engine(self) -> Engine:
        """For connections that stay open beside the pool, each statement a transaction of its own."""
        engine = _make_engine(self._url, is_pooled=False)
        event.listen(engine, "connect", self._note_socket)
        return engine.execution_options(isolation_level="AUTOCOMMIT")

    def change_token(self) -> int | None:
        return None

    def prepare_copy(self) -> None:
        held = self._held
        assert held is not None, "a copy is a change"
        held.connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))

    def finish_copy(self, session: Session) -> None:
        for table in Base.metadata.sorted_tables:
            for column in table.primary_key:
                sequence = session.scalar(select(func.pg_get_serial_sequence(table.name, column.name)))
                if sequence is not None:
                    highest = session.scalar(select(func.max(column)))
                    if highest is not None:
                        session.execute(select(func.setval(sequence, highest)))

    def close(self) -> None:
        """Waits for those that are in the middle of something, but not for ever: the database may hang."""
        pool = self.engine.pool
        assert isinstance(pool, QueuePool)
        deadline_s = time.monotonic() + CLOSE_TIMEOUT_S
        while pool.checkedout() > 0 and time.monotonic() < deadline_s:
            time.sleep(0.02)
        super().close()
        self.sockets.shut_down()

    @contextmanager
    def _read_session(self) -> Iterator[Session]:
        held = self._held
        if held is not None:
            with _part_of(held) as session:
                yield session
            return
        with self._guarded(), Session(self._readers) as session:
            yield session

    @contextmanager
    def _write_session(self) -> Iterator[Session]:
        held = self._held
        if held is not None:
            held.has_written = True
            with _part_of(held) as session:
                yield session
            return
        with self._guarded(), Session(self.engine, expire_on_commit=False) as session:
            yield session

    def _note_socket(self, connection: Any, _record: Any) -> None:
        self.sockets.add(connection.fileno())

    @property
    def _held(self) -> _Held | None:
        return getattr(self._local, "held", None)

    @contextmanager
    def _holding(self, lock: int) -> Iterator[_Held]:
        """One transaction under an advisory lock, which this thread's sessions are part of until it is committed."""
        assert self._held is None, "a change is not made inside another"
        with self._guarded(), self._in_turn(lock), self.engine.connect() as connection:
            transaction = connection.begin()
            try:
                _lock(connection, lock)
                self._local.held = held = _Held(connection)
                yield held
            except BaseException:
                if not connection.invalidated:
                    transaction.rollback()
                raise
            finally:
                self._local.held = None
            try:
                transaction.commit()
            except BaseException as error:
                # A commit that was sent may yet be carried out. Should it be, it is news here as everywhere else.
                self.origin = _new_origin()
                if isinstance(error, DBAPIError) and is_unreachable(error):
                    raise StorageUnavailable(_UNKNOWN_OUTCOME) from error
                raise

    @contextmanager
    def _in_turn(self, lock: int) -> Iterator[None]:
        """Of this process' threads one waits in the database: the others would take its connections from readers."""
        if lock != _CHANGES_LOCK:
            yield
            return
        if not self._own_lock.acquire(timeout=LOCK_TIMEOUT_S):
            raise StorageFailed("The prompt store is busy with other changes; nothing was changed.")
        try:
            yield
        finally:
            self._own_lock.release()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        self.availability.check()
        try:
            with storage_errors():
                yield
        except StorageUnavailable:
            self.availability.lose()
            raise

    @contextmanager
    def _alone(self) -> Iterator[Engine]:
        engine = _make_engine(self._url, is_pooled=False, is_patient=True)
        try:
            yield engine
        finally:
            engine.dispose()


def _new_origin() -> str:
    return uuid.uuid4().hex


def _part_of(held: _Held) -> AbstractContextManager[Session]:
    return Session(held.connection, expire_on_commit=False, join_transaction_mode="create_savepoint")


def _lock(connection: Connection, lock: int) -> None:
    connection.execute(select(func.pg_advisory_xact_lock(_LOCK_CLASS, lock)))


def _make_engine(url: URL, *, is_pooled: bool = True, is_patient: bool = False) -> Engine:
    """`is_patient`: statements may take as long as they need."""
    arguments = _connect_arguments(url, is_patient=is_patient)
    # An error's text goes to the log: never with what tenants stored.
    options: dict[str, Any] = {"connect_args": arguments, "hide_parameters": True}
    try:
        if not is_pooled:
            return create_engine(url, poolclass=NullPool, **options)
        return create_engine(
            url, pool_size=POOL_SIZE, max_overflow=0, pool_timeout=POOL_TIMEOUT_S, pool_pre_ping=True, **options
        )
    except ModuleNotFoundError as error:
        raise StorageFailed(
            "PostgreSQL needs the driver psycopg 3, which is not installed: pip install 'promptmux[postgres]'."
        ) from error


def _connect_arguments(url: URL, *, is_patient: bool) -> dict[str, Any]:
    """What libpq is told; what the URL says itself wins."""
    timeouts = {
        "lock_timeout": 0 if is_patient else LOCK_TIMEOUT_S,
        "statement_timeout": 0 if is_patient else STATEMENT_TIMEOUT_S,
        "idle_in_transaction_session_timeout": 0 if is_patient else IDLE_TIMEOUT_S,
    }
    given = url.query.get("options", "")
    options = " ".join(f"-c {name}={int(seconds * 1000)}" for name, seconds in timeouts.items())
    arguments: dict[str, Any] = {
        "application_name": "promptmux",
        "connect_timeout": CONNECT_TIMEOUT_S,
        "keepalives_idle": SILENT_PEER_TIMEOUT_S,
        "keepalives_interval": 1,
        "keepalives_count": 3,
        "tcp_user_timeout": SILENT_PEER_TIMEOUT_S * 1000,
        # Of several hosts, the one that takes writes: a standby that was promoted is found by itself.
        "target_session_attrs": "read-write",
    }
    arguments = {name: value for name, value in arguments.items() if name not in url.query}
    return arguments | {"options": f"{options} {given if isinstance(given, str) else ' '.join(given)}".strip()}
