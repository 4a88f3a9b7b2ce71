"""Who answers for a task, inside one transaction of the catalog: activation, rollback and canary.

Nothing here begins or commits; every function takes the session of whoever does.
"""

import hashlib
from datetime import UTC, datetime

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from prompt_store.errors import InvalidValue, VersionConflict
from prompt_store.gates import check_gate, may_answer
from prompt_store.manifest import Canary
from prompt_store.models import ActivationRow, TaskRow, VersionRow
from prompt_store.rows import check_usable, get_version, to_version

# How far back `rollback` remembers. Bounds the table when a script switches versions for ever.
MAX_ACTIVATIONS = 64


def activate(session: Session, task: TaskRow, row: VersionRow) -> None:
    """Make a version active and put it on top of the task's activation stack; it is no canary then.

    Raises PromptCorrupt for a quarantined version and GateNotPassed.
    """
    check_usable(to_version(task, row))
    check_gate(task, row)
    _make_active(task, row.version)
    session.add(ActivationRow(task_id=task.id, version=row.version, at=datetime.now(UTC)))
    session.flush()
    oldest_kept = session.scalar(
        select(ActivationRow.id)
        .where(ActivationRow.task_id == task.id)
        .order_by(ActivationRow.id.desc())
        .offset(MAX_ACTIVATIONS - 1)
        .limit(1)
    )
    if oldest_kept is not None:
        session.execute(delete(ActivationRow).where(ActivationRow.task_id == task.id, ActivationRow.id < oldest_kept))


def step_back(session: Session, task: TaskRow) -> VersionRow:
    """Take activations off the stack until a sound version other than the active one is on top, and activate it.

    Raises VersionConflict when there is none.
    """
    history = select(ActivationRow).where(ActivationRow.task_id == task.id).order_by(ActivationRow.id.desc())
    for activation in list(session.scalars(history)):
        if activation.version != task.active_version:
            row = get_version(session, task, activation.version)
            if row.quarantined_at is None and may_answer(row):
                _make_active(task, row.version)
                return row
        session.delete(activation)
    raise VersionConflict(f"No version of {task.name} was active before this one.", param="version")


def set_canary(session: Session, task: TaskRow, canary: Canary) -> VersionRow:
    """Raises InvalidValue, TaskNotFound, VersionConflict, PromptCorrupt or GateNotPassed."""
    if not 1 <= canary.percent <= 99:
        raise InvalidValue("canary.percent must be from 1 to 99.", param="canary.percent")
    if task.active_version is None:
        raise VersionConflict(
            f"No version of {task.name} is active: there is nothing to compare a canary with.", param="canary"
        )
    if canary.version == task.active_version:
        raise VersionConflict(f"Version {canary.version} of {task.name} is the active one.", param="canary.version")
    row = get_version(session, task, canary.version)
    check_usable(to_version(task, row))
    check_gate(task, row)
    task.canary_version, task.canary_percent = canary.version, canary.percent
    return row


def clear_canary(task: TaskRow) -> None:
    task.canary_version = task.canary_percent = None


def is_canarys(request_id: str, tenant: str, task: str, percent: int) -> bool:
    """Whether a request falls to the canary: always the same answer for one request id, so that a retry meets the
    version that it met before.
    """
    digest = hashlib.sha256(f"{tenant}/{task}/{request_id}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") % 100 < percent


def _make_active(task: TaskRow, version: int) -> None:
    task.active_version = version
    if task.canary_version == version:
        clear_canary(task)
