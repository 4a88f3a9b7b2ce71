"""From the body of a completions request to what the runtime is asked for.

Owns the forms that `prompt` may have and how prompts and tasks are paired. Every refusal names its field.
"""

from typing import Any

from server.api.completion_schemas import CompletionRequest
from server.api.sampling_input import (
    check_ids,
    check_reference,
    check_text,
    given_max_tokens,
    refuse_unsupported,
    to_sampling,
    value_or,
)
from server.engine.request import SamplingParams
from server.errors import InvalidRequestError
from server.runtime.generation import GenerationSpec

DEFAULT_MAX_TOKENS = 16

Prompt = str | tuple[int, ...]


def to_spec(
    body: CompletionRequest, *, vocab_size: int, max_model_len: int, backbone_name: str, max_prompts: int
) -> GenerationSpec:
    """Raises InvalidRequestError, or TaskNotFoundError for a name that no task can have."""
    _refuse_unsupported(body)
    prompts = parse_prompts(body.prompt, vocab_size=vocab_size, max_model_len=max_model_len, max_prompts=max_prompts)
    prompts, references = _pair(body, prompts, backbone_name, max_prompts)
    return GenerationSpec(
        prompts=prompts,
        references=references,
        n=value_or(body.n, 1),
        sampling=_sampling(body, vocab_size),
        add_special_tokens=value_or(body.add_special_tokens, True),
        priority=value_or(body.priority, 0),
    )


def parse_prompts(value: Any, *, vocab_size: int, max_model_len: int, max_prompts: int) -> tuple[Prompt, ...]:
    """The items of `prompt` in any of its four forms."""
    if isinstance(value, str):
        return (check_text(value, "prompt"),)
    if not isinstance(value, list):
        raise InvalidRequestError("prompt: must be a string, a list of strings, or token ids", param="prompt")
    if not value:
        raise InvalidRequestError("prompt: must not be empty", param="prompt")
    if type(value[0]) is int:
        return (check_ids(value, "prompt", vocab_size, max_model_len),)
    if len(value) > max_prompts:
        raise InvalidRequestError(f"prompt: at most {max_prompts} items, got {len(value)}", param="prompt")
    kind = type(value[0])
    items: list[Prompt] = []
    for index, item in enumerate(value):
        param = f"prompt.{index}"
        if type(item) is not kind or kind not in (str, list):
            raise InvalidRequestError(f"{param}: items must be all strings or all lists of token ids", param=param)
        if isinstance(item, str):
            items.append(check_text(item, param))
        else:
            items.append(check_ids(item, param, vocab_size, max_model_len))
    return tuple(items)


def _refuse_unsupported(body: CompletionRequest) -> None:
    refuse_unsupported(body)
    if body.best_of is not None and body.best_of != value_or(body.n, 1):
        raise InvalidRequestError("best_of: not supported unless it equals n", param="best_of")
    if body.suffix is not None:
        raise InvalidRequestError("suffix: not supported", param="suffix")


def _pair(
    body: CompletionRequest, prompts: tuple[Prompt, ...], backbone_name: str, max_prompts: int
) -> tuple[tuple[Prompt, ...], tuple[str, ...]]:
    """Items and the task of each, with one prompt fanned out over several tasks where that is asked for."""
    if body.tasks is None:
        if body.model is None:
            raise InvalidRequestError("Field 'model' is required.", param="model")
        return prompts, (check_reference(body.model, "model"),) * len(prompts)
    if not body.tasks:
        raise InvalidRequestError("tasks: must not be empty", param="tasks")
    if len(body.tasks) > max_prompts:
        raise InvalidRequestError(f"tasks: at most {max_prompts}, got {len(body.tasks)}", param="tasks")
    if body.model not in (None, backbone_name, *body.tasks):
        raise InvalidRequestError(
            "model: with tasks, leave it out, or give the backbone's name or one of the tasks", param="model"
        )
    references = tuple(check_reference(task, f"tasks.{index}") for index, task in enumerate(body.tasks))
    if len(prompts) == 1:
        return prompts * len(references), references
    if len(prompts) != len(references):
        raise InvalidRequestError(
            f"tasks: {len(references)} tasks for {len(prompts)} prompts; give one task a prompt, or one prompt",
            param="tasks",
        )
    return prompts, references


def _sampling(body: CompletionRequest, vocab_size: int) -> SamplingParams:
    max_tokens = value_or(given_max_tokens(body), DEFAULT_MAX_TOKENS)
    echo = value_or(body.echo, False)
    if max_tokens == 0 and not echo:
        raise InvalidRequestError("max_tokens: 0 is allowed only with echo", param="max_tokens")
    return to_sampling(
        body,
        vocab_size=vocab_size,
        max_tokens=max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if echo else None,
    )
