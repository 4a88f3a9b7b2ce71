"""From the body of a completions request to what the runtime is asked for.

Owns the rules that types alone cannot say: what depends on the vocabulary or on the settings, and on several fields
together. Every refusal names its field.
"""

import math
from typing import Any, TypeVar

from server.api.completion_schemas import (
    MAX_LOGIT_BIAS,
    MAX_REFERENCE_CHARS,
    MAX_STOP,
    MAX_STOP_CHARS,
    CompletionRequest,
)
from server.engine.request import SamplingParams
from server.errors import InvalidRequestError, TaskNotFoundError
from server.runtime.generation import GenerationSpec, check_length

DEFAULT_MAX_TOKENS = 16
MAX_BIAS = 100.0

Prompt = str | tuple[int, ...]
T = TypeVar("T")


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
        n=_or(body.n, 1),
        sampling=_sampling(body, vocab_size),
        add_special_tokens=_or(body.add_special_tokens, True),
    )


def parse_prompts(value: Any, *, vocab_size: int, max_model_len: int, max_prompts: int) -> tuple[Prompt, ...]:
    """The items of `prompt` in any of its four forms."""
    if isinstance(value, str):
        return (_check_text(value, "prompt"),)
    if not isinstance(value, list):
        raise InvalidRequestError("prompt: must be a string, a list of strings, or token ids", param="prompt")
    if not value:
        raise InvalidRequestError("prompt: must not be empty", param="prompt")
    if type(value[0]) is int:
        return (_check_ids(value, "prompt", vocab_size, max_model_len),)
    if len(value) > max_prompts:
        raise InvalidRequestError(f"prompt: at most {max_prompts} items, got {len(value)}", param="prompt")
    kind = type(value[0])
    items: list[Prompt] = []
    for index, item in enumerate(value):
        param = f"prompt.{index}"
        if type(item) is not kind or kind not in (str, list):
            raise InvalidRequestError(f"{param}: items must be all strings or all lists of token ids", param=param)
        if isinstance(item, str):
            items.append(_check_text(item, param))
        else:
            items.append(_check_ids(item, param, vocab_size, max_model_len))
    return tuple(items)


def _refuse_unsupported(body: CompletionRequest) -> None:
    n = _or(body.n, 1)
    if body.best_of is not None and body.best_of != n:
        raise InvalidRequestError("best_of: not supported unless it equals n", param="best_of")
    if body.suffix is not None:
        raise InvalidRequestError("suffix: not supported", param="suffix")
    if body.response_format is not None and body.response_format != {"type": "text"}:
        raise InvalidRequestError("response_format: only text is supported", param="response_format")
    if body.stream_options is not None and not body.stream:
        raise InvalidRequestError("stream_options: only with stream", param="stream_options")


def _pair(
    body: CompletionRequest, prompts: tuple[Prompt, ...], backbone_name: str, max_prompts: int
) -> tuple[tuple[Prompt, ...], tuple[str, ...]]:
    """Items and the task of each, with one prompt fanned out over several tasks where that is asked for."""
    if body.tasks is None:
        if body.model is None:
            raise InvalidRequestError("Field 'model' is required.", param="model")
        return prompts, (_check_reference(body.model, "model"),) * len(prompts)
    if not body.tasks:
        raise InvalidRequestError("tasks: must not be empty", param="tasks")
    if len(body.tasks) > max_prompts:
        raise InvalidRequestError(f"tasks: at most {max_prompts}, got {len(body.tasks)}", param="tasks")
    if body.model not in (None, backbone_name, *body.tasks):
        raise InvalidRequestError(
            "model: with tasks, leave it out, or give the backbone's name or one of the tasks", param="model"
        )
    references = tuple(_check_reference(task, f"tasks.{index}") for index, task in enumerate(body.tasks))
    if len(prompts) == 1:
        return prompts * len(references), references
    if len(prompts) != len(references):
        raise InvalidRequestError(
            f"tasks: {len(references)} tasks for {len(prompts)} prompts; give one task a prompt, or one prompt",
            param="tasks",
        )
    return prompts, references


