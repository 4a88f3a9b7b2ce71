"""Shapes that several routes share: errors as documented, lists, and which prompt answered."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from server import errors
from server.errors import PromptmuxError


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = Field(description="The offending field as a dotted path, or null.")
    code: str | None


class ErrorResponse(BaseModel):
    """The body of every error."""

    error: ErrorDetail


class PromptIdentity(BaseModel):
    """Which prompt version answered; `digest` is the SHA-256 of its file."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"task": "country-capital", "version": 1, "digest": "9f86d081884c7d659a2feaa0c55ad015…"}]
        }
    )

    task: str
    version: int
    digest: str


def documented_errors(*kinds: type[PromptmuxError]) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` for the errors that a route may answer with; those of every route are included.

    Each has an example with its real `type` and `code`.
    """
    by_status: dict[int, list[type[PromptmuxError]]] = {}
    for kind in (*kinds, *_EVERYWHERE):
        by_status.setdefault(kind.status, []).append(kind)
    return {
        status: {
            "model": ErrorResponse,
            "description": ", ".join(f"`{kind.default_code}`" for kind in kinds_of_status),
            "content": {
                "application/json": {
                    "examples": {kind.default_code: {"value": kind("…").to_body()} for kind in kinds_of_status}
                }
            },
        }
        for status, kinds_of_status in sorted(by_status.items())
    }


_EVERYWHERE: tuple[type[PromptmuxError], ...] = (
    errors.AuthenticationError,
    errors.PermissionDeniedError,
    errors.LoadingError,
)
