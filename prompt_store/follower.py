"""Follows what other replicas change in a shared store: one thread a replica, on a connection of its own.

PostgreSQL's notifications wake it within milliseconds of a commit; they are a hint, and it looks into the log of
changes (`changes`) every half second without one. When the database is away it says so, tries again until it is back,
and goes on from the change that it knew last. Knows nothing of what a change means.
"""

import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from sqlalchemy import Connection, text
from sqlalchemy.exc import SQLAlchemyError

from prompt_store.changes import NOTIFICATION_CHANNEL, Change, Mark, newest_mark, read_news
from prompt_store.faults import storage_errors
from prompt_store.postgresql import PostgresDatabase
from prompt_store.watchdog import Watchdog

POLL_INTERVAL_S = 0.5
# A look that takes longer has met a database that is no help.
LOOK_TIMEOUT_MS = 5_000
MIN_RETRY_S = 0.1
MAX_RETRY_S = 1.0
# How long its end is waited for before its connection is cut.
STOP_TIMEOUT_S = 2.0

_log = logging.getLogger(__name__)


class ChangeListener(Protocol):
    """Called on the follower's thread, in the order of commits; what it raises is logged and passed over."""

    def changed(self, changes: Sequence[Change]) -> None:
        """Other replicas made these."""
        ...

    def lost_track(self) -> None:
        """Anything may have changed."""
        ...


class Follower:
    """`clock` is what the database's `availability` goes by."""

    def __init__(
        self,
        database: PostgresDatabase,
        listener: ChangeListener,
        *,
        poll_interval_s: float = POLL_INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._availability = database.availability
        self._listener = listener
        self._poll_interval_s = poll_interval_s
        self._clock = clock
        self._engine = database.listening_engine()
        self._driver_error: type[Exception] = database.engine.dialect.loaded_dbapi.Error
        self._link: Connection | None = None
        self._mark: Mark | None = None
        self._num_reconnects = 0
        self._is_stopping = False
        # A byte here ends the wait for a notification: the database was found to be lost, or the store is closed.
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="promptmux-store-follower", daemon=True)
        self._watchdog = Watchdog(self._availability, database.sockets)

    @property
    def num_reconnects(self) -> int:
        """How often the connection was lost and made again."""
        return self._num_reconnects

    @property
    def position(self) -> int:
        """The number of the last change that was told, 0 before any."""
        mark = self._mark
        return 0 if mark is None else mark.id

    def start(self) -> None:
        """Connect, take note of how far the log is, and follow it from there. Raises StorageUnavailable."""
        with storage_errors():
            started_at_s = self._clock()
            self._link = self._connect()
            self._mark = newest_mark(self._link)
        self._availability.mark_heard()
        self._availability.mark_synced(started_at_s)
        self._availability.watch(self._wake)
        self._thread.start()
        self._watchdog.start()

    def stop(self) -> None:
        """Ends the thread and gives the connection back. May be called twice."""
        self._is_stopping = True
        self._wake()
        if self._thread.is_alive():
            self._thread.join(STOP_TIMEOUT_S)
        if self._thread.is_alive():
            # It waits for a database that hangs, as everybody else does.
            self._database.sockets.shut_down()
            self._thread.join()
        self._watchdog.stop()
        self._drop_link()
        self._engine.dispose()
        self._woken.close()
        self._waker.close()

    def _run(self) -> None:
        retry_s = MIN_RETRY_S
        while not self._is_stopping:
            try:
                if self._link is None:
                    self._link = self._connect()
                    self._num_reconnects += 1
                self._catch_up(self._link)
                retry_s = MIN_RETRY_S
                self._wait(self._link)
            except (SQLAlchemyError, OSError, self._driver_error) as error:
                if self._is_stopping:
                    return
                if self._availability.is_reachable:
                    _log.warning("the store's database is lost, going on from what is remembered: %s", _reason(error))
                self._drop_link()
                self._availability.lose()
                self._pause(retry_s)
                retry_s = min(retry_s * 2, MAX_RETRY_S)

    def _connect(self) -> Connection:
        link = self._engine.connect()
        try:
            link.execute(text(f"SET statement_timeout = {LOOK_TIMEOUT_MS}"))
            link.execute(text(f"LISTEN {NOTIFICATION_CHANNEL}"))
        except BaseException:
            link.invalidate()
            link.close()
            raise
        return link

    def _catch_up(self, link: Connection) -> None:
        """Reads on in the log until there is no more."""
        was_reachable = self._availability.is_reachable
        while True:
            started_at_s = self._clock()
            news = read_news(link, self._mark)
            # Before anything is forgotten: from now on it can be asked for again.
            self._availability.mark_heard()
            if news.is_broken:
                _log.warning("the log of changes does not go on from what was known: forgetting all that is remembered")
                self._tell(self._listener.lost_track)
            elif foreign := [change for change in news.changes if change.origin != self._database.origin]:
                self._tell(self._listener.changed, foreign)
            self._mark = news.mark
            if news.is_last:
                break
        self._availability.mark_synced(started_at_s)
        if not was_reachable:
            _log.info("the store's database is back")

    def _tell(self, call: Callable[..., None], *arguments: Any) -> None:
        try:
            call(*arguments)
        except Exception:
            _log.exception("what follows from a change of another replica failed")

    def _wait(self, link: Connection) -> None:
        """Until the database notifies, somebody wakes us, or it is time to look anyway."""
        driver: Any = link.connection.driver_connection
        # Those that came during the look lie in the driver's memory, where no wait for the socket would find them.
        if any(True for _ in driver.notifies(timeout=0)):
            return
        with selectors.DefaultSelector() as selector:
            selector.register(driver.fileno(), selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            ready = selector.select(self._poll_interval_s)
        self._calm()
        if any(key.fileobj is not self._woken for key, _ in ready):
            for _ in driver.notifies(timeout=0):
                pass

    def _pause(self, seconds: float) -> None:
        deadline_s = time.monotonic() + seconds
        while not self._is_stopping and (left_s := deadline_s - time.monotonic()) > 0:
            with selectors.DefaultSelector() as selector:
                selector.register(self._woken, selectors.EVENT_READ)
                selector.select(left_s)
            self._calm()

    def _wake(self) -> None:
        try:
            self._waker.send(b"x")
        except OSError:
            # Full, and so awake anyway, or closed.
            return

    def _calm(self) -> None:
        try:
            while self._woken.recv(64):
                pass
        except BlockingIOError:
            return

    def _drop_link(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.invalidate()
            link.close()


def _reason(error: Exception) -> str:
    """The first line of what the driver says, which names no value and no password."""
    return str(getattr(error, "orig", None) or error).partition("\n")[0]
