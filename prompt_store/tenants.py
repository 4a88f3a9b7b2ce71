"""The store's doors to what is not a prompt: keys, quotas, the audit log and receipts.

Owns the locking around them. What a key is, what a quota holds and how the logs are kept is in `keyring`, `quotas`,
`audit` and `receipts`.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from prompt_store.audit import append_audit, iter_audit
from prompt_store.base import StoreBase
from prompt_store.faults import storage_errors
from prompt_store.keyring import Keyring, digest_secret
from prompt_store.manifest import AuditEntry, Key, Quota, Receipt, StoredAmounts
from prompt_store.names import check_text
from prompt_store.quotas import Quotas
from prompt_store.receipts import Receipts


class TenantStore(StoreBase):
    # Keys

    def create_key(self, tenant: str, scopes: Collection[str], label: str = "", *, actor: str = "") -> tuple[Key, str]:
        """A new key and its secret, which is not kept. Raises InvalidName or InvalidValue."""
        with storage_errors(), self._changing():
            return Keyring(self._database).create_key(tenant, scopes, label, check_text(actor, "actor"))

    def verify_key(self, secret: str) -> Key | None:
        """The key that `secret` proves; None for a wrong or revoked one.

        While a shared database is away, what it said last of a good key counts, as long as it may be believed.
        """
        return self._last_known.ask(
            ("key", digest_secret(secret)),
            lambda: Keyring(self._database).verify_key(secret),
            keeps=lambda key: key is not None,
        )

    def list_keys(self) -> list[Key]:
        """All keys, revoked ones too, oldest first."""
        return Keyring(self._database).list_keys()

    def revoke_key(self, key_id: str, *, actor: str = "") -> Key:
        """Idempotent. Raises KeyNotFound."""
        with storage_errors(), self._changing():
            return Keyring(self._database).revoke_key(key_id, check_text(actor, "actor"))

    def has_keys(self) -> bool:
        """True once any key was made, also when all are revoked: revoking the last must not open the server."""
        return self._last_known.ask("has keys", Keyring(self._database).has_keys)

    # Quotas

    def get_quota(self, tenant: str) -> Quota | None:
        """None for a tenant that has none of its own. While a shared database is away, as `verify_key`."""
        return self._last_known.ask(("quota", tenant), lambda: Quotas(self._database).get_quota(tenant))

    def set_quota(self, quota: Quota, *, actor: str = "") -> Quota:
        """Put it in the place of the tenant's former one. Raises InvalidName or InvalidValue."""
        with storage_errors(), self._changing():
            return Quotas(self._database).set_quota(quota, check_text(actor, "actor"))

    def list_quotas(self) -> list[Quota]:
        """Those of all tenants that have one, by tenant."""
        return Quotas(self._database).list_quotas()

    def stored_amounts(self, tenant: str | None = None) -> dict[str, StoredAmounts]:
        """What tenants have stored, or one of them; those with no version are left out."""
        return Quotas(self._database).amounts(tenant)

    # Audit log and receipts

    def audit(
        self,
        tenant: str,
        *,
        actor: str,
        action: str,
        task: str | None = None,
        version: int | None = None,
        digest: str | None = None,
        detail: Mapping[str, Any] | None = None,
    ) -> None:
        """Append an entry of the caller's own. What this class does, it logs by itself."""
        with storage_errors(), self._appending("audit"), self._database.writing() as session:
            append_audit(
                session, tenant, actor=actor, action=action, task=task, version=version, digest=digest, detail=detail
            )

    def iter_audit(self, tenant: str | None = None, *, after: int = 0, task: str | None = None) -> Iterator[AuditEntry]:
        """Entries with an id above `after`, oldest first, of one tenant or (None) of all, and of one task if given."""
        return iter_audit(self._database, tenant, after, task)

    def append_receipts(self, receipts: Sequence[Receipt], *, max_rows: int) -> None:
        """All of them or, on an error, none; of those kept then, the newest `max_rows` stay."""
        with storage_errors(), self._appending("receipts"):
            Receipts(self._database).append(receipts, max_rows)

    def iter_receipts(
        self, tenant: str | None = None, *, after: int = 0, request_id: str | None = None, task: str | None = None
    ) -> Iterator[Receipt]:
        """Receipts with an id above `after`, oldest first, that match all that is given."""
        return Receipts(self._database).iterate(tenant, after=after, request_id=request_id, task=task)
