"""`GET /v1/audit`: who changed what, and which prompt answered which request, as JSON lines."""

import json
from collections.abc import AsyncIterator, Iterator
from itertools import islice
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import StreamingResponse

from prompt_store.manifest import AuditEntry, Receipt
from server import errors
from server.api.common_schemas import documented_errors
from server.api.dependencies import CurrentCaller, ReadyRuntime
from server.api.strict_json import StrictJSONRoute
from server.errors import InvalidRequestError
from server.runtime.service import Runtime

MAX_LINES = 10_000
LINES_PER_CHUNK = 500
EVERY_TENANT = "*"
MEDIA_TYPE = "application/x-ndjson"

router = APIRouter(route_class=StrictJSONRoute, tags=["audit"])


class AuditPage(BaseModel):
    """The query of the audit log."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["changes", "receipts"] = Field(
        "changes", description="changes: who changed what. receipts: which prompt answered which request."
    )
    after: int = Field(0, ge=0, le=2**63 - 1, description="The last id of the page before.")
    limit: int = Field(1000, ge=1, le=MAX_LINES)
    tenant: str | None = Field(
        None, max_length=63, description="Whose lines: left out, the key's own tenant's; `*`, every tenant's."
    )
    task: str | None = Field(None, max_length=63, description="One task's alone.")
    request_id: str | None = Field(
        None, max_length=128, description="Receipts of one request, by the `x-request-id` of its response."
    )


@router.get(
    "/v1/audit",
    summary="The audit log",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "One JSON object a line, oldest first; the next page is `after` the last one's `id`.",
            "content": {MEDIA_TYPE: {"schema": {"type": "string"}}},
        },
        **documented_errors(errors.InvalidRequestError, errors.PermissionDeniedError),
    },
)
async def get_audit(
    page: Annotated[AuditPage, Query()], runtime: ReadyRuntime, caller: CurrentCaller
) -> StreamingResponse:
    """Needs the scope `admin`, which is the server's operator's: it may ask for any tenant's lines.

    A change is written in the transaction that makes it. Receipts are written shortly after a request has ended; beyond
    the setting `receipts_max_rows` the oldest are dropped.
    """
    if page.kind == "changes" and page.request_id is not None:
        raise InvalidRequestError("request_id: changes have none; it is for receipts", param="request_id")
    tenant = None if page.tenant == EVERY_TENANT else page.tenant or caller.tenant
    tasks = runtime.parts.tasks
    lines: Iterator[bytes]
    if page.kind == "changes":
        lines = map(_change_line, tasks.iter_changes(tenant, after=page.after, task=page.task))
    else:
        receipts = tasks.iter_receipts(tenant, after=page.after, task=page.task, request_id=page.request_id)
        lines = map(_receipt_line, receipts)
    chunks = _join(islice(lines, page.limit))
    # Read before the status is sent: a store that cannot be read is a 503, and not a 200 without lines.
    first = await runtime.call(next, chunks, None)
    return StreamingResponse(_stream(runtime, first, chunks), media_type=MEDIA_TYPE)


async def _stream(runtime: Runtime, first: bytes | None, chunks: Iterator[bytes]) -> AsyncIterator[bytes]:
    chunk = first
    while chunk is not None:
        yield chunk
        chunk = await runtime.call(next, chunks, None)


def _join(lines: Iterator[bytes]) -> Iterator[bytes]:
    while chunk := b"".join(islice(lines, LINES_PER_CHUNK)):
        yield chunk


def _change_line(entry: AuditEntry) -> bytes:
    return _line(
        {
            "object": "change",
            "id": entry.id,
            "at": entry.at.isoformat(),
            "tenant": entry.tenant,
            "actor": entry.actor,
            "action": entry.action,
            "task": entry.task,
            "version": entry.version,
            "digest": entry.digest,
            "detail": dict(entry.detail),
        }
    )


def _receipt_line(receipt: Receipt) -> bytes:
    return _line(
        {
            "object": "receipt",
            "id": receipt.id,
            "at": receipt.at.isoformat(),
            "request_id": receipt.request_id,
            "tenant": receipt.tenant,
            "key_id": receipt.key_id,
            "endpoint": receipt.endpoint,
            "owner": receipt.owner,
            "task": receipt.task,
            "version": receipt.version,
            "digest": receipt.digest,
            "num_rows": receipt.num_rows,
            "prompt_tokens": receipt.prompt_tokens,
            "completion_tokens": receipt.completion_tokens,
            "outcome": receipt.outcome,
        }
    )


def _line(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n"
