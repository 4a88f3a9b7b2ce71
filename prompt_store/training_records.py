"""Rows of training files, jobs and events: found, added, moved from one status to the next.

Every move of a job is a compare-and-swap on its status, and on the server that has it in hand: of a cancel and a
finish at the same moment, one wins and the other is told. Knows nothing of blobs and of how a prompt is made.
"""

import secrets
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, case, delete, func, or_, select, update
from sqlalchemy.orm import Session

from prompt_store.audit import append_audit
from prompt_store.database import Database
from prompt_store.errors import QuotaExceeded, TooManyJobs, TrainingNotFound, VersionConflict
from prompt_store.rows import find_task, retired
from prompt_store.training_models import (
    TrainingEventRow,
    TrainingFileRow,
    TrainingJobRow,
    to_event,
    to_file,
    to_job,
    to_row,
)
from prompt_store.training_values import (
    UNFINISHED,
    JobStatus,
    TrainingEvent,
    TrainingFile,
    TrainingJob,
)

_ID_BYTES = 12
MAX_TENANT_FILES = 10_000
"""Beside the bytes, for a file of a few takes thousands on the disk."""


class TrainingRecords:
    def __init__(self, database: Database) -> None:
        self._database = database

    # Files

    def add_file(self, file: TrainingFile, *, max_tenant_bytes: int | None) -> TrainingFile:
        """`file.id` is ignored: it is given here. Raises QuotaExceeded."""
        with self._database.writing() as session:
            num_files, used = session.execute(
                select(func.count(TrainingFileRow.serial), func.sum(TrainingFileRow.num_bytes)).where(
                    TrainingFileRow.tenant == file.tenant
                )
            ).one()
            if num_files >= MAX_TENANT_FILES:
                raise QuotaExceeded(
                    f"The tenant has {num_files} files already. Delete files that no job needs.", param="file"
                )
            if max_tenant_bytes is not None and int(used or 0) + file.num_bytes > max_tenant_bytes:
                raise QuotaExceeded(
                    f"The tenant's files have {int(used or 0)} bytes, this one has {file.num_bytes}, and "
                    f"{max_tenant_bytes} are allowed. Delete files that no job needs.",
                    param="file",
                )
            row = TrainingFileRow(
                id=f"file-{secrets.token_hex(_ID_BYTES)}",
                tenant=file.tenant,
                filename=file.filename,
                digest=file.digest,
                num_bytes=file.num_bytes,
                num_examples=file.num_examples,
                created_at=file.created_at,
                created_by=file.created_by,
            )
            session.add(row)
            append_audit(
                session,
                file.tenant,
                actor=file.created_by,
                action="upload_training_file",
                digest=file.digest,
                detail={"file": row.id, "num_bytes": file.num_bytes},
            )
            return to_file(row)

    def get_file(self, tenant: str, file_id: str) -> TrainingFile:
        """Raises TrainingNotFound."""
        with self._database.reading() as session:
            return to_file(_file_row(session, tenant, file_id))

    def list_files(self, tenant: str, *, limit: int, after: str | None, newest_first: bool) -> list[TrainingFile]:
        """`after` is the last id already seen. Raises TrainingNotFound for one that is unknown."""
        query = select(TrainingFileRow).where(TrainingFileRow.tenant == tenant).limit(limit)
        serial = TrainingFileRow.serial
        with self._database.reading() as session:
            if after is not None:
                seen = _file_row(session, tenant, after, param="after").serial
                query = query.where(serial < seen if newest_first else serial > seen)
            query = query.order_by(serial.desc() if newest_first else serial.asc())
            return [to_file(row) for row in session.scalars(query)]

    def delete_file(self, tenant: str, file_id: str, *, actor: str) -> str:
        """The digest of what it held. Raises TrainingNotFound, or VersionConflict while a job needs it."""
        with self._database.writing() as session:
            row = _file_row(session, tenant, file_id)
            in_use = select(TrainingJobRow.id).where(
                TrainingJobRow.tenant == tenant,
                TrainingJobRow.status.in_(UNFINISHED),
                or_(TrainingJobRow.training_file == file_id, TrainingJobRow.validation_file == file_id),
            )
            job_id = session.scalar(in_use.limit(1))
            if job_id is not None:
                raise VersionConflict(f"The file is needed by the job {job_id}; cancel that first.", param="file_id")
            digest = row.digest
            session.delete(row)
            append_audit(
                session, tenant, actor=actor, action="delete_training_file", digest=digest, detail={"file": file_id}
            )
            return digest

    # Jobs

    def add_job(
        self,
        *,
        tenant: str,
        task: str,
        training_file: str,
        validation_file: str | None,
        spec: Mapping[str, Any],
        created_by: str,
        max_unfinished: int | None,
    ) -> TrainingJob:
        """A queued job. Raises TrainingNotFound for a file that is not the tenant's, VersionConflict for a name that is
        retired, or TooManyJobs.
        """
        with self._database.writing() as session:
            digest = _file_row(session, tenant, training_file, param="training_file").digest
            if validation_file is not None:
                _file_row(session, tenant, validation_file, param="validation_file")
            name = find_task(session, tenant, task)
            if name is not None and name.deleted_at is not None:
                raise retired(task)
            unfinished = session.scalar(
                select(func.count(TrainingJobRow.serial)).where(
                    TrainingJobRow.tenant == tenant, TrainingJobRow.status.in_(UNFINISHED)
                )
            )
            if max_unfinished is not None and int(unfinished or 0) >= max_unfinished:
                raise TooManyJobs(
                    f"The tenant has {unfinished} jobs queued or running, and {max_unfinished} are allowed.",
                    param="training_file",
                )
            row = TrainingJobRow(
                id=f"ftjob-{secrets.token_hex(_ID_BYTES)}",
                tenant=tenant,
                task=task,
                status="queued",
                training_file=training_file,
                validation_file=validation_file,
                data_digest=digest,
                spec=dict(spec),
                created_at=datetime.now(UTC),
                created_by=created_by,
                num_starts=0,
            )
            session.add(row)
            append_audit(
                session,
                tenant,
                actor=created_by,
                action="create_training_job",
                task=task,
                digest=digest,
                detail={"job": row.id},
            )
            return to_job(row)

    def get_job(self, tenant: str, job_id: str) -> TrainingJob:
        """Raises TrainingNotFound."""
        with self._database.reading() as session:
            return to_job(_job_row(session, tenant, job_id))

    def list_jobs(self, tenant: str, *, limit: int, after: str | None) -> list[TrainingJob]:
        """Newest first. Raises TrainingNotFound for an unknown `after`."""
        query = select(TrainingJobRow).where(TrainingJobRow.tenant == tenant)
        with self._database.reading() as session:
            if after is not None:
                query = query.where(TrainingJobRow.serial < _job_row(session, tenant, after, param="after").serial)
            return [to_job(row) for row in session.scalars(query.order_by(TrainingJobRow.serial.desc()).limit(limit))]

    def claim_job(self, runner: str, *, held: Sequence[str], stale_before: datetime) -> TrainingJob | None:
        """Give `runner` the next job, in the status `running`; None when there is none.

        It is one that nobody has in hand, that this runner had before it was killed, or whose runner has not been heard
        of since `stale_before`. Tenants take turns: first comes who has fewest jobs running, then who waits longest.
        `held` are the ids of the jobs that the runner has in hand.
        """
        running = (
            select(TrainingJobRow.tenant, func.count().label("num"))
            .where(TrainingJobRow.status == "running", TrainingJobRow.id.in_(held))
            .group_by(TrainingJobRow.tenant)
            .subquery()
        )
        query = (
            select(TrainingJobRow)
            .outerjoin(running, running.c.tenant == TrainingJobRow.tenant)
            .where(_is_free(runner, stale_before), TrainingJobRow.id.not_in(held))
            .order_by(func.coalesce(running.c.num, 0), TrainingJobRow.serial)
            .limit(1)
        )
        with self._database.writing() as session:
            row = session.scalar(query)
            if row is None:
                return None
            moved = session.execute(
                update(TrainingJobRow)
                .where(TrainingJobRow.serial == row.serial, _is_free(runner, stale_before))
                .values(
                    status="running",
                    runner=runner,
                    seen_at=datetime.now(UTC),
                    num_starts=TrainingJobRow.num_starts + 1,
                    # Another runner has not what this one trained, and begins anew.
                    trained_at=case((TrainingJobRow.runner == runner, TrainingJobRow.trained_at), else_=None),
                )
                .execution_options(synchronize_session=False)
            )
            if not _has_changed(moved):
                return None
            session.refresh(row)
            return to_job(row)

    def report(self, job_id: str, runner: str, events: Sequence[TrainingEvent], *, is_trained: bool) -> bool:
        """Add what a running job has to tell, and say that its runner lives; False when it is no longer the runner's
        to run (cancelled, or taken over): nothing is added then. Once it `is_trained`, it cannot be cancelled.
        """
        with self._database.writing() as session:
            serial = _touch(session, job_id, runner)
            if serial is None:
                return False
            if is_trained:
                session.get_one(TrainingJobRow, serial).trained_at = datetime.now(UTC)
            session.add_all(to_row(serial, event) for event in events)
            return True

    def finish(
        self,
        job_id: str,
        runner: str,
        *,
        status: JobStatus,
        result: Mapping[str, Any] | None,
        error: Mapping[str, Any] | None,
        events: Sequence[TrainingEvent],
    ) -> bool:
        """End a running job (or, with `queued`, give it back); False when it is no longer the runner's."""
        with self._database.writing() as session:
            serial = _touch(session, job_id, runner)
            if serial is None:
                return False
            row = session.get_one(TrainingJobRow, serial)
            row.status = status
            row.runner = None
            # Given back is not lost: a job that is handed over at each restart may be so for ever.
            row.num_starts -= status == "queued"
            row.result = None if result is None else dict(result)
            row.error = None if error is None else dict(error)
            row.finished_at = None if status in UNFINISHED else datetime.now(UTC)
            session.add_all(to_row(serial, event) for event in events)
            return True

    def cancel_job(self, tenant: str, job_id: str, *, actor: str) -> TrainingJob:
        """Raises TrainingNotFound, or VersionConflict for a job that has ended or is trained. Cancelled twice, it stays
        so.
        """
        now = datetime.now(UTC)
        with self._database.writing() as session:
            row = _job_row(session, tenant, job_id)
            moved = session.execute(
                update(TrainingJobRow)
                .where(
                    TrainingJobRow.serial == row.serial,
                    TrainingJobRow.status.in_(UNFINISHED),
                    TrainingJobRow.trained_at.is_(None),
                )
                .values(status="cancelled", finished_at=now, runner=None)
                .execution_options(synchronize_session=False)
            )
            session.refresh(row)
            if _has_changed(moved):
                event = TrainingEvent(level="info", type="message", message="The job was cancelled.", at=now)
                session.add(to_row(row.serial, event))
                append_audit(
                    session, tenant, actor=actor, action="cancel_training_job", task=row.task, detail={"job": job_id}
                )
            elif row.status in UNFINISHED:
                raise VersionConflict(
                    "The job's prompt is trained and being stored; delete the version that it becomes.",
                    param="fine_tuning_job_id",
                )
            elif row.status != "cancelled":
                raise VersionConflict(f"The job has {row.status} already.", param="fine_tuning_job_id")
            return to_job(row)

    def list_events(
        self, tenant: str, job_id: str, *, limit: int, after: int | None
    ) -> tuple[TrainingJob, list[TrainingEvent]]:
        """Newest first; `after` is the lowest serial already seen. Raises TrainingNotFound."""
        with self._database.reading() as session:
            job = _job_row(session, tenant, job_id)
            query = select(TrainingEventRow).where(TrainingEventRow.job_serial == job.serial)
            if after is not None:
                query = query.where(TrainingEventRow.serial < after)
            rows = session.scalars(query.order_by(TrainingEventRow.serial.desc()).limit(limit))
            return to_job(job), [to_event(row) for row in rows]

    def unfinished_ids(self) -> set[str]:
        """Of all tenants' jobs."""
        with self._database.reading() as session:
            return set(session.scalars(select(TrainingJobRow.id).where(TrainingJobRow.status.in_(UNFINISHED))))

    def count_jobs(self) -> dict[str, int]:
        """Jobs of all tenants by status; a status that none has is left out."""
        query = select(TrainingJobRow.status, func.count(TrainingJobRow.serial)).group_by(TrainingJobRow.status)
        with self._database.reading() as session:
            return {status: int(num) for status, num in session.execute(query)}

    def forget_ended_jobs(self, *, before: datetime) -> int:
        """Remove jobs that ended before then, with their events; returns how many."""
        ended = (TrainingJobRow.finished_at < before) & TrainingJobRow.status.not_in(UNFINISHED)
        with self._database.writing() as session:
            serials = list(session.scalars(select(TrainingJobRow.serial).where(ended)))
            session.execute(delete(TrainingEventRow).where(TrainingEventRow.job_serial.in_(serials)))
            session.execute(delete(TrainingJobRow).where(TrainingJobRow.serial.in_(serials)))
            return len(serials)


