"""The log of changes of a shared store: what replicas read to learn what the others did. It is the truth; a
notification only says that a look is worth while.

A serial column would not do: it numbers rows when they are inserted, and rows become visible when they are committed.
Of two interleaved transactions the one with the higher number may commit first; a reader that has seen it never looks
below it again, and misses the other. Here a change takes a lock before its first statement and keeps it until its
commit is visible (PostgreSQL releases a transaction's locks after that), and gives itself the highest number so far
plus one. So numbers are visible in their order, and without a gap: not even a rolled-back change leaves one. A reader
asks from the last row that it knows on. When that row does not come back as it was, the log was cut or the database
was restored to another past, and the reader forgets everything that it remembers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, delete, func, insert, select

from prompt_store.shared_models import ChangeRow

NOTIFICATION_CHANNEL = "promptmux_changes"

# A replica that was away for longer forgets all that it remembers, which costs it a look at the database a name.
NUM_KEPT = 10_000
_CUT_EVERY = 100
_PAGE = 1_000


@dataclass(frozen=True, slots=True)
class Change:
    """`age_s` is how long ago it was made when it was read, by the database's clock."""

    id: int
    at: datetime
    origin: str
    tenant: str | None
    task: str | None
    age_s: float


@dataclass(frozen=True, slots=True)
class Mark:
    """How far a reader has come: the last change that it knows."""

    id: int
    at: datetime
    origin: str


@dataclass(frozen=True, slots=True)
class News:
    """What came after a mark. `is_broken`: the log does not go on from there. `is_last`: there is no more for now."""

    changes: tuple[Change, ...]
    mark: Mark | None
    is_broken: bool = False
    is_last: bool = True


def append_change(connection: Connection, origin: str, tenant: str | None, task: str | None) -> None:
    """The last statements of a change, which holds the lock. Whoever listens is told when it commits."""
    newest = connection.scalar(select(func.max(ChangeRow.id))) or 0
    connection.execute(
        insert(ChangeRow).values(id=newest + 1, at=func.clock_timestamp(), origin=origin, tenant=tenant, task=task)
    )
    if (newest + 1) % _CUT_EVERY == 0:
        connection.execute(delete(ChangeRow).where(ChangeRow.id <= newest + 1 - NUM_KEPT))
    connection.execute(select(func.pg_notify(NOTIFICATION_CHANNEL, "")))


def newest_mark(connection: Connection) -> Mark | None:
    """None for a log without a change."""
    query = select(ChangeRow.id, ChangeRow.at, ChangeRow.origin).order_by(ChangeRow.id.desc()).limit(1)
    row = connection.execute(query).first()
    return None if row is None else Mark(*row)


def read_news(connection: Connection, mark: Mark | None) -> News:
    """What came after `mark`, a page at most."""
    age = func.extract("epoch", func.clock_timestamp() - ChangeRow.at)
    query = select(ChangeRow.id, ChangeRow.at, ChangeRow.origin, ChangeRow.tenant, ChangeRow.task, age.label("age_s"))
    query = query.where(ChangeRow.id >= (0 if mark is None else mark.id)).order_by(ChangeRow.id).limit(_PAGE + 1)
    rows = connection.execute(query).all()
    if not _goes_on(mark, rows):
        return News((), newest_mark(connection), is_broken=True)
    new = rows if mark is None else rows[1:]
    changes = tuple(Change(row.id, row.at, row.origin, row.tenant, row.task, max(float(row.age_s), 0.0)) for row in new)
    last = Mark(changes[-1].id, changes[-1].at, changes[-1].origin) if changes else mark
    return News(changes, last, is_last=len(rows) <= _PAGE)


def _goes_on(mark: Mark | None, rows: Sequence[Any]) -> bool:
    if mark is None:
        return not rows or rows[0].id == 1
    return bool(rows) and (rows[0].id, rows[0].at, rows[0].origin) == (mark.id, mark.at, mark.origin)
