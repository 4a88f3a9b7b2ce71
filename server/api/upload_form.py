"""The multipart form of an upload, read part by part and checked field by field.

Starlette's parser keeps large parts in unnamed temporary files, which are gone when the form is closed; the middleware
counts the bytes, and the form must be whole within a time limit. Only then are its large parts brought into memory, by
`to_upload`. Nothing reaches the store before the whole form is sound.
"""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Request
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from server.api.strict_json import parse_json
from server.errors import InvalidRequestError, PayloadTooLargeError, RequestTimeoutError
from server.runtime.tasks import PromptUpload

MAX_FIELD_BYTES = 64 * 1024
MAX_INT_DIGITS = 9
# More than there are fields, so that an unknown one is read far enough to be named.
MAX_PARTS = 16
REQUIRED_FILES = ("file", "config")
FILE_FIELDS = (*REQUIRED_FILES, "probes")
TEXT_FIELDS = (
    "activate",
    "expected_version",
    "metadata",
    "task_index",
    "training_run",
    "data_digest",
    "gate_threshold",
)
MAX_PROBES_BYTES = 1024 * 1024
MAX_FILENAME_CHARS = 100
DEFAULT_FILENAME = "file.jsonl"
_SHARE = re.compile(r"0|1|1\.0{1,20}|0?\.[0-9]{1,20}", re.ASCII)

OPENAPI_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": list(REQUIRED_FILES),
                    "additionalProperties": False,
                    "properties": {
                        "file": {
                            "type": "string",
                            "format": "binary",
                            "description": "`adapter_model.safetensors`, as PEFT's `save_pretrained` writes it.",
                        },
                        "config": {
                            "type": "string",
                            "format": "binary",
                            "description": "`adapter_config.json`, as PEFT's `save_pretrained` writes it.",
                        },
                        "activate": {
                            "type": "string",
                            "enum": ["true", "false"],
                            "default": "true",
                            "description": "Let requests use the version at once.",
                        },
                        "expected_version": {
                            "type": "integer",
                            "minimum": 0,
                            "description": "Refuse (409) unless this version is active now; 0: unless the task is new.",
                        },
                        "metadata": {"type": "string", "description": "A JSON object to keep with the version."},
                        "task_index": {
                            "type": "integer",
                            "minimum": 0,
                            "description": "Which task of a MULTITASK_PROMPT_TUNING file it is.",
                        },
                        "training_run": {
                            "type": "string",
                            "maxLength": 200,
                            "description": "What the prompt was trained in, kept as its provenance.",
                        },
                        "data_digest": {
                            "type": "string",
                            "maxLength": 200,
                            "description": "Digest of the data that it was trained on, kept as its provenance.",
                        },
                        "probes": {
                            "type": "string",
                            "format": "binary",
                            "description": 'JSON lines of `{"prompt": …, "completion": …}`: at most 1000, 1 MiB.',
                        },
                        "gate_threshold": {
                            "type": "number",
                            "minimum": 0,
                            "maximum": 1,
                            "description": "Stay inactive until this share of the probes is answered as expected.",
                        },
                    },
                }
            }
        },
    }
}


