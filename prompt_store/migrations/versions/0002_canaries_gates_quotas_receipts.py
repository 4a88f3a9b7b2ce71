"""Canaries, provenance, gates and probes of versions; quotas of tenants; receipts of requests.

Columns are added and dropped in place: SQLite would otherwise copy a table that others refer to.

Revision ID: 0002
Revises: 0001
"""

import sqlalchemy as sa
from alembic import op

revision: str = "0002"
down_revision: str | None = "0001"
branch_labels: str | None = None
depends_on: str | None = None

_ROW_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_LIMITS = (
    "requests_per_minute",
    "tokens_per_minute",
    "max_running_rows",
    "max_prompts",
    "max_prompt_bytes",
    "max_virtual_tokens",
)


def upgrade() -> None:
    op.add_column("tasks", sa.Column("canary_version", sa.Integer(), nullable=True))
    op.add_column("tasks", sa.Column("canary_percent", sa.Integer(), nullable=True))
    op.create_index("ix_tasks_pinned", "tasks", ["pinned"])
    op.add_column("versions", sa.Column("provenance", sa.JSON(), nullable=False, server_default="{}"))
    op.add_column("versions", sa.Column("gate", sa.JSON(), nullable=True))
    op.add_column("versions", sa.Column("probes_digest", sa.String(64), nullable=True))
    op.create_index("ix_versions_probes_digest", "versions", ["probes_digest"])
    op.create_table(
        "quotas",
        sa.Column("tenant", sa.String(63), primary_key=True),
        *(sa.Column(name, sa.BigInteger(), nullable=True) for name in _LIMITS),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_table(
        "receipts",
        sa.Column("id", _ROW_ID, primary_key=True),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("request_id", sa.String(128), nullable=False),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("key_id", sa.String(40), nullable=True),
        sa.Column("endpoint", sa.String(200), nullable=False),
        sa.Column("owner", sa.String(63), nullable=True),
        sa.Column("task", sa.String(63), nullable=True),
        sa.Column("version", sa.Integer(), nullable=True),
        sa.Column("digest", sa.String(64), nullable=True),
        sa.Column("num_rows", sa.Integer(), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("completion_tokens", sa.BigInteger(), nullable=False),
        sa.Column("outcome", sa.String(200), nullable=False),
    )
    op.create_index("ix_receipts_tenant_id", "receipts", ["tenant", "id"])
    op.create_index("ix_receipts_request_id", "receipts", ["request_id"])


def downgrade() -> None:
    op.drop_table("receipts")
    op.drop_table("quotas")
    op.drop_index("ix_versions_probes_digest", "versions")
    for column in ("probes_digest", "gate", "provenance"):
        op.drop_column("versions", column)
    op.drop_index("ix_tasks_pinned", "tasks")
    for column in ("canary_percent", "canary_version"):
        op.drop_column("tasks", column)
