"""Remembers what references resolved to, so that a request costs no query. Knows nothing of SQL or files.

Entries go when this process writes (`clear`) and when the change token shows that another one did, looked at no more
than once a poll interval.
"""

import logging
import threading
import time
from collections.abc import Callable

from prompt_store.errors import PromptStoreError
from prompt_store.manifest import PromptVersion

_log = logging.getLogger(__name__)

CacheKey = tuple[str, str]


class ResolveCache:
    """`change_token` returns a number that differs after foreign changes, or None where nobody can tell: everything is
    then forgotten once an interval. All methods may be called from any thread."""

    def __init__(
        self,
        change_token: Callable[[], int | None],
        *,
        max_entries: int = 65_536,
        poll_interval_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._change_token = change_token
        self._max_entries = max_entries
        self._poll_interval_s = poll_interval_s
        self._clock = clock
        self._lock = threading.Lock()
        self._entries: dict[CacheKey, PromptVersion] = {}
        self._generation = 0
        self._last_poll = clock()
        self._last_token = change_token()

    @property
    def generation(self) -> int:
        """Take it before reading the database; `put` refuses what was read in an older one."""
        return self._generation

    @property
    def num_entries(self) -> int:
        return len(self._entries)

    def get(self, key: CacheKey) -> PromptVersion | None:
        if self._clock() - self._last_poll >= self._poll_interval_s:
            self._poll()
        return self._entries.get(key)

    def put(self, key: CacheKey, version: PromptVersion, generation: int) -> None:
        with self._lock:
            if generation != self._generation:
                return
            if len(self._entries) >= self._max_entries:
                self._entries.clear()
            self._entries[key] = version

    def clear(self) -> None:
        with self._lock:
            self._generation += 1
            self._entries.clear()

    def _poll(self) -> None:
        # One thread looks; the others need not wait for it.
        if not self._lock.acquire(blocking=False):
            return
        try:
            self._last_poll = self._clock()
            token = self._change_token()
            if token is None or token != self._last_token:
                self._last_token = token
                self._generation += 1
                self._entries.clear()
        except PromptStoreError:
            # A failing disk must not stop what can be answered from memory.
            _log.warning("could not look for changes of the prompt store", exc_info=True)
        finally:
            self._lock.release()
