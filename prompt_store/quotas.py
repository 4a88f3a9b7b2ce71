"""What tenants may use: limits kept, listed and changed. Who holds a tenant to them is not known here."""

from dataclasses import replace
from datetime import UTC, datetime

from sqlalchemy import func, select

from prompt_store.audit import append_audit
from prompt_store.database import Database
from prompt_store.errors import InvalidValue
from prompt_store.manifest import Quota, StoredAmounts
from prompt_store.models import QuotaRow, TaskRow, VersionRow
from prompt_store.names import check_tenant_name

LIMITS = (
    "requests_per_minute",
    "tokens_per_minute",
    "max_running_rows",
    "max_prompts",
    "max_prompt_bytes",
    "max_virtual_tokens",
)
MAX_LIMIT = 10**15


class Quotas:
    def __init__(self, database: Database) -> None:
        self._database = database

    def get_quota(self, tenant: str) -> Quota | None:
        """None for a tenant that has none of its own."""
        with self._database.reading() as session:
            row = session.get(QuotaRow, tenant)
            return None if row is None else _to_quota(row)

    def set_quota(self, quota: Quota, actor: str) -> Quota:
        """Put it in the place of the tenant's former one. Raises InvalidName or InvalidValue."""
        check_tenant_name(quota.tenant)
        limits: dict[str, int | None] = {name: getattr(quota, name) for name in LIMITS}
        for name, limit in limits.items():
            if limit is not None and not 0 <= limit <= MAX_LIMIT:
                raise InvalidValue(f"{name} must be from 0 to {MAX_LIMIT}.", param=name)
        stored = replace(quota, updated_at=datetime.now(UTC))
        with self._database.writing() as session:
            session.merge(QuotaRow(tenant=quota.tenant, updated_at=stored.updated_at, **limits))
            append_audit(session, quota.tenant, actor=actor, action="set_quota", detail=limits)
        return stored

    def list_quotas(self) -> list[Quota]:
        """Those of all tenants that have one, by tenant."""
        with self._database.reading() as session:
            return [_to_quota(row) for row in session.scalars(select(QuotaRow).order_by(QuotaRow.tenant))]

    def amounts(self, tenant: str | None = None) -> dict[str, StoredAmounts]:
        """What tenants have stored, or one of them; those with no version are left out."""
        query = (
            select(
                TaskRow.tenant,
                func.count(VersionRow.id),
                func.sum(VersionRow.num_bytes),
                func.sum(VersionRow.num_virtual_tokens),
            )
            .join(VersionRow, VersionRow.task_id == TaskRow.id)
            .group_by(TaskRow.tenant)
            .order_by(TaskRow.tenant)
        )
        with self._database.reading() as session:
            rows = session.execute(query if tenant is None else query.where(TaskRow.tenant == tenant))
            return {
                # PostgreSQL adds up 64-bit numbers to decimals.
                name: StoredAmounts(
                    num_prompts=num_prompts, num_bytes=int(num_bytes), num_virtual_tokens=int(num_virtual_tokens)
                )
                for name, num_prompts, num_bytes, num_virtual_tokens in rows
            }


def _to_quota(row: QuotaRow) -> Quota:
    return Quota(tenant=row.tenant, updated_at=row.updated_at, **{name: getattr(row, name) for name in LIMITS})
