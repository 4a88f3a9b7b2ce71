"""`/v1/keys`: API keys made, listed and revoked while the server runs.

All of it needs the scope `admin`, which is the operator's: such a key acts for any tenant. A secret is shown in the
answer that makes it and never again.
"""

import threading
from collections.abc import Sequence
from typing import Annotated, Literal, Self

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, ConfigDict, Field

from prompt_store.manifest import Key
from server import errors
from server.api.common_schemas import documented_errors
from server.api.dependencies import AnyRuntime, CurrentCaller
from server.api.strict_json import StrictJSONRoute
from server.errors import ConflictError, InvalidRequestError
from server.runtime.service import Runtime
from server.runtime.store_errors import client_errors
from server.tenancy.keys import Caller

router = APIRouter(route_class=StrictJSONRoute, tags=["tenants"])

KeyScope = Literal["infer", "write", "admin"]
MAX_PAGE = 1000
KeyId = Annotated[str, Path(max_length=40)]

# Two admin keys revoked at once must not both be taken for one of two.
_revoking = threading.Lock()


class KeyPage(BaseModel):
    """The query of the list of keys."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(100, ge=1, le=MAX_PAGE)
    after: str | None = Field(None, max_length=40, description="The last id of the page before.")


class RevokeQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    force: bool = Field(False, description="Revoke it although no other key has the scope `admin`.")


class KeyRequest(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={"examples": [{"tenant": "acme", "scopes": ["infer", "write"], "label": "ci"}]},
    )

    tenant: str | None = Field(None, max_length=63, description="Default: the caller's own.")
    scopes: list[KeyScope] = Field(min_length=1, max_length=3)
    label: str = Field("", max_length=200, description="A note for people.")


class KeyObject(BaseModel):
    object: Literal["key"] = "key"
    id: str
    tenant: str
    scopes: list[KeyScope]
    label: str
    created: int
    revoked: int | None = Field(description="When it was revoked (Unix time); null while it works.")

    @classmethod
    def of(cls, key: Key) -> Self:
        return cls.model_validate(_fields_of(key))


class NewKeyObject(KeyObject):
    secret: str = Field(description="What clients send as `Authorization: Bearer`. It is not shown again.")


class KeyList(BaseModel):
    object: Literal["list"] = "list"
    data: list[KeyObject]
    has_more: bool


@router.post(
    "/v1/keys",
    status_code=201,
    summary="Make a key",
    responses=documented_errors(errors.InvalidRequestError, errors.StorageFullError, errors.UnavailableError),
)
async def create_key(body: KeyRequest, runtime: AnyRuntime, caller: CurrentCaller) -> NewKeyObject:
    """The first key of a server without keys must have the scope `admin`, since from then on all need one."""
    if runtime.keys.is_keyless and "admin" not in body.scopes:
        raise InvalidRequestError(
            "scopes: the server's first key must have the scope 'admin', or nobody could make another.", param="scopes"
        )
    with client_errors():
        key, secret = await runtime.call(
            runtime.store.create_key,
            body.tenant if body.tenant is not None else caller.tenant,
            body.scopes,
            body.label,
            actor=caller.key_id or "",
        )
    runtime.keys.require_keys()
    return NewKeyObject.model_validate({**_fields_of(key), "secret": secret})


@router.get("/v1/keys", summary="List keys", responses=documented_errors(errors.InvalidRequestError))
async def list_keys(page: Annotated[KeyPage, Query()], runtime: AnyRuntime, caller: CurrentCaller) -> KeyList:
    """Of all tenants, revoked ones too, oldest first; never their secrets."""
    with client_errors():
        keys = await runtime.call(runtime.store.list_keys)
    ids = [key.id for key in keys]
    if page.after is not None and page.after not in ids:
        raise InvalidRequestError("after: there is no such key.", param="after")
    start = ids.index(page.after) + 1 if page.after is not None else 0
    found = keys[start : start + page.limit]
    return KeyList(data=[KeyObject.of(key) for key in found], has_more=start + page.limit < len(keys))


@router.delete(
    "/v1/keys/{key_id}",
    summary="Revoke a key",
    responses=documented_errors(errors.InvalidRequestError, errors.NotFoundError, errors.ConflictError),
)
async def revoke_key(
    key_id: KeyId, query: Annotated[RevokeQuery, Query()], runtime: AnyRuntime, caller: CurrentCaller
) -> KeyObject:
    """This server refuses it from now on, others on the same store within a second.

    409 for the last key with the scope `admin`, unless `force` says so: then new keys are made on the store's folder.
    """
    with client_errors():
        key = await runtime.call(_revoke, runtime, key_id, caller, is_forced=query.force)
    runtime.keys.forget(key_id)
    return KeyObject.of(key)


def _revoke(runtime: Runtime, key_id: str, caller: Caller, *, is_forced: bool) -> Key:
    with _revoking:
        if not is_forced:
            _check_not_last_admin(key_id, runtime.store.list_keys())
        return runtime.store.revoke_key(key_id, actor=caller.key_id or "")


def _check_not_last_admin(key_id: str, keys: Sequence[Key]) -> None:
    admins = [key.id for key in keys if key.revoked_at is None and "admin" in key.scopes]
    if admins == [key_id]:
        raise ConflictError(
            "It is the last key with the scope 'admin'; ?force=true revokes it all the same.", code="last_admin_key"
        )


def _fields_of(key: Key) -> dict[str, object]:
    return {
        "id": key.id,
        "tenant": key.tenant,
        "scopes": sorted(key.scopes),
        "label": key.label,
        "created": int(key.created_at.timestamp()),
        "revoked": None if key.revoked_at is None else int(key.revoked_at.timestamp()),
    }
