"""The body of `POST /v1/chat/completions` and what it answers, as OpenAI's chat completions and vLLM have them.

Owns types and fixed bounds; rules over several fields are in `chat_input`. Fields of OpenAI's that change nothing here
are taken and ignored; those that would change the answer are here only to be refused by name. The response models
document; responses are built as plain dicts.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from server.api.common_schemas import PromptIdentity
from server.api.sampling_schemas import MAX_LOGPROBS, MAX_USER_CHARS, GenerationFields, Usage

MAX_MESSAGES = 1024
MAX_PARTS = 256
MAX_NAME_CHARS = 64
MAX_METADATA = 16
MAX_MODALITIES = 8

Role = Literal["system", "developer", "user", "assistant"]

ContentField = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "minItems": 1,
                    "maxItems": MAX_PARTS,
                    "items": {
                        "type": "object",
                        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                        "required": ["type", "text"],
                        "additionalProperties": False,
                    },
                },
            ]
        }
    ),
]


class ChatMessage(BaseModel):
    """What an assistant's message of an earlier answer has besides is taken where it is empty."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Role = Field(description="`developer` is another name of `system`.")
    content: ContentField = Field(description="Text, or a list of text parts, which are joined by line ends.")
    name: str | None = Field(None, max_length=MAX_NAME_CHARS, description="Passed to the chat template.")
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: list[Any] | None = Field(None, max_length=0)
    annotations: list[Any] | None = Field(None, max_length=0)


class ChatCompletionRequest(GenerationFields):
    """Unknown fields are refused. Null stands for a field's default."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "country-capital",
                    "messages": [{"role": "user", "content": "France"}],
                    "max_completion_tokens": 8,
                    "temperature": 0,
                }
            ]
        },
    )

    model: str = Field(
        description="A task, `task@7` (a version), `task@sha256:<hex>` (a digest), or the backbone's name (no prompt)."
    )
    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(
        None, ge=1, le=2**31 - 1, description="Default: what the prompt leaves of the backbone's length."
    )
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 1, description="Another name of `max_tokens`.")
    logprobs: bool | None = Field(None, description="Log-probabilities of the tokens of the answer.")
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="Alternatives reported a token. Only with `logprobs`."
    )
    add_special_tokens: bool | None = Field(
        None, description="Default false: chat templates write the special tokens themselves."
    )
    add_generation_prompt: bool | None = Field(
        None, description="Default true: the text ends where the assistant's answer begins."
    )
    metadata: dict[str, str] | None = Field(None, max_length=MAX_METADATA, description="Accepted and ignored.")
    store: bool | None = Field(None, description="Accepted and ignored: nothing is kept.")
    service_tier: str | None = Field(None, max_length=MAX_USER_CHARS, description="Accepted and ignored.")
    safety_identifier: str | None = Field(None, max_length=MAX_USER_CHARS, description="Accepted and ignored.")
    prompt_cache_key: str | None = Field(None, max_length=MAX_USER_CHARS, description="Accepted and ignored.")
    prompt_cache_retention: str | None = Field(None, max_length=MAX_USER_CHARS, description="Accepted and ignored.")
    parallel_tool_calls: bool | None = Field(None, description="Accepted and ignored: there are no tools.")
    tools: list[Any] | None = Field(None, description="Not supported: must be empty or null.")
    tool_choice: Any = Field(None, description='Not supported: must be "none", "auto" or null.')
    functions: list[Any] | None = Field(None, description="Not supported: must be empty or null.")
    function_call: Any = Field(None, description='Not supported: must be "none", "auto" or null.')
    modalities: list[str] | None = Field(
        None, max_length=MAX_MODALITIES, description='Not supported but for `["text"]`.'
    )
    audio: Any = Field(None, description="Not supported: must be null.")
    prediction: Any = Field(None, description="Not supported: must be null.")
    reasoning_effort: Any = Field(None, description="Not supported: must be null.")
    verbosity: Any = Field(None, description="Not supported: must be null.")
    web_search_options: Any = Field(None, description="Not supported: must be null.")


class AlternativeToken(BaseModel):
    token: str
    logprob: float
    bytes: list[int] = Field(description="The token in UTF-8; several tokens may share a character.")


class ChatTokenLogprob(AlternativeToken):
    top_logprobs: list[AlternativeToken] = Field(description="The likeliest tokens, best first.")


class ChatLogprobs(BaseModel):
    content: list[ChatTokenLogprob]
    refusal: None


class AnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: int | str | None = Field(description="The stop text or token id that ended it, else null.")


class ChatCompletionResponse(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str = Field(description="The backbone's digest.")
    prompt: PromptIdentity | None = Field(description="The prompt that answered; null without one.")
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    role: Literal["assistant"] | None = Field(None, description="In the first chunk of a choice alone.")
    content: str | None = None


class ChatChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: int | str | None


class ChatCompletionChunk(BaseModel):
    """The data of one server-sent event."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    prompt: PromptIdentity | None
    choices: list[ChatChunkChoice]
    usage: Usage | None = Field(None, description="Only with `stream_options`.")
