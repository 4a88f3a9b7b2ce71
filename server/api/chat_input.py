"""From the body of a chat request to messages for the template and to what the runtime is asked for.

Owns the rules that types alone cannot say. Every refusal names its field.
"""

from collections.abc import Sequence
from typing import Any

from server.api.chat_schemas import MAX_PARTS, ChatCompletionRequest, ChatMessage
from server.api.sampling_input import (
    check_reference,
    check_unicode,
    given_max_tokens,
    refuse_unsupported,
    to_sampling,
    value_or,
)
from server.errors import InvalidRequestError
from server.runtime.generation import GenerationSpec

# About what a template writes around a message.
MESSAGE_CHARS = 32
_HARMLESS_CHOICES = (None, "none", "auto")
_MUST_BE_NULL = ("audio", "prediction", "reasoning_effort", "verbosity", "web_search_options")


def to_messages(messages: Sequence[ChatMessage]) -> list[dict[str, str]]:
    """Messages as chat templates take them: roles they know, content that is text. Raises InvalidRequestError."""
    found: list[dict[str, str]] = []
    for index, message in enumerate(messages):
        param = f"messages.{index}"
        role = "system" if message.role == "developer" else message.role
        entry = {"role": role, "content": _content(message.content, f"{param}.content")}
        if message.name is not None:
            entry["name"] = check_unicode(message.name, f"{param}.name")
        found.append(entry)
    return found


def num_chars(messages: Sequence[dict[str, str]]) -> int:
    """How much work it is to render and tokenise them."""
    return sum(len(message["content"]) + MESSAGE_CHARS for message in messages)


def check_chat(body: ChatCompletionRequest) -> None:
    """Raises InvalidRequestError for what is not supported and would change the answer."""
    refuse_unsupported(body)
    for name in ("tools", "functions"):
        if getattr(body, name):
            raise InvalidRequestError(f"{name}: not supported", param=name)
    for name in ("tool_choice", "function_call"):
        choice = getattr(body, name)
        if not isinstance(choice, str | None) or choice not in _HARMLESS_CHOICES:
            raise InvalidRequestError(f"{name}: not supported", param=name)
    for name in _MUST_BE_NULL:
        if getattr(body, name) is not None:
            raise InvalidRequestError(f"{name}: not supported", param=name)
    if body.modalities is not None and body.modalities != ["text"]:
        raise InvalidRequestError("modalities: only text is supported", param="modalities")
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequestError("top_logprobs: only with logprobs", param="top_logprobs")


def to_spec(
    body: ChatCompletionRequest, text: str, *, vocab_size: int, max_model_len: int, max_request_tokens: int
) -> GenerationSpec:
    """`text` is what the chat template made of the messages."""
    n = value_or(body.n, 1)
    max_tokens = given_max_tokens(body)
    fills_context = max_tokens is None
    if max_tokens is None:
        max_tokens = max(1, min(max_model_len, max_request_tokens // n))
    return GenerationSpec(
        prompts=(text,),
        references=(check_reference(body.model, "model"),),
        n=n,
        sampling=to_sampling(
            body,
            vocab_size=vocab_size,
            max_tokens=max_tokens,
            logprobs=value_or(body.top_logprobs, 0) if body.logprobs else None,
            prompt_logprobs=None,
        ),
        add_special_tokens=value_or(body.add_special_tokens, False),
        fills_context=fills_context,
        priority=value_or(body.priority, 0),
        param="messages",
    )


def _content(value: Any, param: str) -> str:
    if isinstance(value, str):
        return check_unicode(value, param)
    if not isinstance(value, list) or not value:
        raise InvalidRequestError(f"{param}: must be a string or a list of text parts", param=param)
    if len(value) > MAX_PARTS:
        raise InvalidRequestError(f"{param}: at most {MAX_PARTS} parts, got {len(value)}", param=param)
    texts: list[str] = []
    for index, part in enumerate(value):
        where = f"{param}.{index}"
        if not isinstance(part, dict) or part.get("type") != "text":
            raise InvalidRequestError(f"{where}: only parts of type text are supported", param=where)
        text = part.get("text")
        if not isinstance(text, str) or len(part) != 2:
            raise InvalidRequestError(f"{where}: a text part has a string as text, and no more", param=where)
        texts.append(check_unicode(text, where))
    return "\n".join(texts)
