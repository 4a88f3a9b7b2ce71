"""Files of examples, training jobs, and the jobs' events.

Revision ID: 0004
Revises: 0003
"""

import sqlalchemy as sa
from alembic import op

revision: str = "0004"
down_revision: str | None = "0003"
branch_labels: str | None = None
depends_on: str | None = None

_ROW_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "training_files",
        sa.Column("serial", _ROW_ID, primary_key=True),
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("filename", sa.String(200), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("num_bytes", sa.BigInteger(), nullable=False),
        sa.Column("num_examples", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_by", sa.String(200), nullable=False),
        sa.UniqueConstraint("id", name="uq_training_files_id"),
    )
    op.create_index("ix_training_files_tenant_serial", "training_files", ["tenant", "serial"])
    op.create_index("ix_training_files_digest", "training_files", ["digest"])
    op.create_table(
        "training_jobs",
        sa.Column("serial", _ROW_ID, primary_key=True),
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("task", sa.String(63), nullable=False),
        sa.Column("status", sa.String(20), nullable=False),
        sa.Column("training_file", sa.String(40), nullable=False),
        sa.Column("validation_file", sa.String(40), nullable=True),
        sa.Column("data_digest", sa.String(64), nullable=False),
        sa.Column("spec", sa.JSON(), nullable=False),
        sa.Column("result", sa.JSON(), nullable=True),
        sa.Column("error", sa.JSON(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_by", sa.String(200), nullable=False),
        sa.Column("trained_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("runner", sa.String(40), nullable=True),
        sa.Column("seen_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("num_starts", sa.Integer(), nullable=False),
        sa.UniqueConstraint("id", name="uq_training_jobs_id"),
    )
    op.create_index("ix_training_jobs_tenant_serial", "training_jobs", ["tenant", "serial"])
    op.create_index("ix_training_jobs_status", "training_jobs", ["status"])
    op.create_table(
        "training_events",
        sa.Column("serial", _ROW_ID, primary_key=True),
        sa.Column(
            "job_serial",
            _ROW_ID,
            sa.ForeignKey("training_jobs.serial", name="fk_training_events_job_serial"),
            nullable=False,
        ),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("level", sa.String(10), nullable=False),
        sa.Column("type", sa.String(10), nullable=False),
        sa.Column("message", sa.String(1000), nullable=False),
        sa.Column("data", sa.JSON(), nullable=False),
    )
    op.create_index("ix_training_events_job_serial", "training_events", ["job_serial", "serial"])


def downgrade() -> None:
    for table in ("training_events", "training_jobs", "training_files"):
        op.drop_table(table)
