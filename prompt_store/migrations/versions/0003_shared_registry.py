"""What several replicas on one PostgreSQL share beyond the catalog: the bytes of prompts, and the log of changes.

On SQLite nothing changes: there the bytes are files, and one process serves them.

Revision ID: 0003
Revises: 0002
"""

import sqlalchemy as sa
from alembic import op

revision: str = "0003"
down_revision: str | None = "0002"
branch_labels: str | None = None
depends_on: str | None = None

# What pages of names are sorted by: a language's collation would neither follow the order of code points, by which
# pages are merged, nor stay the same from one release of the system's libraries to the next.
_SORTED_COLUMNS = (("tasks", "tenant", 63), ("tasks", "name", 63), ("quotas", "tenant", 63), ("keys", "id", 40))


def upgrade() -> None:
    if not _is_postgresql():
        return
    op.create_table(
        "blobs",
        sa.Column("digest", sa.String(64), primary_key=True),
        sa.Column("data", sa.LargeBinary(), nullable=False),
    )
    # Numbers do not compress: trying costs time at each upload and, worse, at each load.
    op.execute("ALTER TABLE blobs ALTER COLUMN data SET STORAGE EXTERNAL")
    op.create_table(
        "changes",
        sa.Column("id", sa.BigInteger(), primary_key=True, autoincrement=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("origin", sa.String(32), nullable=False),
        sa.Column("tenant", sa.String(63), nullable=True),
        sa.Column("task", sa.String(63), nullable=True),
    )
    _collate("C")


def downgrade() -> None:
    if not _is_postgresql():
        return
    _collate("default")
    op.drop_table("changes")
    op.drop_table("blobs")


def _is_postgresql() -> bool:
    return op.get_bind().dialect.name == "postgresql"


def _collate(collation: str) -> None:
    for table, column, length in _SORTED_COLUMNS:
        op.execute(f'ALTER TABLE {table} ALTER COLUMN {column} TYPE varchar({length}) COLLATE "{collation}"')