def _sampling(body: CompletionRequest, vocab_size: int) -> SamplingParams:
    max_tokens = _max_tokens(body)
    echo = _or(body.echo, False)
    if max_tokens == 0 and not echo:
        raise InvalidRequestError("max_tokens: 0 is allowed only with echo", param="max_tokens")
    min_tokens = _or(body.min_tokens, 0)
    if min_tokens > max_tokens:
        raise InvalidRequestError(f"min_tokens: must be at most max_tokens ({max_tokens})", param="min_tokens")
    top_k = _or(body.top_k, 0)
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=_or(body.temperature, 1.0),
        top_p=_or(body.top_p, 1.0),
        top_k=max(top_k, 0),
        min_p=_or(body.min_p, 0.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        logit_bias=_logit_bias(body.logit_bias, vocab_size),
        seed=body.seed,
        stop=_stop(body.stop),
        stop_token_ids=_check_vocabulary(body.stop_token_ids or [], "stop_token_ids", vocab_size),
        ignore_eos=_or(body.ignore_eos, False),
        skip_special_tokens=_or(body.skip_special_tokens, True),
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if echo else None,
    )


def _max_tokens(body: CompletionRequest) -> int:
    if body.max_tokens is None:
        return _or(body.max_completion_tokens, DEFAULT_MAX_TOKENS)
    if body.max_completion_tokens not in (None, body.max_tokens):
        raise InvalidRequestError(
            "max_completion_tokens: differs from max_tokens; give one of them", param="max_completion_tokens"
        )
    return body.max_tokens


def _stop(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list):
        raise InvalidRequestError("stop: must be a string or a list of strings", param="stop")
    if len(stops) > MAX_STOP:
        raise InvalidRequestError(f"stop: at most {MAX_STOP}, got {len(stops)}", param="stop")
    for index, stop in enumerate(stops):
        param = "stop" if isinstance(value, str) else f"stop.{index}"
        if not isinstance(stop, str):
            raise InvalidRequestError(f"{param}: must be a string", param=param)
        if not 1 <= len(_check_unicode(stop, param)) <= MAX_STOP_CHARS:
            raise InvalidRequestError(f"{param}: must have 1 to {MAX_STOP_CHARS} characters", param=param)
    return tuple(stops)


def _logit_bias(value: Any, vocab_size: int) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidRequestError("logit_bias: must be an object", param="logit_bias")
    if len(value) > MAX_LOGIT_BIAS:
        raise InvalidRequestError(f"logit_bias: at most {MAX_LOGIT_BIAS}, got {len(value)}", param="logit_bias")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        # Anything else that int() takes, such as "1_0" or Arabic digits, is no token id as JSON writes it.
        if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) < vocab_size):
            raise InvalidRequestError(
                f"logit_bias: keys must be token ids below {vocab_size}", param=f"logit_bias.{key[:40]}"
            )
        if type(bias) not in (int, float) or not math.isfinite(bias):
            raise InvalidRequestError("logit_bias: values must be finite numbers", param=f"logit_bias.{key}")
        biases[int(key)] = min(max(float(bias), -MAX_BIAS), MAX_BIAS)
    return biases


def _check_text(text: str, param: str) -> str:
    if not text:
        raise InvalidRequestError(f"{param}: must not be empty", param=param)
    return _check_unicode(text, param)


def _check_unicode(text: str, param: str) -> str:
    try:
        # JSON can spell half a surrogate pair, which no tokenizer takes.
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidRequestError(f"{param}: must be valid Unicode text", param=param) from None
    return text


def _check_ids(ids: list[Any], param: str, vocab_size: int, max_model_len: int) -> tuple[int, ...]:
    if not ids:
        raise InvalidRequestError(f"{param}: must not be empty", param=param)
    # Before the ids are looked at: a body may hold millions.
    check_length(len(ids), 0, 0, max_model_len)
    return _check_vocabulary(ids, param, vocab_size)


def _check_vocabulary(ids: list[Any], param: str, vocab_size: int) -> tuple[int, ...]:
    if not ids or (set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < vocab_size):
        return tuple(ids)
    for index, token_id in enumerate(ids):
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise InvalidRequestError(
                f"{param}.{index}: must be a token id from 0 to {vocab_size - 1}", param=f"{param}.{index}"
            )
    return tuple(ids)


def _check_reference(reference: str, param: str) -> str:
    if not reference or len(reference) > MAX_REFERENCE_CHARS:
        raise TaskNotFoundError(f"The model {reference[:MAX_REFERENCE_CHARS]!r} does not exist.", param=param)
    return reference


def _or(value: T | None, default: T) -> T:
    return default if value is None else value
