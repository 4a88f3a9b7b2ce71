"""The tables that only PostgreSQL has, where several replicas share one store. The migrations are what creates them."""

from datetime import datetime

from sqlalchemy import BigInteger, LargeBinary, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from prompt_store.models import UtcDateTime


class SharedBase(DeclarativeBase):
    pass


class BlobRow(SharedBase):
    """Bytes by the SHA-256 of their content. `data` is kept out of line and uncompressed (STORAGE EXTERNAL)."""

    __tablename__ = "blobs"

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    data: Mapped[bytes] = mapped_column(LargeBinary)


class ChangeRow(SharedBase):
    """One committed change of what names mean, in the order of commits and without gaps (`prompt_store.changes`).

    `origin` is the replica that made it; `task` is None for a change that no task's name tells of, and `tenant` too for
    one of keys or quotas.
    """

    __tablename__ = "changes"

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    at: Mapped[datetime] = mapped_column(UtcDateTime)
    origin: Mapped[str] = mapped_column(String(32))
    tenant: Mapped[str | None] = mapped_column(String(63))
    task: Mapped[str | None] = mapped_column(String(63))
