"""`/v1/tenants`, `/v1/quota` and `/v1/reload`: what tenants may use and do use, and settings read anew.

Other tenants' limits need the scope `admin`, which is the operator's; the own ones any key that may infer.
"""

from typing import Annotated, Literal, Self

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, ConfigDict, Field

from prompt_store.manifest import Quota, StoredAmounts
from prompt_store.names import check_tenant_name
from server import errors
from server.api.common_schemas import documented_errors
from server.api.dependencies import AnyRuntime, CurrentCaller
from server.api.strict_json import StrictJSONRoute
from server.runtime.service import Runtime
from server.runtime.store_errors import client_errors
from server.tenancy.quotas import LIMIT_NAMES, Limits

router = APIRouter(route_class=StrictJSONRoute, tags=["tenants"])

MAX_LIMIT = 10**15
MAX_PAGE = 1000
TenantName = Annotated[str, Path(max_length=63)]
Limit = Annotated[int | None, Field(ge=0, le=MAX_LIMIT)]


class TenantPage(BaseModel):
    """The query of the list of tenants."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(100, ge=1, le=MAX_PAGE)
    after: str | None = Field(None, max_length=63, description="The last tenant of the page before.")


class QuotaFields(BaseModel):
    """Null leaves a limit to the server's default."""

    requests_per_minute: Limit = None
    tokens_per_minute: Limit = Field(None, description="Of prompts and of answers.")
    max_running_rows: Limit = Field(None, description="Sequences that run or wait at once.")
    max_prompts: Limit = Field(None, description="Versions that are stored.")
    max_prompt_bytes: Limit = Field(None, description="Bytes of their files together.")
    max_virtual_tokens: Limit = Field(None, description="Their virtual tokens together.")


class QuotaRequest(QuotaFields):
    """All of the tenant's limits: one that is left out is null."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={"examples": [{"requests_per_minute": 600, "tokens_per_minute": 200_000}]},
    )


class InForce(QuotaFields):
    """The tenant's own limits, and the server's defaults where it has none; null is no limit."""


class Usage(BaseModel):
    """Now, on this server: of this minute's requests and tokens, what the buckets lack to being full."""

    requests_per_minute: int
    tokens_per_minute: int
    running_rows: int
    prompts: int
    prompt_bytes: int
    virtual_tokens: int


class QuotaObject(QuotaFields):
    """The limits that the tenant has of its own."""

    object: Literal["quota"] = "quota"
    tenant: str
    updated: int | None = Field(description="When they were set (Unix time); null if never.")
    in_force: InForce
    usage: Usage

    @classmethod
    def of(cls, tenant: str, quota: Quota | None, in_force: Limits, amounts: StoredAmounts, runtime: Runtime) -> Self:
        use = runtime.quotas.use_of(tenant)
        own = {name: getattr(quota, name) for name in LIMIT_NAMES} if quota is not None else {}
        updated_at = quota.updated_at if quota is not None else None
        return cls(
            tenant=tenant,
            updated=None if updated_at is None else int(updated_at.timestamp()),
            in_force=InForce(**{name: getattr(in_force, name) for name in LIMIT_NAMES}),
            usage=Usage(
                requests_per_minute=use.requests,
                tokens_per_minute=use.tokens,
                running_rows=use.rows,
                prompts=amounts.num_prompts,
                prompt_bytes=amounts.num_bytes,
                virtual_tokens=amounts.num_virtual_tokens,
            ),
            **own,
        )


class TenantList(BaseModel):
    object: Literal["list"] = "list"
    data: list[QuotaObject]
    has_more: bool


class ReloadObject(BaseModel):
    object: Literal["reload"] = "reload"
    changed: list[str] = Field(description="Settings that are new and in force.")
    needs_restart: list[str] = Field(description="Settings that are new and not in force before a restart.")


@router.get("/v1/tenants", summary="List tenants", responses=documented_errors(errors.InvalidRequestError))
async def list_tenants(page: Annotated[TenantPage, Query()], runtime: AnyRuntime, caller: CurrentCaller) -> TenantList:
    """Those that have keys, prompts or limits, or were seen since the start; by name, with limits and use."""
    with client_errors():
        return await runtime.call(_list_tenants, runtime, page)


@router.get(
    "/v1/tenants/{tenant}/quota", summary="A tenant's limits", responses=documented_errors(errors.InvalidRequestError)
)
async def get_tenant_quota(tenant: TenantName, runtime: AnyRuntime, caller: CurrentCaller) -> QuotaObject:
    """Its own, those in force, and what it uses. A tenant that nobody has heard of has the defaults."""
    with client_errors():
        return await runtime.call(_quota_of, runtime, check_tenant_name(tenant))


@router.put(
    "/v1/tenants/{tenant}/quota",
    summary="Set a tenant's limits",
    responses=documented_errors(errors.InvalidRequestError, errors.StorageFullError, errors.UnavailableError),
)
async def set_tenant_quota(
    tenant: TenantName, body: QuotaRequest, runtime: AnyRuntime, caller: CurrentCaller
) -> QuotaObject:
    """All at once, in force at once here, and within a second on other servers of the same store.

    What runs goes on; what is stored stays, also when it is more than is now allowed.
    """
    quota = Quota(tenant=tenant, **body.model_dump())
    with client_errors():
        await runtime.call(runtime.store.set_quota, quota, actor=caller.key_id or "")
        return await runtime.call(_quota_of, runtime, tenant)


@router.get("/v1/quota", summary="The caller's own limits", responses=documented_errors())
async def get_own_quota(runtime: AnyRuntime, caller: CurrentCaller) -> QuotaObject:
    """Its tenant's limits, and what it uses."""
    with client_errors():
        return await runtime.call(_quota_of, runtime, caller.tenant)


@router.post("/v1/reload", summary="Read the settings anew", responses=documented_errors(errors.InvalidRequestError))
async def reload(runtime: AnyRuntime, caller: CurrentCaller) -> ReloadObject:
    """The configuration file and the environment, as SIGHUP does. Wrong ones are refused, all of them."""
    reloaded = runtime.reload()
    return ReloadObject(changed=list(reloaded.changed), needs_restart=list(reloaded.needs_restart))


def _quota_of(runtime: Runtime, tenant: str) -> QuotaObject:
    quota = runtime.store.get_quota(tenant)
    amounts = runtime.store.stored_amounts(tenant).get(tenant, StoredAmounts())
    return QuotaObject.of(tenant, quota, runtime.quotas.refresh(tenant), amounts, runtime)


def _list_tenants(runtime: Runtime, page: TenantPage) -> TenantList:
    store = runtime.store
    quotas = {quota.tenant: quota for quota in store.list_quotas()}
    amounts = store.stored_amounts()
    names = {*quotas, *amounts, *runtime.quotas.tenants(), *(key.tenant for key in store.list_keys())}
    left = sorted(name for name in names if page.after is None or name > page.after)
    found = left[: page.limit]
    defaults = runtime.quotas.defaults
    data = [
        QuotaObject.of(
            name, quotas.get(name), defaults.under(quotas.get(name)), amounts.get(name, StoredAmounts()), runtime
        )
        for name in found
    ]
    return TenantList(data=data, has_more=len(left) > len(found))
