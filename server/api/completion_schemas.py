"""The body of `POST /v1/completions` and what it answers, as OpenAI's legacy completions and vLLM have them.

Owns types and fixed bounds of the fields that no other route has. Bounds that depend on the server (its vocabulary,
its settings) and rules over several fields are in `completion_input`. The response models document; responses are
built as plain dicts.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from server.api.common_schemas import PromptIdentity
from server.api.sampling_schemas import MAX_LOGPROBS, GenerationFields, Usage

# The server's `max_prompts` is the limit; this is the largest that it can be.
MAX_TASKS = 65_536

PromptField = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 1}},
                {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
                {
                    "type": "array",
                    "minItems": 1,
                    "items": {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
                },
            ]
        }
    ),
]


class CompletionRequest(GenerationFields):
    """Unknown fields are refused. Null stands for a field's default."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": "country-capital", "prompt": "France", "max_tokens": 8, "temperature": 0},
                {"tasks": ["country-capital", "country-german"], "prompt": "France", "max_tokens": 8},
            ]
        },
    )

    model: str | None = Field(
        None,
        description="A task, `task@7` (a version), `task@sha256:<hex>` (a digest), or the backbone's name (no prompt). "
        "May be left out with `tasks`.",
    )
    prompt: PromptField = Field(
        description="Text, a list of texts, token ids, or a list of lists of token ids. Not empty."
    )
    tasks: list[str] | None = Field(
        None,
        max_length=MAX_TASKS,
        fail_fast=True,
        description="Extension: one task an item of `prompt`, or several tasks for one prompt. Each choice then "
        "carries `task` and its own `prompt`.",
    )
    max_tokens: int | None = Field(None, ge=0, le=2**31 - 1, description="Default 16. 0 only with `echo`.")
    best_of: int | None = Field(None, description="Must be null or equal to `n`.")
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="Alternatives reported a token.")
    echo: bool | None = Field(None, description="The prompt's text, and its log-probabilities, come first.")
    add_special_tokens: bool | None = Field(None, description="Default true. Token ids are taken as they are.")
    suffix: str | None = Field(None, description="Not supported: must be null.")


class Logprobs(BaseModel):
    """One entry a token. With `echo` the first entry of a prompt is null. Virtual tokens never appear."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int] = Field(description="Where each token begins in `text`, in characters.")


class CompletionChoice(BaseModel):
    index: int = Field(description="item × n + sample")
    text: str
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: int | str | None = Field(description="The stop text or token id that ended it, else null.")
    task: str | None = Field(None, description="With `tasks`: the one that answered, as the request named it.")
    prompt: PromptIdentity | None = Field(None, description="With `tasks`: the prompt that answered.")


class CompletionResponse(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str = Field(description="The backbone's digest.")
    prompt: PromptIdentity | None = Field(description="Null without a prompt, and with `tasks`: see the choices.")
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunk(BaseModel):
    """The data of one server-sent event."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    prompt: PromptIdentity | None
    choices: list[CompletionChoice]
    usage: Usage | None = Field(None, description="Only with `stream_options`.")
