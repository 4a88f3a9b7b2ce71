"""`/v1/files`: files of examples to make prompts from, as OpenAI's clients upload them."""

from typing import Annotated, Literal, Self

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from prompt_store.training_values import TrainingFile
from server import errors
from server.api.common_schemas import documented_errors
from server.api.dependencies import CurrentCaller, ReadyRuntime
from server.api.upload_form import receive_form, to_training_file

MAX_FILES = 10_000
MAX_ID_CHARS = 64

router = APIRouter(tags=["training"])

OPENAPI_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "additionalProperties": False,
                    "properties": {
                        "file": {
                            "type": "string",
                            "format": "binary",
                            "description": 'JSON lines, all of one kind: `{"prompt", "completion"}`, `{"text", '
                            '"label"}` or `{"messages": [{"role", "content"}, …]}`.',
                        },
                        "purpose": {"type": "string", "enum": ["fine-tune"]},
                    },
                }
            }
        },
    }
}


class FilePage(BaseModel):
    """The query of the list of files."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(MAX_FILES, ge=1, le=MAX_FILES)
    after: str | None = Field(None, max_length=MAX_ID_CHARS, description="The last id of the page before.")
    order: Literal["asc", "desc"] = "desc"
    purpose: str | None = Field(None, max_length=MAX_ID_CHARS, description="Every file's is `fine-tune`.")


class FileObject(BaseModel):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: Literal["fine-tune"] = "fine-tune"
    status: Literal["processed"] = "processed"
    expires_at: None = None
    status_details: None = None
    num_examples: int = Field(description="Lines that are examples.")

    @classmethod
    def of(cls, file: TrainingFile) -> Self:
        return cls(
            id=file.id,
            bytes=file.num_bytes,
            created_at=int(file.created_at.timestamp()),
            filename=file.filename,
            num_examples=file.num_examples,
        )


class FileList(BaseModel):
    object: Literal["list"] = "list"
    data: list[FileObject]
    has_more: bool
    first_id: str | None
    last_id: str | None


class FileDeleted(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


@router.post(
    "/v1/files",
    summary="Upload examples",
    openapi_extra=OPENAPI_BODY,
    responses=documented_errors(
        errors.InvalidRequestError,
        errors.PayloadTooLargeError,
        errors.RequestTimeoutError,
        errors.StorageQuotaExceededError,
        errors.StorageFullError,
        errors.UnavailableError,
    ),
)
async def upload_file(request: Request, runtime: ReadyRuntime, caller: CurrentCaller) -> FileObject:
    """Every line is read before the answer comes; an error names the first that are wrong, with their fields."""
    training = runtime.training
    async with receive_form(request, runtime.settings.upload_timeout_s) as form, runtime.uploading():
        name, data = await to_training_file(form, max_bytes=runtime.settings.max_training_file_bytes)
        return FileObject.of(await runtime.call(training.add_file, caller, name, data))


@router.get("/v1/files", summary="List files", responses=documented_errors(errors.InvalidRequestError))
async def list_files(page: Annotated[FilePage, Query()], runtime: ReadyRuntime, caller: CurrentCaller) -> FileList:
    """The tenant's own, newest first unless `order` is `asc`."""
    training = runtime.training
    files, has_more = await runtime.call(
        training.list_files, caller, limit=page.limit, after=page.after, newest_first=page.order == "desc"
    )
    if page.purpose not in (None, "fine-tune"):
        files, has_more = [], False
    return FileList(
        data=[FileObject.of(file) for file in files],
        has_more=has_more,
        first_id=files[0].id if files else None,
        last_id=files[-1].id if files else None,
    )


@router.get("/v1/files/{file_id}", summary="One file", responses=documented_errors(errors.NotFoundError))
async def get_file(file_id: str, runtime: ReadyRuntime, caller: CurrentCaller) -> FileObject:
    return FileObject.of(await runtime.call(runtime.training.get_file, caller, file_id))


@router.get(
    "/v1/files/{file_id}/content",
    summary="A file's bytes",
    response_class=Response,
    responses={
        200: {"content": {"application/octet-stream": {}}, "description": "The bytes as uploaded."},
        **documented_errors(errors.NotFoundError, errors.PromptCorruptError),
    },
)
async def get_file_content(file_id: str, runtime: ReadyRuntime, caller: CurrentCaller) -> Response:
    file, data = await runtime.call(runtime.training.read_file, caller, file_id)
    return Response(
        data,
        media_type="application/octet-stream",
        headers={"ETag": f'"sha256:{file.digest}"', "x-content-type-options": "nosniff"},
    )


@router.delete(
    "/v1/files/{file_id}",
    summary="Delete a file",
    responses=documented_errors(errors.NotFoundError, errors.ConflictError),
)
async def delete_file(file_id: str, runtime: ReadyRuntime, caller: CurrentCaller) -> FileDeleted:
    """409 while a job that has not ended needs it. Prompts that were made from it stay."""
    await runtime.call(runtime.training.delete_file, caller, file_id)
    return FileDeleted(id=file_id)
