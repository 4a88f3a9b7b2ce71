"""The store as every door of it sees it: opened, changed, given back.

Owns the parts that the doors work with, the order in which they are opened and closed, and what happens when another
replica has changed something. Knows nothing of what prompts, tasks or keys may do: that is for the classes that build
on it.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from prompt_store.catalog import Catalog
from prompt_store.changes import Change
from prompt_store.custody import Custody
from prompt_store.errors import StorageFailed
from prompt_store.home import Following, Home
from prompt_store.last_known import LastKnown
from prompt_store.location import Location
from prompt_store.manifest import BackboneShape, StoreLimits
from prompt_store.opening import MAX_STALE_S, open_home
from prompt_store.resolve_cache import ResolveCache

ForeignChangeListener = Callable[[Sequence[Change]], None]
"""Gets what other replicas changed, in the order of their commits; nothing in it: anything may have changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreHealth:
    """How a store stands to its database. A folder's is always reachable and never stale.

    `position` is the number of the last change of the shared store that is known here, 0 before any.
    """

    is_reachable: bool = True
    stale_s: float = 0.0
    num_reconnects: int = 0
    position: int = 0


class StoreBase:
    """All methods may be called from any thread."""

    def __init__(self, home: Home, *, backbone: BackboneShape | None, limits: StoreLimits) -> None:
        self.root = home.root
        self.limits = limits
        self._home = home
        self._database = home.database
        self._blobs = home.blobs
        self._backbone = backbone
        self._is_closed = False
        self._listeners: tuple[ForeignChangeListener, ...] = ()
        self._catalog = Catalog(home.database)
        self._custody = Custody(self._catalog, home.blobs, self._changing)
        self._cache, self._last_known = _make_memories(home)
        self._follower: Following | None = None if home.follow is None else home.follow(self)
        if self._follower is not None:
            try:
                self._follower.start()
            except BaseException:
                self._follower.stop()
                raise
        if home.sweeps:
            self._custody.sweep()

    @classmethod
    def open(
        cls,
        location: Location,
        *,
        backbone: BackboneShape | None = None,
        limits: StoreLimits | None = None,
        exclusive: bool = True,
        max_stale_s: float = MAX_STALE_S,
    ) -> Self:
        """Open the store in a folder, or at the URL of a PostgreSQL database; made and migrated if need be.

        `exclusive` is for who serves it. A folder is then this process's until `close`, and leftovers of interrupted
        writes are swept; a database is shared, and other replicas' changes are followed. Without, the store is opened
        beside those who serve it. `max_stale_s`: how long a database that is away is answered for from memory.

        Raises StoreInUse, StorageUnavailable, StorageFailed or StorageFull; InvalidValue for a URL that is none.
        """
        home = open_home(location, exclusive=exclusive, max_stale_s=max_stale_s)
        with contextlib.ExitStack() as undo:
            undo.callback(home.close)
            store = cls(home, backbone=backbone, limits=limits or StoreLimits())
            undo.pop_all()
        return store

    def close(self) -> None:
        """Give the store back. A second call does nothing."""
        if not self._is_closed:
            self._is_closed = True
            if self._follower is not None:
                self._follower.stop()
            self._home.close()

    def on_foreign_change(self, listener: ForeignChangeListener) -> None:
        """Have `listener` called, on a thread that must not be kept waiting, when other replicas changed something."""
        self._listeners = (*self._listeners, listener)

    def health(self) -> StoreHealth:
        """Never blocks."""
        if self._home.availability is None or self._follower is None:
            return StoreHealth()
        return StoreHealth(
            is_reachable=self._home.availability.is_reachable,
            stale_s=self._home.availability.stale_s,
            num_reconnects=self._follower.num_reconnects,
            position=self._follower.position,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # What the follower tells (follower.ChangeListener)

    def changed(self, changes: Sequence[Change]) -> None:
        self._forget([(change.tenant, change.task) for change in changes])
        for listener in self._listeners:
            listener(changes)

    def lost_track(self) -> None:
        self._cache.clear()
        self._last_known.forget()
        for listener in self._listeners:
            listener(())

    # Inside

    @contextlib.contextmanager
    def _changing(self, tenant: str | None = None, task: str | None = None) -> Iterator[None]:
        """Around one change, which other writers do not come between: of that task's meaning, or of what else that
        tenant has; with neither, of anything, such as keys and quotas.
        """
        self._check_open()
        has_begun = False
        with self._home.excluding:
            try:
                with self._database.changing(tenant, task):
                    has_begun = True
                    yield
            finally:
                # One that was refused changed nothing: while the database is away, what is known has to last.
                if has_begun:
                    self._forget([(tenant, task)])

    def _forget(self, changed: Sequence[tuple[str | None, str | None]]) -> None:
        """What is remembered of these tenants' tasks; of all keys and quotas where it is no tenant's."""
        self._cache.forget({task for _, task in changed if task is not None})
        if any(tenant is None for tenant, _ in changed):
            self._last_known.forget()

    @contextlib.contextmanager
    def _appending(self, log: str) -> Iterator[None]:
        """Around a write that changes no name's meaning and adds to a log that is followed by its ids."""
        self._check_open()
        with self._home.excluding, self._cache.unaffected(), self._database.appending(log):
            yield

    def _check_open(self) -> None:
        if self._is_closed:
            raise StorageFailed("The prompt store is closed.")


def _make_memories(home: Home) -> tuple[ResolveCache, LastKnown]:
    if home.follow is None or home.availability is None:
        return ResolveCache(home.database.change_token), LastKnown(lambda: False)
    is_believable = home.availability.is_believable
    # The follower says what to forget: there is nothing to poll.
    cache = ResolveCache(lambda: 0, poll_interval_s=float("inf"), is_believable=is_believable)
    return cache, LastKnown(is_believable)
