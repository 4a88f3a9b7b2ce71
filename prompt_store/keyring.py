"""API keys: made, verified, listed, revoked. A secret is shown once; the store keeps its SHA-256 alone.

The secrets are 256 random bits, so that a fast digest without salt gives nothing away.
"""

import hashlib
import hmac
import secrets
from collections.abc import Collection
from datetime import UTC, datetime

from sqlalchemy import select

from prompt_store.audit import append_audit
from prompt_store.database import Database
from prompt_store.errors import InvalidValue, KeyNotFound
from prompt_store.manifest import SCOPES, Key
from prompt_store.models import KeyRow
from prompt_store.names import check_tenant_name, check_text, shorten

SECRET_PREFIX = "pm_"  # noqa: S105
_MAX_SECRET_CHARS = 200


class Keyring:
    def __init__(self, database: Database) -> None:
        self._database = database

    def create_key(self, tenant: str, scopes: Collection[str], label: str, actor: str) -> tuple[Key, str]:
        """A new key and its secret. Raises InvalidName or InvalidValue."""
        check_tenant_name(tenant)
        check_text(label, "label")
        if isinstance(scopes, str) or not scopes or not set(scopes) <= SCOPES:
            raise InvalidValue(f"scopes must be some of {', '.join(sorted(SCOPES))}", param="scopes")
        secret = SECRET_PREFIX + secrets.token_urlsafe(32)
        row = KeyRow(
            id=f"key_{secrets.token_hex(8)}",
            tenant=tenant,
            secret_digest=digest_secret(secret),
            scopes=sorted(set(scopes)),
            label=label,
            created_at=datetime.now(UTC),
            revoked_at=None,
        )
        with self._database.writing() as session:
            session.add(row)
            append_audit(
                session, tenant, actor=actor, action="create_key", detail={"key": row.id, "scopes": row.scopes}
            )
        return _to_key(row), secret

    def verify_key(self, secret: str) -> Key | None:
        """The key that `secret` proves, None if there is none or it was revoked."""
        if len(secret) > _MAX_SECRET_CHARS:
            return None
        digest = digest_secret(secret)
        with self._database.reading() as session:
            row = session.scalar(select(KeyRow).where(KeyRow.secret_digest == digest))
        # The look-up by digest leaks no timing about secrets; the comparison keeps that true of any database.
        if row is None or not hmac.compare_digest(row.secret_digest, digest) or row.revoked_at is not None:
            return None
        return _to_key(row)

    def list_keys(self) -> list[Key]:
        """All keys, revoked ones too, oldest first."""
        with self._database.reading() as session:
            return [_to_key(row) for row in session.scalars(select(KeyRow).order_by(KeyRow.created_at, KeyRow.id))]

    def revoke_key(self, key_id: str, actor: str) -> Key:
        """Revoke a key; a second time changes nothing. Raises KeyNotFound."""
        with self._database.writing() as session:
            row = session.get(KeyRow, key_id)
            if row is None:
                raise KeyNotFound(f"There is no key {shorten(key_id, 60)!r}.", param="id")
            if row.revoked_at is None:
                row.revoked_at = datetime.now(UTC)
                append_audit(session, row.tenant, actor=actor, action="revoke_key", detail={"key": row.id})
        return _to_key(row)

    def has_keys(self) -> bool:
        """True once any key was made, also when all are revoked: revoking the last must not open the server."""
        with self._database.reading() as session:
            return session.scalar(select(KeyRow.id).limit(1)) is not None


def digest_secret(secret: str) -> str:
    """What the store keeps of a secret, and the only form in which one may be remembered."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _to_key(row: KeyRow) -> Key:
    return Key(
        id=row.id,
        tenant=row.tenant,
        scopes=frozenset(row.scopes),
        created_at=row.created_at,
        revoked_at=row.revoked_at,
        label=row.label,
    )
