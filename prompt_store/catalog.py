"""The catalog: which tasks and versions exist, which is active, and what was active before. SQL, and no files.

Each public method is one transaction. Raises the store's errors only; a digest that nothing refers to any more is the
caller's to collect.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import delete, func, or_, select
from sqlalchemy.orm import Session

from prompt_store import failpoints, gates, rollout, rows
from prompt_store.audit import append_audit
from prompt_store.database import Database
from prompt_store.errors import VersionActive
from prompt_store.manifest import Canary, CanaryChange, GateStatus, PromptVersion, StoreCounts, Task
from prompt_store.models import ActivationRow, KeyRow, TaskRow, VersionRow
from prompt_store.names import SHARED_TENANT, Reference
from prompt_store.resolve_cache import Resolved
from prompt_store.rows import Upload
from prompt_store.training_models import TrainingFileRow


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A version together with what only the store needs to know of it."""

    version: PromptVersion
    config_digest: str


class Catalog:
    def __init__(self, database: Database) -> None:
        self._database = database

    def find_settled(self, upload: Upload) -> PromptVersion | None:
        """The version that makes `upload` need nothing more; None if it must be registered.

        Raises VersionConflict when registering is bound to fail, before any byte is written.
        """
        with self._database.reading() as session:
            task = rows.find_task(session, upload.tenant, upload.task)
            return rows.settle(session, task, upload)

    def register(self, upload: Upload) -> tuple[PromptVersion, bool, tuple[str, ...]]:
        """The version, whether it is new, and digests that may be unreferenced now. Its blobs are durable already.

        Raises VersionConflict when `expected_version` is not the active one or the name is retired.
        """
        stale: tuple[str, ...] = ()
        with self._database.writing() as session:
            task = rows.find_task(session, upload.tenant, upload.task, lock=True)
            settled = rows.settle(session, task, upload)
            if settled is not None:
                return settled, False, ()
            if task is None:
                task = rows.add_task(session, upload)
            row = rows.find_same_file(session, task, upload.checked)
            created = row is None
            if row is None:
                rows.check_quota(session, upload)
                row = rows.add_version(session, task, upload)
            elif row.quarantined_at is not None:
                # The same bytes came again and were stored soundly: the version is whole again.
                stale = (row.config_digest,)
                row.quarantined_at = None
                row.config_digest, row.peft_type = upload.config_digest, upload.checked.peft_type
            if not gates.is_same_request(task, row, upload.gate, upload.probes_digest):
                if row.probes_digest is not None:
                    stale = (*stale, row.probes_digest)
                row.probes_digest = upload.probes_digest
            if upload.gate is not None and task.active_version != row.version:
                rows.begin_gate(task, row, upload.gate)
            if upload.activate and task.active_version != row.version:
                rollout.activate(session, task, row)
            detail: dict[str, Any] = {"active": task.active_version == row.version}
            if upload.gate is not None:
                detail["gate_threshold"] = upload.gate.threshold
            action = "upload" if created else "upload_again"
            rows.audit_version(session, action, task, row, upload.created_by, detail)
            version = rows.to_version(task, row)
            session.flush()
            failpoints.hit(failpoints.UPLOAD_BEFORE_COMMIT)
        return version, created, stale

    def resolve(self, tenant: str, reference: Reference) -> Resolved | None:
        """What is meant by `reference` in `tenant`, or in the shared tenant if `tenant` never had that name.

        Without the details of gates: these are large, and what is resolved is remembered.
        """
        with self._database.reading() as session:
            task = rows.find_task(session, tenant, reference.task)
            if task is None and tenant != SHARED_TENANT:
                task = rows.find_task(session, SHARED_TENANT, reference.task)
            if task is None or task.deleted_at is not None:
                return None
            query = select(VersionRow).where(VersionRow.task_id == task.id)
            canary = None
            if reference.digest is not None:
                # One file may be registered once for each of its tasks: the newest is meant.
                query = query.where(VersionRow.digest == reference.digest).order_by(VersionRow.version.desc()).limit(1)
            elif reference.version is not None:
                query = query.where(VersionRow.version == reference.version)
            else:
                query = query.where(VersionRow.version == task.active_version)
                canary = rows.to_canary(task)
            row = session.scalar(query)
            if row is None:
                return None
            version = gates.without_detail(rows.to_version(task, row))
            if canary is None:
                return Resolved(version)
            canary_row = rows.get_version(session, task, canary.version)
            return Resolved(version, gates.without_detail(rows.to_version(task, canary_row)), canary.percent)

    def get_stored(self, tenant: str, task: str, version: int) -> Stored:
        """Raises TaskNotFound."""
        with self._database.reading() as session:
            task_row = rows.get_task(session, tenant, task)
            row = rows.get_version(session, task_row, version)
            return Stored(version=rows.to_version(task_row, row), config_digest=row.config_digest)

    def get_task(self, tenant: str, task: str) -> Task:
        """Raises TaskNotFound."""
        with self._database.reading() as session:
            return rows.to_task(session, rows.get_task(session, tenant, task))

    def list_tasks(self, tenant: str, limit: int, after: str | None) -> list[Task]:
        """Tasks by name; `after` is the last name already seen."""
        query = rows.task_query().where(TaskRow.tenant == tenant)
        if after is not None:
            query = query.where(TaskRow.name > after)
        with self._database.reading() as session:
            found = session.execute(query.order_by(TaskRow.name).limit(limit))
            return [rows.make_task(row, num_versions) for row, num_versions in found]

    def list_versions(self, tenant: str, task: str, limit: int, after: int | None) -> list[PromptVersion]:
        """Newest first; `after` is the last (lowest) number already seen. Raises TaskNotFound."""
        with self._database.reading() as session:
            task_row = rows.get_task(session, tenant, task)
            query = select(VersionRow).where(VersionRow.task_id == task_row.id)
            if after is not None:
                query = query.where(VersionRow.version < after)
            found = session.scalars(query.order_by(VersionRow.version.desc()).limit(limit))
            return [rows.to_version(task_row, row) for row in found]

    def pinned_versions(self) -> list[PromptVersion]:
        """The active versions of pinned tasks, of all tenants."""
        query = (
            select(TaskRow, VersionRow)
            .join(VersionRow, (VersionRow.task_id == TaskRow.id) & (VersionRow.version == TaskRow.active_version))
            .where(TaskRow.pinned, TaskRow.deleted_at.is_(None))
            .order_by(TaskRow.tenant, TaskRow.name)
        )
        with self._database.reading() as session:
            return [rows.to_version(task, row) for task, row in session.execute(query)]

    def pins(self) -> frozenset[tuple[str, str, int]]:
        """Tenant, task and active version of pinned tasks."""
        query = select(TaskRow.tenant, TaskRow.name, TaskRow.active_version)
        query = query.where(TaskRow.pinned, TaskRow.deleted_at.is_(None))
        with self._database.reading() as session:
            found = session.execute(query)
            return frozenset((tenant, task, version) for tenant, task, version in found if version is not None)

    def has_prefix(self, tenant: str, prefix_key: str) -> bool:
        """Whether any version of any of the tenant's tasks has this prefix key."""
        query = select(VersionRow.id).join(TaskRow, VersionRow.task_id == TaskRow.id)
        query = query.where(TaskRow.tenant == tenant, TaskRow.deleted_at.is_(None), VersionRow.prefix_key == prefix_key)
        with self._database.reading() as session:
            return session.scalars(query.limit(1)).first() is not None

    def update_task(
        self,
        tenant: str,
        task: str,
        *,
        active_version: int | None,
        expected_version: int | None,
        pinned: bool | None,
        canary: CanaryChange,
        actor: str,
    ) -> Task:
        """Raises TaskNotFound, VersionConflict, InvalidValue, GateNotPassed, or PromptCorrupt for what is quarantined.

        The activation comes first: a canary is set beside what is active then.
        """
        with self._database.writing() as session:
            task_row = rows.get_task(session, tenant, task, lock=True)
            rows.check_expected(task_row, task, expected_version)
            if pinned is not None and pinned != task_row.pinned:
                task_row.pinned = pinned
                append_audit(session, tenant, actor=actor, action="pin" if pinned else "unpin", task=task)
            if active_version is not None and active_version != task_row.active_version:
                row = rows.get_version(session, task_row, active_version)
                rollout.activate(session, task_row, row)
                rows.audit_version(session, "activate", task_row, row, actor)
            if canary is None and task_row.canary_version is not None:
                rollout.clear_canary(task_row)
                append_audit(session, tenant, actor=actor, action="clear_canary", task=task)
            elif isinstance(canary, Canary) and canary != rows.to_canary(task_row):
                row = rollout.set_canary(session, task_row, canary)
                rows.audit_version(session, "set_canary", task_row, row, actor, {"percent": canary.percent})
            session.flush()
            result = rows.to_task(session, task_row)
            failpoints.hit(failpoints.ACTIVATE_BEFORE_COMMIT)
        return result

    def rollback(self, tenant: str, task: str, actor: str) -> Task:
        """Activate what was active before the current version; quarantined versions are passed over.

        Raises TaskNotFound, or VersionConflict when nothing was active before.
        """
        with self._database.writing() as session:
            task_row = rows.get_task(session, tenant, task, lock=True)
            row = rollout.step_back(session, task_row)
            rows.audit_version(session, "rollback", task_row, row, actor)
            session.flush()
            result = rows.to_task(session, task_row)
            failpoints.hit(failpoints.ACTIVATE_BEFORE_COMMIT)
        return result

    def delete_version(self, tenant: str, task: str, version: int, actor: str) -> tuple[str, ...]:
        """Returns the digests that the version referred to. Raises TaskNotFound or VersionActive (the canary's too)."""
        with self._database.writing() as session:
            task_row = rows.get_task(session, tenant, task, lock=True)
            row = rows.get_version(session, task_row, version)
            if task_row.active_version == version:
                raise VersionActive(
                    f"Version {version} of {task} is active: activate another one first.", param="version"
                )
            if task_row.canary_version == version:
                raise VersionActive(
                    f"Version {version} of {task} is its canary: take that away first.", param="version"
                )
            rows.audit_version(session, "delete_version", task_row, row, actor)
            session.execute(
                delete(ActivationRow).where(ActivationRow.task_id == task_row.id, ActivationRow.version == version)
            )
            session.delete(row)
            session.flush()
            failpoints.hit(failpoints.DELETE_BEFORE_COMMIT)
        return _digests_of(row)

    def delete_task(self, tenant: str, task: str, actor: str) -> tuple[str, ...]:
        """Leaves a tombstone; returns the digests that its versions referred to. Raises TaskNotFound."""
        with self._database.writing() as session:
            task_row = rows.get_task(session, tenant, task, lock=True)
            versions = list(session.scalars(select(VersionRow).where(VersionRow.task_id == task_row.id)))
            digests = tuple(digest for row in versions for digest in _digests_of(row))
            session.execute(delete(ActivationRow).where(ActivationRow.task_id == task_row.id))
            session.execute(delete(VersionRow).where(VersionRow.task_id == task_row.id))
            task_row.active_version, task_row.pinned, task_row.deleted_at = None, False, datetime.now(UTC)
            rollout.clear_canary(task_row)
            append_audit(
                session, tenant, actor=actor, action="delete_task", task=task, detail={"num_versions": len(versions)}
            )
            session.flush()
            failpoints.hit(failpoints.DELETE_BEFORE_COMMIT)
        return digests

    def quarantine(self, version: PromptVersion, reason: str) -> None:
        """Mark a version whose bytes are damaged. Raises TaskNotFound when it is gone: then it was merely deleted."""
        with self._database.writing() as session:
            task_row = rows.get_task(session, version.tenant, version.task, lock=True)
            row = rows.get_version(session, task_row, version.version)
            if row.quarantined_at is None:
                row.quarantined_at = datetime.now(UTC)
                if task_row.canary_version == row.version:
                    # Damage to what is only being tried must not cost its share of the requests.
                    rollout.clear_canary(task_row)
                rows.audit_version(session, "quarantine", task_row, row, "promptmux", {"reason": reason})

    def set_gate(
        self,
        tenant: str,
        task: str,
        version: int,
        *,
        status: GateStatus,
        score: float | None,
        detail: Mapping[str, Any],
        measured: PromptVersion | None,
        actor: str,
    ) -> PromptVersion:
        """Raises TaskNotFound, InvalidValue for a version without a gate, or VersionConflict (`measured` is stale)."""
        with self._database.writing() as session:
            task_row = rows.get_task(session, tenant, task, lock=True)
            row = rows.get_version(session, task_row, version)
            if measured is not None:
                gates.check_measured(task_row, row, measured)
            gate = gates.move_gate(task_row, row, status, score, detail)
            if gate.status == "passed" and gate.activates and task_row.active_version != version:
                if (task_row.active_version or 0) != gate.expected_version or row.quarantined_at is not None:
                    gate = gates.move_gate(task_row, row, "conflict", score, detail)
                else:
                    rollout.activate(session, task_row, row)
                    rows.audit_version(session, "activate", task_row, row, actor)
            if gate.status not in gates.UNFINISHED:
                rows.audit_version(session, "gate", task_row, row, actor, {"status": gate.status, "score": gate.score})
            session.flush()
            found = rows.to_version(task_row, row)
            failpoints.hit(failpoints.ACTIVATE_BEFORE_COMMIT)
        return found

    def unfinished_gates(self) -> list[PromptVersion]:
        """Versions of all tenants whose gate is pending or running, oldest first."""
        query = (
            select(TaskRow, VersionRow)
            .join(VersionRow, VersionRow.task_id == TaskRow.id)
            .where(VersionRow.gate["status"].as_string().in_(gates.UNFINISHED))
            .order_by(VersionRow.id)
        )
        with self._database.reading() as session:
            return [rows.to_version(task, row) for task, row in session.execute(query)]

    def find_unreferenced(self, digests: Collection[str]) -> set[str]:
        """Those of `digests` that neither a version nor a file of examples refers to."""
        with self._database.reading() as session:
            return {digest for digest in digests if not _is_referenced(session, digest)}

    def all_digests(self) -> set[str]:
        """Every digest that some version or file of examples refers to."""
        query = select(VersionRow.digest, VersionRow.config_digest, VersionRow.probes_digest)
        with self._database.reading() as session:
            digests = {digest for row in session.execute(query) for digest in row if digest is not None}
            return digests | set(session.scalars(select(TrainingFileRow.digest)))

    def num_versions(self) -> int:
        # Without a column to look at, SQLite counts whole pages of an index.
        with self._database.reading() as session:
            return session.scalar(select(func.count()).select_from(VersionRow)) or 0

    def counts(self) -> StoreCounts:
        with self._database.reading() as session:
            num_versions, num_quarantined, num_bytes = session.execute(
                select(
                    func.count(VersionRow.id),
                    func.count(VersionRow.quarantined_at),
                    func.coalesce(func.sum(VersionRow.num_bytes), 0),
                )
            ).one()
            return StoreCounts(
                num_tasks=session.scalar(select(func.count(TaskRow.id)).where(TaskRow.deleted_at.is_(None))) or 0,
                num_versions=num_versions,
                num_quarantined=num_quarantined,
                num_keys=session.scalar(select(func.count(KeyRow.id)).where(KeyRow.revoked_at.is_(None))) or 0,
                num_bytes=int(num_bytes),
            )


def _digests_of(row: VersionRow) -> tuple[str, ...]:
    digests = (row.digest, row.config_digest, row.probes_digest)
    return tuple(digest for digest in digests if digest is not None)


def _is_referenced(session: Session, digest: str) -> bool:
    # One digest at a time and no more than one row: thousands of versions may share a configuration.
    columns = (VersionRow.digest, VersionRow.config_digest, VersionRow.probes_digest)
    query = select(VersionRow.id).where(or_(*(column == digest for column in columns))).limit(1)
    if session.scalar(query) is not None:
        return True
    files = select(TrainingFileRow.serial).where(TrainingFileRow.digest == digest).limit(1)
    return session.scalar(files) is not None
