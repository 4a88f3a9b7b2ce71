"""Steps inside one transaction of the catalog: rows found, checked, changed, and turned into the store's values.

Nothing here begins or commits; every function takes the session of whoever does.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, cast

from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from prompt_store.audit import append_audit
from prompt_store.errors import PromptCorrupt, PromptMismatch, QuotaExceeded, VersionConflict
from prompt_store.formats import CheckedPrompt
from prompt_store.gates import is_same_request, read_gate, write_gate
from prompt_store.manifest import (
    BackboneShape,
    Canary,
    Gate,
    PromptKind,
    PromptVersion,
    Provenance,
    Quota,
    Task,
    VersionState,
)
from prompt_store.models import KeyRow, TaskRow, VersionRow
from prompt_store.names import not_found


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """What is to be registered: a checked file under a name.

    `activate` is for at once; with a `gate` it is False, and `gate.activates` says what is to happen once it is passed.
    """

    tenant: str
    task: str
    checked: CheckedPrompt
    config_digest: str
    metadata: Mapping[str, Any]
    backbone: BackboneShape
    created_by: str
    activate: bool
    expected_version: int | None
    training_run: str | None = None
    data_digest: str | None = None
    gate: Gate | None = None
    probes_digest: str | None = None
    quota: Quota | None = None


def find_task(session: Session, tenant: str, task: str, *, lock: bool = False) -> TaskRow | None:
    """The row of a name, tombstones too; `lock` keeps other writers off it where the database has row locks."""
    query = select(TaskRow).where(TaskRow.tenant == tenant, TaskRow.name == task)
    return session.scalar(query.with_for_update() if lock else query)


def get_task(session: Session, tenant: str, task: str, *, lock: bool = False) -> TaskRow:
    """Raises TaskNotFound, also for a tombstone."""
    row = find_task(session, tenant, task, lock=lock)
    if row is None or row.deleted_at is not None:
        raise not_found(task)
    return row


def get_version(session: Session, task: TaskRow, version: int) -> VersionRow:
    """Raises TaskNotFound."""
    row = session.scalar(select(VersionRow).where(VersionRow.task_id == task.id, VersionRow.version == version))
    if row is None:
        raise not_found(f"{task.name}@{version}")
    return row


def find_same_file(session: Session, task: TaskRow, checked: CheckedPrompt) -> VersionRow | None:
    """The version that holds the same bytes, read in the same way and for the same backbone."""
    return session.scalar(
        select(VersionRow).where(VersionRow.task_id == task.id, VersionRow.prefix_key == checked.prefix_key)
    )


def retired(task: str) -> VersionConflict:
    return VersionConflict(
        f"The name {task} was deleted and stays retired in this tenant; choose another.", param="task"
    )


def settle(session: Session, task: TaskRow | None, upload: Upload) -> PromptVersion | None:
    """The version that leaves `upload` nothing to do, None if there is work. Raises VersionConflict.

    A repeated upload is settled whatever `expected_version` says: a client that lost the answer may ask again.
    """
    if task is not None:
        if task.deleted_at is not None:
            raise retired(task.name)
        row = find_same_file(session, task, upload.checked)
        is_sound = row is not None and row.quarantined_at is None
        is_settled = not upload.activate or (row is not None and task.active_version == row.version)
        if (
            row is not None
            and is_sound
            and is_settled
            and is_same_request(task, row, upload.gate, upload.probes_digest)
        ):
            return to_version(task, row)
    check_expected(task, upload.task, upload.expected_version)
    return None


def check_expected(task: TaskRow | None, name: str, expected_version: int | None) -> None:
    """Compare-and-swap: 0 expects no task, another number expects it to be active. Raises VersionConflict."""
    if expected_version is None:
        return
    if task is None:
        if expected_version != 0:
            raise VersionConflict(
                f"expected_version is {expected_version}, but the task {name} does not exist.", param="expected_version"
            )
        return
    if expected_version == 0 or task.active_version != expected_version:
        active = "no version is" if task.active_version is None else f"version {task.active_version} is"
        raise VersionConflict(
            f"expected_version is {expected_version}, but the task {name} exists and {active} active.",
            param="expected_version",
        )


def check_usable(version: PromptVersion) -> None:
    """Raises PromptCorrupt for a quarantined version."""
    if version.state == "quarantined":
        raise PromptCorrupt(
            f"Version {version.version} of {version.task} is quarantined: its stored bytes are "
            "damaged. Upload the same file again to repair it.",
            param="version",
        )


def check_backbone(version: PromptVersion, backbone: BackboneShape) -> None:
    """Raises PromptMismatch for a version that was uploaded under other weights."""
    if version.backbone != backbone.fingerprint:
        # Equal shapes are not enough: a prompt means something only to the weights that it was trained on.
        raise PromptMismatch(
            f"{version.task}@{version.version} was uploaded for the backbone with fingerprint "
            f"{version.backbone[:12]}…; this server runs {backbone.name}, {backbone.fingerprint[:12]}….",
            param="model",
        )


def add_task(session: Session, upload: Upload) -> TaskRow:
    task = TaskRow(
        tenant=upload.tenant,
        name=upload.task,
        active_version=None,
        next_version=1,
        pinned=False,
        created_at=datetime.now(UTC),
        deleted_at=None,
    )
    session.add(task)
    session.flush()
    return task


def add_version(session: Session, task: TaskRow, upload: Upload) -> VersionRow:
    checked = upload.checked
    row = VersionRow(
        task_id=task.id,
        version=task.next_version,
        digest=checked.digest,
        config_digest=upload.config_digest,
        prefix_key=checked.prefix_key,
        peft_type=checked.peft_type,
        kind=checked.kind,
        task_index=checked.task_index,
        num_virtual_tokens=checked.num_virtual_tokens,
        num_bytes=checked.num_bytes,
        created_at=datetime.now(UTC),
        created_by=upload.created_by,
        backbone=upload.backbone.fingerprint,
        quarantined_at=None,
        extra=dict(upload.metadata),
        warnings=list(checked.warnings),
        provenance={
            "training_run": upload.training_run,
            "data_digest": upload.data_digest,
            "key_label": session.scalar(select(KeyRow.label).where(KeyRow.id == upload.created_by)),
            "backbone_name": upload.backbone.name,
        },
        gate=None,
        probes_digest=upload.probes_digest,
    )
    task.next_version += 1
    session.add(row)
    session.flush()
    return row


def begin_gate(task: TaskRow, row: VersionRow, gate: Gate) -> None:
    """Put a gate before a version that is not active; the activation it may bring is against what is active now."""
    write_gate(row, replace(gate, expected_version=task.active_version or 0))


def check_quota(session: Session, upload: Upload) -> None:
    """Whether the tenant may store one version more. In the transaction that adds it, so that two uploads cannot pass
    together. Raises QuotaExceeded.
    """
    quota = upload.quota
    if quota is None or (quota.max_prompts, quota.max_prompt_bytes, quota.max_virtual_tokens) == (None, None, None):
        return
    num_prompts, num_bytes, num_virtual_tokens = session.execute(
        select(
            func.count(VersionRow.id),
            func.coalesce(func.sum(VersionRow.num_bytes), 0),
            func.coalesce(func.sum(VersionRow.num_virtual_tokens), 0),
        )
        .join(TaskRow, VersionRow.task_id == TaskRow.id)
        .where(TaskRow.tenant == upload.tenant)
    ).one()
    for name, limit, needed, what in (
        ("max_prompts", quota.max_prompts, num_prompts + 1, "prompt versions"),
        ("max_prompt_bytes", quota.max_prompt_bytes, num_bytes + upload.checked.num_bytes, "bytes of prompts"),
        (
            "max_virtual_tokens",
            quota.max_virtual_tokens,
            num_virtual_tokens + upload.checked.num_virtual_tokens,
            "virtual tokens",
        ),
    ):
        if limit is not None and needed > limit:
            raise QuotaExceeded(
                f"The tenant would have {needed} {what}; its quota is {limit}. Waiting does not help: delete versions "
                "that are not needed, or ask the operator for a larger quota.",
                param=name,
            )


def audit_version(
    session: Session,
    action: str,
    task: TaskRow,
    row: VersionRow,
    actor: str,
    detail: Mapping[str, Any] | None = None,
) -> None:
    append_audit(
        session,
        task.tenant,
        actor=actor,
        action=action,
        task=task.name,
        version=row.version,
        digest=row.digest,
        detail=detail,
    )


def task_query() -> Select[Any]:
    """(TaskRow, number of versions) for tasks that are not tombstones: one query however many there are."""
    num_versions = (
        select(func.count(VersionRow.id)).where(VersionRow.task_id == TaskRow.id).correlate(TaskRow).scalar_subquery()
    )
    return select(TaskRow, num_versions).where(TaskRow.deleted_at.is_(None))


def to_task(session: Session, task: TaskRow) -> Task:
    num_versions = session.scalar(select(func.count(VersionRow.id)).where(VersionRow.task_id == task.id)) or 0
    return make_task(task, num_versions)


def make_task(task: TaskRow, num_versions: int) -> Task:
    return Task(
        tenant=task.tenant,
        task=task.name,
        active_version=task.active_version,
        pinned=task.pinned,
        created_at=task.created_at,
        num_versions=num_versions,
        canary=to_canary(task),
    )


def to_canary(task: TaskRow) -> Canary | None:
    if task.canary_version is None or task.canary_percent is None:
        return None
    return Canary(task.canary_version, task.canary_percent)


def to_version(task: TaskRow, row: VersionRow) -> PromptVersion:
    state: VersionState = "active" if task.active_version == row.version else "inactive"
    return PromptVersion(
        tenant=task.tenant,
        task=task.name,
        version=row.version,
        digest=row.digest,
        prefix_key=row.prefix_key,
        peft_type=row.peft_type,
        kind=cast(PromptKind, row.kind),
        task_index=row.task_index,
        num_virtual_tokens=row.num_virtual_tokens,
        num_bytes=row.num_bytes,
        created_at=row.created_at,
        created_by=row.created_by,
        backbone=row.backbone,
        state="quarantined" if row.quarantined_at is not None else state,
        metadata=MappingProxyType(row.extra),
        provenance=Provenance(
            training_run=row.provenance.get("training_run"),
            data_digest=row.provenance.get("data_digest"),
            key_id=row.created_by or None,
            key_label=row.provenance.get("key_label"),
            uploaded_at=row.created_at,
            backbone_name=row.provenance.get("backbone_name"),
            backbone_fingerprint=row.backbone,
        ),
        warnings=tuple(row.warnings),
        gate=read_gate(row),
        probes_digest=row.probes_digest,
    )
