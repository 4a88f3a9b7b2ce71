"""Whether a shared database can be reached, and how long what is remembered of it may still be believed.

While it is known to be away, nobody waits for it: calls fail at once, and one thread (`follower`) tries to reach it
again. Knows nothing of SQL.
"""

import threading
import time
from collections.abc import Callable

from prompt_store.errors import StorageUnavailable

# Many times the interval at which the follower looks.
MAX_SILENCE_S = 5.0


class Availability:
    """All methods may be called from any thread; none blocks.

    Until `watch` is called nobody would notice that the database is back, and each call finds out for itself. After it,
    a database that let the one who watches wait for `max_silence_s` counts as away too: it hangs.
    `max_stale_s` bounds how long after the last proof of being up to date `is_believable` holds without the database.
    """

    def __init__(
        self,
        *,
        max_stale_s: float,
        max_silence_s: float = MAX_SILENCE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_stale_s = max_stale_s
        self._max_silence_s = max_silence_s
        self._clock = clock
        self._lock = threading.Lock()
        self._is_reachable = True
        self._heard_at_s = clock()
        self._synced_at_s: float | None = None
        self._on_lost: Callable[[], None] | None = None

    @property
    def is_reachable(self) -> bool:
        return self._is_reachable and not self.is_silent

    @property
    def is_silent(self) -> bool:
        """Whether the one who watches has waited for too long: the database is there, and hangs."""
        return self._on_lost is not None and self._clock() - self._heard_at_s > self._max_silence_s

    @property
    def stale_s(self) -> float:
        """How long ago all changes of others were known; 0 before anybody looked."""
        synced_at_s = self._synced_at_s
        return 0.0 if synced_at_s is None else max(self._clock() - synced_at_s, 0.0)

    def watch(self, on_lost: Callable[[], None]) -> None:
        """From now on somebody looks after the connection, and is called when it is found to be lost."""
        self._on_lost = on_lost

    def check(self) -> None:
        """Raises StorageUnavailable while the database is known to be away."""
        if not self.is_reachable:
            raise StorageUnavailable("The prompt store's database cannot be reached; nothing was changed.")

    def lose(self) -> None:
        """The database did not answer."""
        with self._lock:
            on_lost = self._on_lost
            if on_lost is None or not self._is_reachable:
                return
            self._is_reachable = False
        on_lost()

    def mark_heard(self) -> None:
        """The database answers."""
        with self._lock:
            self._heard_at_s = self._clock()
            self._is_reachable = True

    def mark_synced(self, started_at_s: float) -> None:
        """All changes that were committed before `started_at_s` are known."""
        self._synced_at_s = started_at_s

    def is_believable(self) -> bool:
        """Whether what is remembered may be served: the others' changes come in, or have not failed to for too long."""
        synced_at_s = self._synced_at_s
        if synced_at_s is None:
            return False
        return self.is_reachable or self._clock() - synced_at_s <= self._max_stale_s
