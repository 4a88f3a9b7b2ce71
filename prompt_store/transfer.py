"""Moves a whole store to another home: from a folder to PostgreSQL, back, or to another of the same kind.

All or nothing: the target is empty before, and holds everything after, with the numbers, times and ids that it had. Its
rows become visible in one transaction, after they were read back and found equal and every blob was found to have its
digest. A copy that was interrupted leaves an empty target, to which it can be repeated. The source stays as it is, and
takes no changes meanwhile.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Table, insert, or_, select
from sqlalchemy.orm import Session

from prompt_store.blobs import BlobStore
from prompt_store.catalog import Catalog
from prompt_store.errors import InvalidValue, PromptCorrupt, StorageFailed
from prompt_store.faults import storage_errors
from prompt_store.home import Home
from prompt_store.location import Location
from prompt_store.models import Base, TaskRow, VersionRow
from prompt_store.opening import open_home

_PAGE = 500
_MAX_NAMED = 3

Progress = Callable[[str, int, int], None]
"""What is being copied, how much of it has been, and how much there is."""


class _DamagedBlob(PromptCorrupt):
    """Bytes that are needed have changed or are missing."""

    def __init__(self, message: str, digest: str) -> None:
        super().__init__(message)
        self.digest = digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Transferred:
    """`num_rows` by table. `damaged` are digests of quarantined versions whose bytes were not there to be copied."""

    num_rows: dict[str, int]
    num_blobs: int
    num_bytes: int
    damaged: tuple[str, ...]


def transfer(source: Location, target: Location, *, progress: Progress = lambda what, done, total: None) -> Transferred:
    """Copy everything. Raises InvalidValue for a target that holds anything, PromptCorrupt for a damaged blob of a
    version that is not quarantined, StoreInUse for a folder that is being served, or what opening the stores raises.
    """
    if source == target:
        raise InvalidValue("The store to move to is the one to move from.", param="to")
    with storage_errors(), contextlib.ExitStack() as opened:
        old, new = (_open(location, opened) for location in (source, target))
        return _copy(old, new, progress)


def _open(location: Location, opened: contextlib.ExitStack) -> Home:
    """With no other writer until it is closed."""
    home = open_home(location, exclusive=True)
    opened.callback(home.close)
    opened.enter_context(home.excluding)
    opened.enter_context(home.database.changing(None, None))
    home.database.prepare_copy()
    return home


def _copy(old: Home, new: Home, progress: Progress) -> Transferred:
    with old.database.reading() as reader, new.database.writing() as writer:
        _check_empty(writer)
        digests, quarantined = _referenced(old, reader)
        # Before the rows: in a folder, bytes that nothing refers to are swept, and rows without bytes are damage.
        try:
            num_bytes, damaged = _copy_blobs(old.blobs, new.blobs, sorted(digests), quarantined, progress)
        except _DamagedBlob as error:
            raise PromptCorrupt(f"{error.message} {_needed_by(reader, error.digest)}") from error
        num_rows = {}
        for number, table in enumerate(Base.metadata.sorted_tables):
            progress("tables", number, len(Base.metadata.sorted_tables))
            sent, num_rows[table.name] = _copy_table(table, reader, writer)
            if _digest_of(table, writer) != sent:
                raise StorageFailed(f"The rows of {table.name} were not the same when they were read back.")
        new.database.finish_copy(writer)
    return Transferred(
        num_rows=num_rows, num_blobs=len(digests) - len(damaged), num_bytes=num_bytes, damaged=tuple(damaged)
    )


def _check_empty(session: Session) -> None:
    for table in Base.metadata.sorted_tables:
        if session.execute(select(table).limit(1)).first() is not None:
            raise InvalidValue(f"The store to move to is not empty: it has {table.name}.", param="to")


def _referenced(home: Home, session: Session) -> tuple[set[str], set[str]]:
    """All digests that are referred to, and those to which only quarantined versions refer."""
    digests = Catalog(home.database).all_digests()
    columns = (VersionRow.digest, VersionRow.config_digest, VersionRow.probes_digest)
    whole = session.execute(select(*columns).where(VersionRow.quarantined_at.is_(None)))
    broken = session.execute(select(*columns).where(VersionRow.quarantined_at.is_not(None)))
    return digests, {digest for row in broken for digest in row} - {digest for row in whole for digest in row}


def _needed_by(session: Session, digest: str) -> str:
    columns = (VersionRow.digest, VersionRow.config_digest, VersionRow.probes_digest)
    query = select(TaskRow.name, VersionRow.version, TaskRow.tenant).join(VersionRow, VersionRow.task_id == TaskRow.id)
    query = query.where(or_(*(column == digest for column in columns))).order_by(TaskRow.id, VersionRow.version)
    found = session.execute(query.limit(_MAX_NAMED)).all()
    if not found:
        return "A file of training examples needs them."
    return f"Needed by {', '.join(f'{name}@{version} of {tenant}' for name, version, tenant in found)}."


def _copy_blobs(
    old: BlobStore, new: BlobStore, digests: list[str], quarantined: set[str], progress: Progress
) -> tuple[int, list[str]]:
    num_bytes, damaged = 0, []
    for number, digest in enumerate(digests):
        progress("blobs", number, len(digests))
        try:
            data = old.get(digest)
        except PromptCorrupt as error:
            if digest not in quarantined:
                raise _DamagedBlob(error.message, digest) from error
            # Nothing serves it, and uploading it again repairs it there as here.
            damaged.append(digest)
            continue
        new.put(data)
        new.get(digest)
        num_bytes += len(data)
    return num_bytes, damaged


def _copy_table(table: Table, reader: Session, writer: Session) -> tuple[bytes, int]:
    digest, num_rows = hashlib.sha256(), 0
    for rows in _pages(table, reader):
        writer.execute(insert(table), rows)
        digest.update(_canonical(rows))
        num_rows += len(rows)
    return digest.digest(), num_rows


def _digest_of(table: Table, session: Session) -> bytes:
    digest = hashlib.sha256()
    for rows in _pages(table, session):
        digest.update(_canonical(rows))
    return digest.digest()


def _pages(table: Table, session: Session) -> Iterator[list[dict[str, Any]]]:
    """All rows in the order of their keys, a page at a time."""
    (key,) = table.primary_key
    after: Any = None
    while True:
        query = select(table).order_by(key).limit(_PAGE)
        rows = [dict(row) for row in session.execute(query if after is None else query.where(key > after)).mappings()]
        if rows:
            yield rows
        if len(rows) < _PAGE:
            return
        after = rows[-1][key.name]


def _canonical(rows: list[dict[str, Any]]) -> bytes:
    return "\n".join(repr(sorted(row.items())) for row in rows).encode("utf-8", "surrogatepass")
