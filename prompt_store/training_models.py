"""The tables of training: files that tenants uploaded, jobs over them, and what the jobs had to tell; and their rows as
values.

As in `models`, only types that every database has; the migrations are what creates them.
"""

from datetime import datetime
from types import MappingProxyType
from typing import Any, cast

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, Integer, String, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from prompt_store.models import Base, RowId, UtcDateTime
from prompt_store.training_values import EventLevel, EventType, JobStatus, TrainingEvent, TrainingFile, TrainingJob


class TrainingFileRow(Base):
    """`digest` is that of the blob that holds the bytes; `serial` grows with time and is the cursor of lists."""

    __tablename__ = "training_files"
    __table_args__ = (
        UniqueConstraint("id", name="uq_training_files_id"),
        Index("ix_training_files_tenant_serial", "tenant", "serial"),
        Index("ix_training_files_digest", "digest"),
    )

    serial: Mapped[int] = mapped_column(RowId, primary_key=True)
    id: Mapped[str] = mapped_column(String(40))
    tenant: Mapped[str] = mapped_column(String(63))
    filename: Mapped[str] = mapped_column(String(200))
    digest: Mapped[str] = mapped_column(String(64))
    num_bytes: Mapped[int] = mapped_column(BigInteger)
    num_examples: Mapped[int] = mapped_column(Integer)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    created_by: Mapped[str] = mapped_column(String(200))


class TrainingJobRow(Base):
    """No foreign keys to files: a job outlives the data that it was trained on.

    `runner` is the server that has the job in hand, and `seen_at` when that server last said so. Since `trained_at` its
    prompt is on the way into the store: it can be cancelled no more.
    """

    __tablename__ = "training_jobs"
    __table_args__ = (
        UniqueConstraint("id", name="uq_training_jobs_id"),
        Index("ix_training_jobs_tenant_serial", "tenant", "serial"),
        Index("ix_training_jobs_status", "status"),
    )

    serial: Mapped[int] = mapped_column(RowId, primary_key=True)
    id: Mapped[str] = mapped_column(String(40))
    tenant: Mapped[str] = mapped_column(String(63))
    task: Mapped[str] = mapped_column(String(63))
    status: Mapped[str] = mapped_column(String(20))
    training_file: Mapped[str] = mapped_column(String(40))
    validation_file: Mapped[str | None] = mapped_column(String(40))
    data_digest: Mapped[str] = mapped_column(String(64))
    spec: Mapped[dict[str, Any]] = mapped_column(JSON)
    result: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    created_by: Mapped[str] = mapped_column(String(200))
    trained_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    runner: Mapped[str | None] = mapped_column(String(40))
    seen_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    num_starts: Mapped[int] = mapped_column(Integer)


class TrainingEventRow(Base):
    __tablename__ = "training_events"
    __table_args__ = (Index("ix_training_events_job_serial", "job_serial", "serial"),)

    serial: Mapped[int] = mapped_column(RowId, primary_key=True)
    job_serial: Mapped[int] = mapped_column(ForeignKey("training_jobs.serial", name="fk_training_events_job_serial"))
    at: Mapped[datetime] = mapped_column(UtcDateTime)
    level: Mapped[str] = mapped_column(String(10))
    type: Mapped[str] = mapped_column(String(10))
    message: Mapped[str] = mapped_column(String(1000))
    data: Mapped[dict[str, Any]] = mapped_column(JSON)


def to_file(row: TrainingFileRow) -> TrainingFile:
    return TrainingFile(
        id=row.id,
        tenant=row.tenant,
        filename=row.filename,
        digest=row.digest,
        num_bytes=row.num_bytes,
        num_examples=row.num_examples,
        created_at=row.created_at,
        created_by=row.created_by,
    )


def to_job(row: TrainingJobRow) -> TrainingJob:
    return TrainingJob(
        id=row.id,
        tenant=row.tenant,
        task=row.task,
        status=cast(JobStatus, row.status),
        training_file=row.training_file,
        validation_file=row.validation_file,
        data_digest=row.data_digest,
        spec=MappingProxyType(row.spec),
        result=None if row.result is None else MappingProxyType(row.result),
        error=None if row.error is None else MappingProxyType(row.error),
        created_at=row.created_at,
        created_by=row.created_by,
        finished_at=row.finished_at,
        num_starts=row.num_starts,
    )


def to_row(job_serial: int, event: TrainingEvent) -> TrainingEventRow:
    return TrainingEventRow(
        job_serial=job_serial,
        at=event.at,
        level=event.level,
        type=event.type,
        message=event.message[:1000],
        data=dict(event.data),
    )


def to_event(row: TrainingEventRow) -> TrainingEvent:
    return TrainingEvent(
        serial=row.serial,
        level=cast(EventLevel, row.level),
        type=cast(EventType, row.type),
        message=row.message,
        at=row.at,
        data=MappingProxyType(row.data),
    )
