"""The database behind the catalog: sessions for reading, for writing, and for changes made of several writes.

Owns what a session is, whichever database it speaks to. What only SQLite understands is in `sqlite`, what only
PostgreSQL does in `postgresql`; nothing else in the store asks which of the two it is.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from prompt_store.faults import storage_errors


class Database(ABC):
    """Sessions for reading and for writing. All methods may be called from any thread."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A session over one consistent snapshot; inside `changing`, over what the change has made so far.

        Raises StorageFailed.
        """
        with storage_errors(), self._read_session() as session:
            yield session

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """One transaction: committed durably at the end of the block, rolled back by any exception; inside `changing`,
        a part of the change, which alone is rolled back.

        Raises StorageFull or StorageFailed; VersionConflict when another writer won.
        """
        with storage_errors(), self._write_session() as session, session.begin():
            yield session

    @abstractmethod
    def changing(self, tenant: str | None, task: str | None) -> AbstractContextManager[None]:
        """Around the reads and writes of one change, which other writers do not come between. Not reentrant.

        `tenant` and `task` are whose meaning it changes; `task` is None for what else a tenant has, and both are for
        what no tenant's name tells of, such as keys and quotas.
        """

    @abstractmethod
    def appending(self, log: str) -> AbstractContextManager[None]:
        """Around a write that changes no name's meaning and adds to `log`: ids of one log are visible in their order,
        so that whoever follows it by id misses none. Not reentrant.
        """

    @abstractmethod
    def change_token(self) -> int | None:
        """A number that differs when anyone may have changed the database, in microseconds; None where unknown."""

    @abstractmethod
    def prepare_copy(self) -> None:
        """Inside `changing`, before a whole store is read or put in: it may rest while the other side is busy."""

    @abstractmethod
    def finish_copy(self, session: Session) -> None:
        """After rows were put in with ids of their own: new ones get higher ids."""

    def close(self) -> None:
        self.engine.dispose()

    @abstractmethod
    def _read_session(self) -> AbstractContextManager[Session]: ...

    @abstractmethod
    def _write_session(self) -> AbstractContextManager[Session]: ...
