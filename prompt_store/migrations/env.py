"""Alembic's entry: runs the migrations on the connection that `prompt_store.migrate` hands over."""

from alembic import context
from sqlalchemy import Connection

from prompt_store.models import Base

connection: Connection | None = context.config.attributes.get("connection")
if connection is None:
    raise RuntimeError("run migrations through prompt_store.migrate, which hands over a connection")

context.configure(
    connection=connection,
    target_metadata=Base.metadata,
    # SQLite can alter a table only by copying it.
    render_as_batch=True,
    # SQLite's schema changes are transactional once BEGIN is sent: a killed migration leaves nothing behind.
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
