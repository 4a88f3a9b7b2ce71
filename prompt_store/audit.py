"""The append-only audit log. An entry is written in the transaction of what it tells of, so that the two never part."""

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from prompt_store.database import Database
from prompt_store.manifest import AuditEntry
from prompt_store.models import AuditRow

_PAGE = 500


def append_audit(
    session: Session,
    tenant: str,
    *,
    actor: str,
    action: str,
    task: str | None = None,
    version: int | None = None,
    digest: str | None = None,
    detail: Mapping[str, Any] | None = None,
) -> None:
    """Add an entry to a transaction that the caller commits."""
    session.add(
        AuditRow(
            at=datetime.now(UTC),
            tenant=tenant,
            actor=actor,
            action=action,
            task=task,
            version=version,
            digest=digest,
            detail=dict(detail or {}),
        )
    )


def iter_audit(database: Database, tenant: str | None, after: int, task: str | None = None) -> Iterator[AuditEntry]:
    """Entries with an id above `after`, oldest first, that match all that is given. Holds no transaction."""
    while True:
        query = select(AuditRow).where(AuditRow.id > after).order_by(AuditRow.id).limit(_PAGE)
        if tenant is not None:
            query = query.where(AuditRow.tenant == tenant)
        if task is not None:
            query = query.where(AuditRow.task == task)
        with database.reading() as session:
            rows = list(session.scalars(query))
        yield from map(_to_entry, rows)
        if len(rows) < _PAGE:
            return
        after = rows[-1].id


def _to_entry(row: AuditRow) -> AuditEntry:
    return AuditEntry(
        id=row.id,
        at=row.at,
        tenant=row.tenant,
        actor=row.actor,
        action=row.action,
        task=row.task,
        version=row.version,
        digest=row.digest,
        detail=MappingProxyType(row.detail),
    )
