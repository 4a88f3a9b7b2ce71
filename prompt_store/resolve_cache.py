"""Remembers what references resolved to, so that a request costs no query. Knows nothing of SQL or files.

Entries go when this process writes (`clear`) and when another one did: either the change token shows it, looked at no
more than once a poll interval, or someone who follows the others' changes says so (`forget`).
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from prompt_store.errors import PromptStoreError
from prompt_store.manifest import PromptVersion

_log = logging.getLogger(__name__)

CacheKey = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a reference means: `version`, or `canary` for `percent` of the requests that it is asked for."""

    version: PromptVersion
    canary: PromptVersion | None = None
    percent: int = 0


class ResolveCache:
    """`change_token` returns a number that differs after foreign changes, or None where nobody can tell: everything is
    then forgotten once an interval. While `is_believable` says no, nothing is told. All methods may be called from any
    thread.
    """

    def __init__(
        self,
        change_token: Callable[[], int | None],
        *,
        max_entries: int = 65_536,
        poll_interval_s: float = 1.0,
        is_believable: Callable[[], bool] = lambda: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._is_believable = is_believable
        self._change_token = change_token
        self._max_entries = max_entries
        self._poll_interval_s = poll_interval_s
        self._clock = clock
        self._lock = threading.Lock()
        self._entries: dict[CacheKey, Resolved] = {}
        # By the task's name, whosever it is: a shared task is remembered for every tenant that asked for it.
        self._keys_of: dict[str, set[CacheKey]] = {}
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

    def get(self, key: CacheKey) -> Resolved | None:
        if self._clock() - self._last_poll >= self._poll_interval_s:
            self._poll()
        return self._entries.get(key) if self._is_believable() else None

    def peek(self, key: CacheKey) -> Resolved | None:
        """As `get`, but never looks for changes of others: None when it is time to."""
        if self._clock() - self._last_poll >= self._poll_interval_s:
            return None
        return self._entries.get(key) if self._is_believable() else None

    def put(self, key: CacheKey, resolved: Resolved, generation: int) -> None:
        with self._lock:
            if generation != self._generation:
                return
            if len(self._entries) >= self._max_entries:
                self._drop_all()
            self._entries[key] = resolved
            self._keys_of.setdefault(_task_of(key), set()).add(key)

    def clear(self) -> None:
        with self._lock:
            self._generation += 1
            self._drop_all()

    def forget(self, tasks: Collection[str]) -> None:
        """Everything about tasks of these names, of all tenants."""
        if not tasks:
            return
        with self._lock:
            self._generation += 1
            for task in tasks:
                for key in self._keys_of.pop(task, ()):
                    del self._entries[key]

    @contextlib.contextmanager
    def unaffected(self) -> Iterator[None]:
        """Around a write of this process that changes no meaning, while no other process can write: what is remembered
        stays, and the change of the token is not taken for someone else's.
        """
        with self._lock:
            self._look()
        yield
        token = self._change_token()
        with self._lock:
            self._last_token = token

    def _poll(self) -> None:
        # One thread looks; the others need not wait for it.
        if not self._lock.acquire(blocking=False):
            return
        try:
            self._look()
        except PromptStoreError:
            # A failing disk must not stop what can be answered from memory.
            _log.warning("could not look for changes of the prompt store", exc_info=True)
        finally:
            self._lock.release()

    def _look(self) -> None:
        self._last_poll = self._clock()
        token = self._change_token()
        if token is None or token != self._last_token:
            self._last_token = token
            self._generation += 1
            self._drop_all()

    def _drop_all(self) -> None:
        self._entries.clear()
        self._keys_of.clear()


def _task_of(key: CacheKey) -> str:
    return key[1].partition("@")[0]
