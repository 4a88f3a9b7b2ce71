"""The body of `POST /v1/tasks/{task}/compare` and what it answers."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from server.api.common_schemas import PromptIdentity
from server.api.task_schemas import MAX_VERSION
from server.runtime.comparison import MAX_INPUTS, MAX_NEW_TOKENS, MAX_TEXT_CHARS, DifferentAnswer

VersionField = Annotated[int, Field(ge=1, le=MAX_VERSION)]


class CompareInput(BaseModel):
    """One input that both versions answer."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(min_length=1, max_length=MAX_TEXT_CHARS)
    completion: str | None = Field(
        None, min_length=1, max_length=MAX_TEXT_CHARS, description="What should follow, if it is known."
    )


class CompareRequest(BaseModel):
    """Unknown fields are refused. Null stands for a field's default."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={
            "examples": [{"versions": [1, None], "inputs": [{"prompt": "France ->", "completion": " Paris"}]}]
        },
    )

    versions: list[VersionField | None] = Field(
        min_length=2, max_length=2, description="Two versions of the task; null stands for the bare backbone."
    )
    inputs: list[CompareInput] | None = Field(
        None,
        min_length=1,
        max_length=MAX_INPUTS,
        description="Default: the probes that were uploaded with the second version, else with the first.",
    )
    max_tokens: int | None = Field(None, ge=1, le=MAX_NEW_TOKENS, description="Of each answer; default 32.")


class LogprobChange(BaseModel):
    """Log-likelihoods of the completions that were given, natural logarithms, averaged over inputs."""

    first: float
    second: float
    mean_change: float = Field(description="`second` less `first`: above 0 where the second version expects them more.")
    num_scored: int


class ComparisonObject(BaseModel):
    """Two versions' greedy answers to the same inputs."""

    object: Literal["prompt_comparison"] = "prompt_comparison"
    task: str
    versions: list[PromptIdentity | None] = Field(description="The two; null for the bare backbone.")
    num_inputs: int
    inputs_of: int | None = Field(
        description="The version whose probes were the inputs; null where the request had them."
    )
    agreement: float = Field(description="Share of inputs that both answer with the same text.")
    exact_match: list[float] | None = Field(
        description="Of each version, the share of completions that its answer is: cut at its first line's end unless "
        "the completion has one inside, both without surrounding space. Null where no completions are known."
    )
    logprob: LogprobChange | None
    num_different: int
    differences: list[DifferentAnswer] = Field(description="The first inputs that are answered differently.")
