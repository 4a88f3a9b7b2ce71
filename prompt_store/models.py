"""The catalog's tables, as SQLAlchemy sees them. The migrations are what creates them; a test holds the two equal.

Only types that every database has: no SQLite-only and no PostgreSQL-only columns.
"""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    String,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator


class UtcDateTime(TypeDecorator[datetime]):
    """An aware datetime in UTC. SQLite forgets time zones; this puts UTC back."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


# SQLite only numbers rows by itself in INTEGER columns; elsewhere an append-only log deserves 64 bits.
RowId = BigInteger().with_variant(Integer(), "sqlite")


class Base(DeclarativeBase):
    pass


class TaskRow(Base):
    """`deleted_at` makes a tombstone: the name stays taken, the versions are gone."""

    __tablename__ = "tasks"
    __table_args__ = (
        UniqueConstraint("tenant", "name", name="uq_tasks_tenant_name"),
        # Pins are few, and are looked for after each change.
        Index("ix_tasks_pinned", "pinned"),
    )

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    tenant: Mapped[str] = mapped_column(String(63))
    name: Mapped[str] = mapped_column(String(63))
    active_version: Mapped[int | None] = mapped_column(Integer)
    # Never goes back, so that a deleted version's number is not given to other bytes.
    next_version: Mapped[int] = mapped_column(Integer)
    pinned: Mapped[bool] = mapped_column(Boolean)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    deleted_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    # Both are None, or neither.
    canary_version: Mapped[int | None] = mapped_column(Integer)
    canary_percent: Mapped[int | None] = mapped_column(Integer)


class VersionRow(Base):
    __tablename__ = "versions"
    __table_args__ = (
        UniqueConstraint("task_id", "version", name="uq_versions_task_id_version"),
        UniqueConstraint("task_id", "prefix_key", name="uq_versions_task_id_prefix_key"),
        Index("ix_versions_digest", "digest"),
        Index("ix_versions_config_digest", "config_digest"),
        Index("ix_versions_probes_digest", "probes_digest"),
    )

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    task_id: Mapped[int] = mapped_column(ForeignKey("tasks.id", name="fk_versions_task_id"))
    version: Mapped[int] = mapped_column(Integer)
    digest: Mapped[str] = mapped_column(String(64))
    config_digest: Mapped[str] = mapped_column(String(64))
    prefix_key: Mapped[str] = mapped_column(String(200))
    peft_type: Mapped[str] = mapped_column(String(40))
    kind: Mapped[str] = mapped_column(String(20))
    task_index: Mapped[int | None] = mapped_column(Integer)
    num_virtual_tokens: Mapped[int] = mapped_column(Integer)
    num_bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    created_by: Mapped[str] = mapped_column(String(200))
    backbone: Mapped[str] = mapped_column(String(64))
    quarantined_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    # "metadata" is taken by SQLAlchemy's declarative base.
    extra: Mapped[dict[str, Any]] = mapped_column("metadata", JSON)
    warnings: Mapped[list[str]] = mapped_column(JSON)
    # What the other columns do not say of an upload's origin; the default is for rows of releases that kept none.
    provenance: Mapped[dict[str, Any]] = mapped_column(JSON, server_default="{}")
    gate: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    probes_digest: Mapped[str | None] = mapped_column(String(64))


class ActivationRow(Base):
    """A stack for each task: its top is the active version, and a rollback takes the top away."""

    __tablename__ = "activations"
    __table_args__ = (Index("ix_activations_task_id", "task_id"),)

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    task_id: Mapped[int] = mapped_column(ForeignKey("tasks.id", name="fk_activations_task_id"))
    version: Mapped[int] = mapped_column(Integer)
    at: Mapped[datetime] = mapped_column(UtcDateTime)


class KeyRow(Base):
    __tablename__ = "keys"
    __table_args__ = (UniqueConstraint("secret_digest", name="uq_keys_secret_digest"),)

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(63))
    secret_digest: Mapped[str] = mapped_column(String(64))
    scopes: Mapped[list[str]] = mapped_column(JSON)
    label: Mapped[str] = mapped_column(String(200))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    revoked_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class AuditRow(Base):
    """Append-only. No foreign keys: an entry outlives what it speaks of."""

    __tablename__ = "audit"
    __table_args__ = (Index("ix_audit_tenant", "tenant"),)

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    at: Mapped[datetime] = mapped_column(UtcDateTime)
    tenant: Mapped[str] = mapped_column(String(63))
    actor: Mapped[str] = mapped_column(String(200))
    action: Mapped[str] = mapped_column(String(63))
    task: Mapped[str | None] = mapped_column(String(63))
    version: Mapped[int | None] = mapped_column(Integer)
    digest: Mapped[str | None] = mapped_column(String(64))
    detail: Mapped[dict[str, Any]] = mapped_column(JSON)


class QuotaRow(Base):
    """A tenant's own limits; None leaves one to the server's default."""

    __tablename__ = "quotas"

    tenant: Mapped[str] = mapped_column(String(63), primary_key=True)
    requests_per_minute: Mapped[int | None] = mapped_column(BigInteger)
    tokens_per_minute: Mapped[int | None] = mapped_column(BigInteger)
    max_running_rows: Mapped[int | None] = mapped_column(BigInteger)
    max_prompts: Mapped[int | None] = mapped_column(BigInteger)
    max_prompt_bytes: Mapped[int | None] = mapped_column(BigInteger)
    max_virtual_tokens: Mapped[int | None] = mapped_column(BigInteger)
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime)


class ReceiptRow(Base):
    """Append-only, the oldest dropped: which digest answered a request. No foreign keys, as in the audit log."""

    __tablename__ = "receipts"
    __table_args__ = (
        Index("ix_receipts_tenant_id", "tenant", "id"),
        Index("ix_receipts_request_id", "request_id"),
    )

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    at: Mapped[datetime] = mapped_column(UtcDateTime)
    request_id: Mapped[str] = mapped_column(String(128))
    tenant: Mapped[str] = mapped_column(String(63))
    key_id: Mapped[str | None] = mapped_column(String(40))
    endpoint: Mapped[str] = mapped_column(String(200))
    # The tenant that owns the task; with it all that names a prompt is None for the bare backbone.
    owner: Mapped[str | None] = mapped_column(String(63))
    task: Mapped[str | None] = mapped_column(String(63))
    version: Mapped[int | None] = mapped_column(Integer)
    digest: Mapped[str | None] = mapped_column(String(64))
    num_rows: Mapped[int] = mapped_column(Integer)
    prompt_tokens: Mapped[int] = mapped_column(BigInteger)
    completion_tokens: Mapped[int] = mapped_column(BigInteger)
    outcome: Mapped[str] = mapped_column(String(200))
