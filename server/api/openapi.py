"""The OpenAPI page, made true: FastAPI documents a 422 of its own that this server never answers."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

DESCRIPTION = """Many soft prompts over one frozen language model, behind OpenAI's HTTP API.

What an OpenAI client calls a model is here a task. Errors are `{"error": {message, type, param, code}}` everywhere;
every response has an `x-request-id`, the client's own if it is 1 to 128 letters, digits, `.`, `_` and `-`.
"""


def install_openapi(app: FastAPI) -> None:
    """Replaces the app's schema by one without the framework's own validation errors, and with the API key."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(
                title=app.title, version=app.version, description=DESCRIPTION, routes=app.routes, tags=app.openapi_tags
            )
            _drop_framework_errors(schema)
            schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            schema["security"] = [{"key": []}]
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _drop_framework_errors(schema: dict[str, Any]) -> None:
    for operations in schema["paths"].values():
        for operation in operations.values():
            refused = operation["responses"].get("422", {})
            if "HTTPValidationError" in str(refused):
                del operation["responses"]["422"]
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)
