"""What other servers of one shared store change, and what that means here: pins and counts are told anew.

Owns the thread that does so, so that whoever follows the store is not kept waiting, and the metrics about the store's
database. What names mean needs nothing here: the store forgets that by itself. Refuses to know HTTP and SQL.
"""

import threading
from collections.abc import Callable, Sequence

import structlog

from prompt_store.changes import Change
from prompt_store.store import PromptStore
from server.errors import PromptmuxError
from server.metrics import Metrics

# Changes that come in quick succession are followed up together.
GATHER_S = 0.1
# After a change that could not be followed up, which the store tells once; each time twice as long.
RETRY_S = 1.0
MAX_RETRY_S = 15.0

_log = structlog.get_logger("promptmux.replicas")


class ReplicaWatch:
    """Made with a store, started once there is something to tell; all methods may be called from any thread."""

    def __init__(self, store: PromptStore, metrics: Metrics) -> None:
        self._store = store
        self._metrics = metrics
        self._changed = threading.Event()
        self._stopping = threading.Event()
        self._num_reconnects = 0
        self._counting = threading.Lock()
        self._thread: threading.Thread | None = None
        store.on_foreign_change(self._note)
        self.refresh_gauges()

    def start(self, refresh: Callable[[], None]) -> None:
        """Call `refresh` after each change of another server, on a thread of its own."""
        self._thread = threading.Thread(target=self._run, args=(refresh,), name="promptmux-replicas", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """May be called twice, and without a start."""
        self._stopping.set()
        self._changed.set()
        if self._thread is not None:
            self._thread.join()

    def refresh_gauges(self) -> None:
        """Sets the metrics of the store's database to what they are now. Never blocks for long."""
        health = self._store.health()
        self._metrics.store_reachable.set(1 if health.is_reachable else 0)
        self._metrics.store_stale_seconds.set(health.stale_s)
        self._metrics.store_position.set(health.position)
        with self._counting:
            self._metrics.store_reconnects_total.inc(health.num_reconnects - self._num_reconnects)
            self._num_reconnects = health.num_reconnects

    def _note(self, changes: Sequence[Change]) -> None:
        for change in changes:
            self._metrics.store_change_lag_seconds.observe(change.age_s)
        self._changed.set()

    def _run(self, refresh: Callable[[], None]) -> None:
        retry_s = RETRY_S
        while not self._stopping.is_set():
            self._changed.wait()
            self._stopping.wait(GATHER_S)
            self._changed.clear()
            if self._stopping.is_set():
                return
            if self._is_followed(refresh):
                retry_s = RETRY_S
                continue
            self._stopping.wait(retry_s)
            retry_s = min(retry_s * 2, MAX_RETRY_S)
            self._changed.set()

    def _is_followed(self, refresh: Callable[[], None]) -> bool:
        try:
            refresh()
        except PromptmuxError as error:
            # The store is away again.
            _log.warning("replica_change_not_followed", error=error.message)
            return False
        except Exception:
            _log.exception("replica_change_not_followed")
            return False
        return True
