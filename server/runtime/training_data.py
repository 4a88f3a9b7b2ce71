"""A job's files as a trainer takes them: read, checked and encoded.

Owns the bounds on what a file may hold, and the turn of a bad line into an error that names it. Blocking, and pure
Python but for the tokenizer: any thread may do it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from server.errors import InvalidRequestError
from tuning.config import TrainConfig
from tuning.encoding import encode_examples, encode_label
from tuning.examples import DataError, EncodedExample, Example, list_problems, parse_examples
from tuning.records import TrainTask

MAX_PROBES: Final = 200
MAX_PROBES_BYTES: Final = 1024 * 1024
MAX_ERROR_CHARS: Final = 2000
_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class JobData:
    """What a job is trained with. `probes` are JSON lines for a gate, None if it asks for none."""

    task: TrainTask
    labels: tuple[str, ...]
    probes: bytes | None
    tokens_an_example: float


def count_examples(data: bytes, filename: str, tokenizer: Any, *, max_examples: int) -> int:
    """How many examples a file holds. Raises InvalidRequestError, which names lines and fields."""
    examples = _read(data, filename, tokenizer, param="file")
    if len(examples) > max_examples:
        raise InvalidRequestError(
            f"The file has {len(examples)} examples; this server allows {max_examples}.", param="file"
        )
    return len(examples)


def load_job_data(
    name: str,
    config: TrainConfig,
    tokenizer: Any,
    *,
    training: tuple[str, bytes],
    validation: tuple[str, bytes] | None,
    has_gate: bool,
    max_tokens: int,
) -> JobData:
    """Read and encode a job's files, `(filename, bytes)` each. `max_tokens` bounds virtual tokens and an example
    together, and the text of a cartridge. Raises InvalidRequestError whose `param` is the field that is wrong.
    """
    room = max_tokens - config.num_virtual_tokens
    if room < 2:
        raise InvalidRequestError(
            f"{config.num_virtual_tokens} virtual tokens leave nothing of the {max_tokens} tokens that a row may have.",
            param="promptmux.num_virtual_tokens",
        )
    _check_text(config, tokenizer, max_tokens)
    examples = _read(training[1], training[0], tokenizer, param="training_file")
    held_out: Sequence[Example] = ()
    if validation is not None:
        held_out = _read(validation[1], validation[0], tokenizer, param="validation_file")
    train = _encode(examples, tokenizer, room, param="training_file")
    labels = tuple(sorted({example.label for example in (*examples, *held_out) if example.label is not None}))
    task = TrainTask(
        name=name,
        config=config,
        train=train,
        validation=_encode(held_out, tokenizer, room, param="validation_file"),
        label_ids=tuple(encode_label(label, tokenizer) for label in labels),
    )
    return JobData(
        task=task,
        labels=labels,
        probes=_probes(held_out) if has_gate else None,
        tokens_an_example=sum(example.num_tokens for example in train) / len(train),
    )


def _read(data: bytes, filename: str, tokenizer: Any, *, param: str) -> tuple[Example, ...]:
    lines = data.removeprefix(_MARK).split(b"\n")
    has_template = getattr(tokenizer, "chat_template", None) is not None
    try:
        return parse_examples(lines, filename, tokenizer=tokenizer if has_template else None)
    except DataError as error:
        raise _refused(error, param) from None


def _encode(examples: Sequence[Example], tokenizer: Any, room: int, *, param: str) -> tuple[EncodedExample, ...]:
    try:
        encoded = encode_examples(examples, tokenizer)
        too_long = [
            example.problem(None, f"has {found.num_tokens} tokens; {room} are left beside the virtual ones. Shorten it")
            for example, found in zip(examples, encoded, strict=True)
            if found.num_tokens > room
        ]
        if too_long:
            raise list_problems(too_long)
    except DataError as error:
        raise _refused(error, param) from None
    return encoded


def _check_text(config: TrainConfig, tokenizer: Any, max_tokens: int) -> None:
    """A cartridge's whole text is one row of one pass."""
    if config.method != "cartridge" or config.init_text is None:
        return
    num_tokens = len(tokenizer(config.init_text)["input_ids"])
    if num_tokens > max_tokens:
        raise InvalidRequestError(
            f"promptmux.init_text: has {num_tokens} tokens; a row of training may have {max_tokens}.",
            param="promptmux.init_text",
        )


def _refused(error: DataError, param: str) -> InvalidRequestError:
    text = str(error)
    if len(text) > MAX_ERROR_CHARS:
        text = text[:MAX_ERROR_CHARS] + "…"
    return InvalidRequestError(text, param=param, code="invalid_training_file")


def _probes(examples: Sequence[Example]) -> bytes:
    """As many as a gate's check asks in reasonable time. Raises InvalidRequestError for messages, whose prompt is not
    a text that a client sends.
    """
    if any(example.is_rendered for example in examples):
        raise InvalidRequestError(
            'gate_threshold needs a validation_file of {"prompt", "completion"} or {"text", "label"} lines; this one '
            "has messages.",
            param="validation_file",
        )
    lines: list[bytes] = []
    num_bytes = 0
    for example in examples[:MAX_PROBES]:
        line = json.dumps({"prompt": example.prompt, "completion": example.completion}, ensure_ascii=False).encode()
        num_bytes += len(line) + 1
        if num_bytes > MAX_PROBES_BYTES:
            break
        lines.append(line)
    return b"\n".join(lines)