def _is_free(runner: str, stale_before: datetime) -> ColumnElement[bool]:
    is_lost = or_(TrainingJobRow.runner == runner, TrainingJobRow.seen_at < stale_before)
    return or_(TrainingJobRow.status == "queued", (TrainingJobRow.status == "running") & is_lost)


def _touch(session: Session, job_id: str, runner: str) -> int | None:
    """Say that the runner lives; the job's serial, None when it is not the runner's."""
    moved = session.execute(
        update(TrainingJobRow)
        .where(TrainingJobRow.id == job_id, TrainingJobRow.status == "running", TrainingJobRow.runner == runner)
        .values(seen_at=datetime.now(UTC))
        .execution_options(synchronize_session=False)
    )
    if not _has_changed(moved):
        return None
    return session.scalar(select(TrainingJobRow.serial).where(TrainingJobRow.id == job_id))


def _has_changed(result: Any) -> bool:
    return bool(result.rowcount)


def _file_row(session: Session, tenant: str, file_id: str, *, param: str = "file_id") -> TrainingFileRow:
    row = session.scalar(select(TrainingFileRow).where(TrainingFileRow.id == file_id, TrainingFileRow.tenant == tenant))
    if row is None:
        raise TrainingNotFound("There is no such file.", param=param)
    return row


def _job_row(session: Session, tenant: str, job_id: str, *, param: str = "fine_tuning_job_id") -> TrainingJobRow:
    row = session.scalar(select(TrainingJobRow).where(TrainingJobRow.id == job_id, TrainingJobRow.tenant == tenant))
    if row is None:
        raise TrainingNotFound("There is no such job.", param=param)
    return row
