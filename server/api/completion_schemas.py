"""The body of `POST /v1/completions` and what it answers, as OpenAI's legacy completions and vLLM have them.

Owns types and fixed bounds. Bounds that depend on the server (its vocabulary, its settings) and rules over several
fields are in `completion_input`. The response models document; responses are built as plain dicts.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from server.api.common_schemas import PromptIdentity

MAX_N = 8
MAX_LOGPROBS = 20
MAX_STOP = 32
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 300
MAX_REFERENCE_CHARS = 200

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
StopField = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS},
                {
                    "type": "array",
                    "maxItems": MAX_STOP,
                    "items": {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS},
                },
                {"type": "null"},
            ]
        }
    ),
]
LogitBiasField = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "object", "maxProperties": MAX_LOGIT_BIAS, "additionalProperties": {"type": "number"}},
                {"type": "null"},
            ]
        }
    ),
]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = Field(None, description="One more chunk with `choices: []` and `usage` at the end.")
    continuous_usage_stats: bool | None = Field(None, description="`usage` so far in every chunk.")


class CompletionRequest(BaseModel):
    """Unknown fields are refused. Null stands for a field's default."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
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
        description="Extension: one task an item of `prompt`, or several tasks for one prompt. Each choice then "
        "carries `task` and its own `prompt`.",
    )
    max_tokens: int | None = Field(None, ge=0, le=2**31 - 1, description="Default 16. 0 only with `echo`.")
    max_completion_tokens: int | None = Field(None, ge=0, le=2**31 - 1, description="Another name of `max_tokens`.")
    min_tokens: int | None = Field(None, ge=0, le=2**31 - 1, description="No end before so many new tokens.")
    temperature: float | None = Field(None, ge=0, le=2, description="Default 1; 0 is greedy.")
    top_p: float | None = Field(None, gt=0, le=1, description="Default 1.")
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1, description="0 or -1: off, the default.")
    min_p: float | None = Field(None, ge=0, le=1, description="Default 0.")
    n: int | None = Field(None, ge=1, le=MAX_N, description="Samples a prompt; default 1.")
    best_of: int | None = Field(None, description="Must be null or equal to `n`.")
    seed: int | None = Field(
        None,
        ge=-(2**63),
        le=2**63 - 1,
        description="Makes the output the same whatever else is in the batch. Sample j of item i uses "
        "SHA-256(`seed:i:j`), so that samples differ. None: a random one.",
    )
    stop: StopField = Field(None, description=f"Up to {MAX_STOP} texts that end the output; they are not part of it.")
    stop_token_ids: list[int] | None = Field(None, max_length=MAX_STOP_TOKEN_IDS)
    ignore_eos: bool | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    # Logits are divided by it, or multiplied: near zero, all that was there already is infinitely likely.
    repetition_penalty: float | None = Field(None, ge=0.01, le=10, description="Default 1: off.")
    logit_bias: LogitBiasField = Field(
        None, description=f"Token id → bias, at most {MAX_LOGIT_BIAS}; clamped to ±100. Ids are keys, as text."
    )
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="Alternatives reported a token.")
    echo: bool | None = Field(None, description="The prompt's text, and its log-probabilities, come first.")
    stream: bool | None = Field(None, description="Server-sent events.")
    stream_options: StreamOptions | None = Field(None, description="Only with `stream`.")
    add_special_tokens: bool | None = Field(None, description="Default true. Token ids are taken as they are.")
    skip_special_tokens: bool | None = Field(None, description="Default true.")
    suffix: str | None = Field(None, description="Not supported: must be null.")
    response_format: dict[str, Any] | None = Field(None, description='Not supported but for `{"type": "text"}`.')
    user: str | None = Field(None, description="Accepted and ignored.")


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


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int = Field(description="The client's tokens; an item's count once, whatever `n`.")
    completion_tokens: int
    total_tokens: int
    virtual_tokens: int = Field(description="Virtual tokens of the prompts; not part of the total.")
    prompt_tokens_details: PromptTokensDetails


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
