"""Fields that every route which generates text takes, and how usage is told.

Owns their types and fixed bounds. Bounds that depend on the server and rules over several fields are in
`sampling_input`.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

MAX_N = 8
MAX_LOGPROBS = 20
MAX_STOP = 32
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 300
MAX_REFERENCE_CHARS = 200
MAX_USER_CHARS = 512
MAX_PRIORITY = 100

# Checked by hand: Pydantic would walk a long list element by element, and name a union's branches in its errors.
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
    include_obfuscation: bool | None = Field(None, description="Accepted; chunks are never padded.")


class GenerationFields(BaseModel):
    """Null stands for a field's default."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    max_tokens: int | None = Field(None, ge=0, le=2**31 - 1)
    max_completion_tokens: int | None = Field(None, ge=0, le=2**31 - 1, description="Another name of `max_tokens`.")
    min_tokens: int | None = Field(None, ge=0, le=2**31 - 1, description="No end before so many new tokens.")
    temperature: float | None = Field(None, ge=0, le=2, description="Default 1; 0 is greedy.")
    top_p: float | None = Field(None, gt=0, le=1, description="Default 1.")
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1, description="0 or -1: off, the default.")
    min_p: float | None = Field(None, ge=0, le=1, description="Default 0.")
    n: int | None = Field(None, ge=1, le=MAX_N, description="Samples a prompt; default 1.")
    seed: int | None = Field(
        None,
        ge=-(2**63),
        le=2**63 - 1,
        description="Makes the output the same whatever else is in the batch. Sample j of item i uses "
        "SHA-256(`seed:i:j`), so that samples differ. None: a random one.",
    )
    stop: StopField = Field(None, description=f"Up to {MAX_STOP} texts that end the output; they are not part of it.")
    stop_token_ids: list[int] | None = Field(None, max_length=MAX_STOP_TOKEN_IDS)
    include_stop_str_in_output: bool | None = Field(None, description="Not supported: must be false or null.")
    ignore_eos: bool | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    # Logits are divided by it, or multiplied: near zero, all that was there already is infinitely likely.
    repetition_penalty: float | None = Field(None, ge=0.01, le=10, description="Default 1: off.")
    logit_bias: LogitBiasField = Field(
        None, description=f"Token id → bias, at most {MAX_LOGIT_BIAS}; clamped to ±100. Ids are keys, as text."
    )
    stream: bool | None = Field(None, description="Server-sent events.")
    stream_options: StreamOptions | None = Field(None, description="Only with `stream`.")
    add_special_tokens: bool | None = None
    skip_special_tokens: bool | None = Field(None, description="Default true.")
    priority: int | None = Field(
        None,
        ge=-MAX_PRIORITY,
        le=MAX_PRIORITY,
        description="Lower is served sooner, among the requests of one tenant; default 0.",
    )
    response_format: dict[str, Any] | None = Field(None, description='Not supported but for `{"type": "text"}`.')
    user: str | None = Field(None, max_length=MAX_USER_CHARS, description="Accepted and ignored.")


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int = Field(description="The client's tokens; an item's count once, whatever `n`.")
    completion_tokens: int
    total_tokens: int
    virtual_tokens: int = Field(description="Virtual tokens of the prompts; not part of the total.")
    prompt_tokens_details: PromptTokensDetails
