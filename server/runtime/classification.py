"""Classification by likelihood: which tokens of "input and label" are scored, and what their scores say.

Each input is put before each label, and the label's own tokens are scored (the method of evaluation harnesses: the
whole is tokenised, and what follows the tokens that it shares with the input alone is the label). A label may grow
together with the end of its input; all labels of one input are scored from the first token in which any of them
differs from the input, so that their scores are comparable. Refuses to know HTTP and how rows are run.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.engine.request import TokenLogprob
from server.errors import InvalidRequestError
from server.runtime.generation import check_encoded, encode_prompt
from server.runtime.tokens import TokenCodec

LABELS_KEY = "labels"
MAX_LABELS = 128
MAX_LABEL_CHARS = 256


@dataclass(frozen=True, slots=True)
class ScoredInput:
    """One input: for each label the tokens of both, of which those from `start` on are scored."""

    rows: tuple[tuple[int, ...], ...]
    start: int


def labels_of_metadata(metadata: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The labels that a prompt version's metadata names; None unless it names some that can be used."""
    labels = metadata.get(LABELS_KEY)
    if not isinstance(labels, list) or not 2 <= len(labels) <= MAX_LABELS or len({*map(repr, labels)}) < len(labels):
        return None
    if not all(isinstance(label, str) and 1 <= len(label) <= MAX_LABEL_CHARS for label in labels):
        return None
    return tuple(labels)


def join(text: str, label: str, separator: str | None) -> str:
    """`separator` None: a space, unless there is white space already."""
    if separator is None:
        separator = "" if not text or text[-1].isspace() or label[0].isspace() else " "
    return f"{text}{separator}{label}"


def tokenize_inputs(
    inputs: Sequence[str],
    labels: Sequence[str],
    codec: TokenCodec,
    *,
    separator: str | None,
    add_special_tokens: bool,
    max_model_len: int,
    max_tokens: int,
) -> list[ScoredInput]:
    """Raises InvalidRequestError where a label leaves no token to score, and for more than `max_tokens` in all; early
    for an input that is far longer than `max_model_len`.
    """
    scored: list[ScoredInput] = []
    num_tokens = 0
    for index, text in enumerate(inputs):
        param = "input" if len(inputs) == 1 else f"input.{index}"
        context = encode_prompt(
            text, codec, add_special_tokens=add_special_tokens, max_model_len=max_model_len, param=param
        )
        # Before the work of tokenising it once a label.
        num_tokens += len(context) * len(labels)
        if num_tokens > max_tokens:
            raise InvalidRequestError(
                f"{param}: inputs × labels have more than {max_tokens} tokens, which is what one request may have",
                param=param,
            )
        rows = [codec.encode(join(text, label, separator), add_special_tokens=add_special_tokens) for label in labels]
        scored.append(ScoredInput(tuple(rows), _first_scored(context, rows, codec.vocab_size, param)))
    return scored


def _first_scored(context: Sequence[int], rows: Sequence[tuple[int, ...]], vocab_size: int, param: str) -> int:
    """The first index at which the tokens of some label differ from those of the input alone."""
    for row in rows:
        check_encoded(row, vocab_size, param)
    start = min(_num_shared(context, row) for row in rows)
    if start == 0 and len({row[0] for row in rows}) == 1:
        # All labels begin alike: their first token tells them not apart.
        start = 1
    if start == 0:
        # A text's first token has no log-probability.
        raise InvalidRequestError(
            f"{param}: its first token is part of the label; make it longer, or put a separator", param=param
        )
    for index, row in enumerate(rows):
        if len(row) <= start:
            raise InvalidRequestError(f"labels.{index}: adds no token of its own to the input", param=f"labels.{index}")
    return start


def _num_shared(first: Sequence[int], second: Sequence[int]) -> int:
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))


def score(entries: Sequence[TokenLogprob | None], start: int) -> float:
    """The log-likelihood of a row's tokens from `start` on, given those before."""
    return math.fsum(entry.logprob for entry in entries[start:] if entry is not None)


def softmax(scores: Sequence[float]) -> list[float]:
    largest = max(scores)
    weights = [math.exp(score - largest) for score in scores]
    total = math.fsum(weights)
    return [weight / total for weight in weights]
