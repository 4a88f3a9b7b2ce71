"""The body of `POST /v1/classify` and what it answers, in vLLM's shape."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from server.api.common_schemas import PromptIdentity
from server.api.sampling_schemas import MAX_PRIORITY, MAX_USER_CHARS, Usage
from server.runtime.classification import MAX_LABEL_CHARS, MAX_LABELS

MAX_SEPARATOR_CHARS = 16

InputField = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 1}},
            ]
        }
    ),
]
Label = Annotated[str, Field(min_length=1, max_length=MAX_LABEL_CHARS)]


class ClassifyRequest(BaseModel):
    """Unknown fields are refused. Null stands for a field's default."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={
            "examples": [
                {"model": "word-sentiment", "input": "wonderful ->", "labels": ["positive", "negative"]},
            ]
        },
    )

    model: str = Field(
        description="A task, `task@7` (a version), `task@sha256:<hex>` (a digest), or the backbone's name (no prompt)."
    )
    input: InputField = Field(description="A text, or a list of texts. Not empty.")
    labels: list[Label] | None = Field(
        None,
        min_length=2,
        max_length=MAX_LABELS,
        description="What to choose from, distinct. Default: `labels` in the metadata of the prompt's version.",
    )
    separator: str | None = Field(
        None,
        max_length=MAX_SEPARATOR_CHARS,
        description="Extension: what stands between input and label. Default: a space, unless there is one already.",
    )
    add_special_tokens: bool | None = Field(None, description="Default true.")
    priority: int | None = Field(
        None,
        ge=-MAX_PRIORITY,
        le=MAX_PRIORITY,
        description="Lower is served sooner, among the requests of one tenant; default 0.",
    )
    user: str | None = Field(None, max_length=MAX_USER_CHARS, description="Accepted and ignored.")


class Classification(BaseModel):
    index: int = Field(description="Of the input.")
    label: str = Field(description="The likeliest.")
    probs: list[float] = Field(
        description="One a label, in the order of the labels: the softmax of the log-likelihoods of their tokens."
    )
    num_classes: int


class ClassifyResponse(BaseModel):
    id: str
    object: Literal["list"]
    created: int
    model: str
    system_fingerprint: str = Field(description="The backbone's digest.")
    prompt: PromptIdentity | None = Field(description="The prompt that answered; null without one.")
    labels: list[str] = Field(description="The labels that `probs` stand for.")
    data: list[Classification]
    usage: Usage = Field(description="Input and label count once for each pair of them.")