@asynccontextmanager
async def receive_form(request: Request, timeout_s: float) -> AsyncIterator[FormData]:
    """The form once all of it is here; its temporary files are gone after the block.

    Raises InvalidRequestError when it cannot be read, RequestTimeoutError when it is not here within `timeout_s`, and
    PayloadTooLargeError.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        raise InvalidRequestError("Content-Type must be multipart/form-data.", code="unsupported_content_type")
    try:
        async with asyncio.timeout(timeout_s):
            form = await request.form(max_files=MAX_PARTS, max_fields=MAX_PARTS, max_part_size=MAX_FIELD_BYTES)
    except TimeoutError:
        raise RequestTimeoutError(
            f"The body did not arrive within {timeout_s:g} seconds.", code="upload_timeout"
        ) from None
    except HTTPException as error:
        raise InvalidRequestError(f"The form cannot be read: {error.detail}") from None
    try:
        yield form
    finally:
        await form.close()


async def to_upload(form: FormData, task: str) -> PromptUpload:
    """The form's fields, its files' bytes in memory. Raises InvalidRequestError naming the field."""
    names = [name for name, _ in form.multi_items()]
    for name in names:
        if name not in FILE_FIELDS + TEXT_FIELDS:
            raise InvalidRequestError(f"Unknown field {name[:100]!r}.", param=name[:100])
        if names.count(name) > 1:
            raise InvalidRequestError(f"Field {name!r} is given twice.", param=name)
    return PromptUpload(
        task=task,
        file=await _read_file(form, "file"),
        config=await _read_file(form, "config"),
        activate=_read_bool(form, "activate", default=True),
        expected_version=_read_int(form, "expected_version"),
        metadata=_read_object(form, "metadata"),
        task_index=_read_int(form, "task_index"),
        training_run=_read_text(form, "training_run"),
        data_digest=_read_text(form, "data_digest"),
        probes=await _read_probes(form),
        gate_threshold=_read_share(form, "gate_threshold"),
    )


async def to_training_file(form: FormData, *, max_bytes: int) -> tuple[str, bytes]:
    """A training file's name and its bytes. Raises InvalidRequestError naming the field, or PayloadTooLargeError."""
    names = [name for name, _ in form.multi_items()]
    for name in names:
        if name not in ("file", "purpose"):
            raise InvalidRequestError(f"{name[:100]}: not supported.", param=name[:100])
        if names.count(name) > 1:
            raise InvalidRequestError(f"Field {name!r} is given twice.", param=name)
    purpose = _read_text(form, "purpose")
    if purpose != "fine-tune":
        raise InvalidRequestError("purpose: must be 'fine-tune', the only one that there is.", param="purpose")
    file = form.get("file")
    if isinstance(file, UploadFile) and file.size is not None and file.size > max_bytes:
        raise PayloadTooLargeError(f"The file has more than the {max_bytes} bytes that are allowed.", param="file")
    data = await _read_file(form, "file")
    if len(data) > max_bytes:
        raise PayloadTooLargeError(f"The file has more than the {max_bytes} bytes that are allowed.", param="file")
    filename = file.filename if isinstance(file, UploadFile) else None
    return _printable(filename or DEFAULT_FILENAME), data


def _printable(filename: str) -> str:
    """A client's own name for its file, fit for lists and messages; it names nothing on this machine."""
    name = "".join(char if char.isprintable() else "_" for char in filename.replace("\\", "/").rpartition("/")[2])
    return name[:MAX_FILENAME_CHARS] or DEFAULT_FILENAME


async def _read_file(form: FormData, name: str) -> bytes:
    value = form.get(name)
    if value is None:
        raise InvalidRequestError(f"Field {name!r} is required.", param=name)
    if isinstance(value, UploadFile):
        return await value.read()
    # Sent without a file name: small enough to be taken as it is.
    return value.encode("utf-8", "surrogateescape")


async def _read_probes(form: FormData) -> bytes | None:
    value = form.get("probes")
    if isinstance(value, UploadFile) and value.size is not None and value.size > MAX_PROBES_BYTES:
        raise PayloadTooLargeError(
            f"probes has more than the {MAX_PROBES_BYTES} bytes that are allowed.", param="probes"
        )
    return None if value is None else await _read_file(form, "probes")


def _read_text(form: FormData, name: str) -> str | None:
    value = form.get(name)
    if isinstance(value, UploadFile):
        raise InvalidRequestError(f"{name}: must be a field, not a file", param=name)
    return value


def _read_bool(form: FormData, name: str, *, default: bool) -> bool:
    text = _read_text(form, name)
    if text is None:
        return default
    if text not in ("true", "false"):
        raise InvalidRequestError(f"{name}: must be 'true' or 'false'", param=name)
    return text == "true"


def _read_int(form: FormData, name: str) -> int | None:
    text = _read_text(form, name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= MAX_INT_DIGITS):
        raise InvalidRequestError(f"{name}: must be an integer from 0 to {10**MAX_INT_DIGITS - 1}", param=name)
    return int(text)


def _read_share(form: FormData, name: str) -> float | None:
    text = _read_text(form, name)
    if text is None:
        return None
    # What Python takes for a number beyond this, `nan`, `1_0`, a space, no client means.
    if not _SHARE.fullmatch(text):
        raise InvalidRequestError(f"{name}: must be a number from 0 to 1", param=name)
    return float(text)


def _read_object(form: FormData, name: str) -> dict[str, Any] | None:
    text = _read_text(form, name)
    if text is None:
        return None
    try:
        value = parse_json(text.encode("utf-8", "surrogatepass"))
    except InvalidRequestError as error:
        raise InvalidRequestError(f"{name}: {error.message.replace('The body', 'it')}", param=name) from None
    if not isinstance(value, dict):
        raise InvalidRequestError(f"{name}: must be a JSON object", param=name)
    return value
