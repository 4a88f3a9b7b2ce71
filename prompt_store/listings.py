"""What a tenant can see: its own tasks, and those of the shared tenant whose names it never had itself.

Owns that rule and pages of constant cost: a page is one walk along the index of names, however many tasks there are.
"""

from typing import Any, TypeVar

from sqlalchemy import Select, exists
from sqlalchemy.orm import aliased

from prompt_store import rows
from prompt_store.database import Database
from prompt_store.manifest import PromptVersion, Task
from prompt_store.models import TaskRow, VersionRow
from prompt_store.names import SHARED_TENANT, not_found

SeenTask = tuple[Task, PromptVersion | None]
"""A task and its active version."""


Q = TypeVar("Q", bound=Select[Any])


class Listings:
    def __init__(self, database: Database) -> None:
        self._database = database

    def get_visible(self, tenant: str, task: str) -> SeenTask:
        """Raises TaskNotFound. A name that the tenant has deleted hides the shared one for good."""
        with self._database.reading() as session:
            row = rows.find_task(session, tenant, task)
            if row is None and tenant != SHARED_TENANT:
                row = rows.find_task(session, SHARED_TENANT, task)
            if row is None or row.deleted_at is not None:
                raise not_found(task)
            active = None
            if row.active_version is not None:
                active = rows.to_version(row, rows.get_version(session, row, row.active_version))
            return rows.to_task(session, row), active

    def list_visible(self, tenant: str, limit: int, after: str | None) -> list[SeenTask]:
        """By name; `after` is the last name already seen."""
        query = rows.task_query().add_columns(VersionRow)
        query = query.outerjoin(
            VersionRow, (VersionRow.task_id == TaskRow.id) & (VersionRow.version == TaskRow.active_version)
        )
        with self._database.reading() as session:
            found = [
                (rows.make_task(task, num_versions), None if version is None else rows.to_version(task, version))
                for part in _parts(tenant, query, limit, after)
                for task, num_versions, version in session.execute(part)
            ]
        return sorted(found, key=lambda seen: seen[0].task)[:limit]

    def list_callable(self, tenant: str, limit: int, after: str | None) -> list[Task]:
        """Tasks with an active version, by name."""
        query = rows.task_query().where(TaskRow.active_version.is_not(None))
        with self._database.reading() as session:
            found = [
                rows.make_task(task, num_versions)
                for part in _parts(tenant, query, limit, after)
                for task, num_versions in session.execute(part)
            ]
        return sorted(found, key=lambda task: task.task)[:limit]


def _parts(tenant: str, query: Q, limit: int, after: str | None) -> list[Q]:
    """`query` for the tenant's own tasks and for the shared ones: apart, each follows the index of names."""
    if after is not None:
        query = query.where(TaskRow.name > after)
    query = query.order_by(TaskRow.name).limit(limit)
    parts = [query.where(TaskRow.tenant == tenant)]
    if tenant != SHARED_TENANT:
        own = aliased(TaskRow)
        # Tombstones too: whom a name means never changes silently.
        has_own = exists().where(own.tenant == tenant, own.name == TaskRow.name)
        parts.append(query.where(TaskRow.tenant == SHARED_TENANT, ~has_own))
    return parts
