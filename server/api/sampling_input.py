"""Checks that every route which generates text shares: sampling, stops, texts, token ids, references.

Owns the rules that types alone cannot say: what depends on the vocabulary, and on several fields together. Every
refusal names its field.
"""

import math
from typing import Any, TypeVar

from server.api.sampling_schemas import (
    MAX_LOGIT_BIAS,
    MAX_REFERENCE_CHARS,
    MAX_STOP,
    MAX_STOP_CHARS,
    GenerationFields,
)
from server.engine.request import SamplingParams
from server.errors import InvalidRequestError, TaskNotFoundError
from server.runtime.generation import check_length

MAX_BIAS = 100.0

T = TypeVar("T")


def value_or(value: T | None, default: T) -> T:
    """Null stands for a field's default."""
    return default if value is None else value


def refuse_unsupported(body: GenerationFields) -> None:
    if body.response_format is not None and body.response_format != {"type": "text"}:
        raise InvalidRequestError("response_format: only text is supported", param="response_format")
    if body.include_stop_str_in_output:
        raise InvalidRequestError("include_stop_str_in_output: not supported", param="include_stop_str_in_output")
    if body.stream_options is not None and not body.stream:
        raise InvalidRequestError("stream_options: only with stream", param="stream_options")


def given_max_tokens(body: GenerationFields) -> int | None:
    """`max_tokens` under either of its names; None when neither was given."""
    if body.max_tokens is None:
        return body.max_completion_tokens
    if body.max_completion_tokens not in (None, body.max_tokens):
        raise InvalidRequestError(
            "max_completion_tokens: differs from max_tokens; give one of them", param="max_completion_tokens"
        )
    return body.max_tokens


def to_sampling(
    body: GenerationFields, *, vocab_size: int, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None
) -> SamplingParams:
    min_tokens = value_or(body.min_tokens, 0)
    if min_tokens > max_tokens:
        raise InvalidRequestError(f"min_tokens: must be at most max_tokens ({max_tokens})", param="min_tokens")
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=value_or(body.temperature, 1.0),
        top_p=value_or(body.top_p, 1.0),
        top_k=max(value_or(body.top_k, 0), 0),
        min_p=value_or(body.min_p, 0.0),
        presence_penalty=value_or(body.presence_penalty, 0.0),
        frequency_penalty=value_or(body.frequency_penalty, 0.0),
        repetition_penalty=value_or(body.repetition_penalty, 1.0),
        logit_bias=_logit_bias(body.logit_bias, vocab_size),
        seed=body.seed,
        stop=_stop(body.stop),
        stop_token_ids=check_vocabulary(body.stop_token_ids or [], "stop_token_ids", vocab_size),
        ignore_eos=value_or(body.ignore_eos, False),
        skip_special_tokens=value_or(body.skip_special_tokens, True),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def check_text(text: str, param: str) -> str:
    if not text:
        raise InvalidRequestError(f"{param}: must not be empty", param=param)
    return check_unicode(text, param)


def check_unicode(text: str, param: str) -> str:
    try:
        # JSON can spell half a surrogate pair, which no tokenizer takes.
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidRequestError(f"{param}: must be valid Unicode text", param=param) from None
    return text


def check_ids(ids: list[Any], param: str, vocab_size: int, max_model_len: int) -> tuple[int, ...]:
    """Token ids of one prompt, not empty and no longer than the backbone takes."""
    if not ids:
        raise InvalidRequestError(f"{param}: must not be empty", param=param)
    # Before the ids are looked at: a body may hold millions.
    check_length(len(ids), 0, 0, max_model_len, param)
    return check_vocabulary(ids, param, vocab_size)


def check_vocabulary(ids: list[Any], param: str, vocab_size: int) -> tuple[int, ...]:
    if not ids or (set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < vocab_size):
        return tuple(ids)
    for index, token_id in enumerate(ids):
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise InvalidRequestError(
                f"{param}.{index}: must be a token id from 0 to {vocab_size - 1}", param=f"{param}.{index}"
            )
    return tuple(ids)


def check_reference(reference: str, param: str) -> str:
    """Raises TaskNotFoundError for a name that no task can have."""
    if not reference or len(reference) > MAX_REFERENCE_CHARS:
        shown = reference[:MAX_REFERENCE_CHARS]
        raise TaskNotFoundError(f"The model `{shown}` does not exist or you do not have access to it.", param=param)
    return reference


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
        if not 1 <= len(check_unicode(stop, param)) <= MAX_STOP_CHARS:
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
        # Compared, not converted: an integer may have more digits than a float.
        if type(bias) not in (int, float) or not -math.inf < bias < math.inf:
            raise InvalidRequestError("logit_bias: values must be finite numbers", param=f"logit_bias.{key}")
        biases[int(key)] = float(min(max(bias, -MAX_BIAS), MAX_BIAS))
    return biases
