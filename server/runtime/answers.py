"""Many questions answered beside the serving: greedily, in slices, by rows that let every other row go first.

Owns how questions become rows of one batch (each with its own limit of new tokens), how completions are scored, and
when an answer counts as the completion that was expected. What the answers are for is `server.runtime.comparison`'s
and `server.runtime.gates`' business. Refuses to know HTTP.
"""

import math
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from server.engine.request import RowOutput, SamplingParams
from server.errors import QuotaExceededError
from server.runtime.generation import Generation, GenerationSpec, encode_prompt
from server.runtime.receipts import RequestOrigin
from server.runtime.streams import merge_outputs
from server.runtime.tokens import TokenCodec
from server.settings import Settings
from server.tenancy.keys import Caller

if TYPE_CHECKING:
    from server.runtime.service import Runtime

Result = TypeVar("Result")

# Behind every row that a client asks for: the largest number that a request may give.
PRIORITY = 100
# A slice waits for its longest row; a larger one would fill the queue that clients need.
MAX_SLICE_ROWS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A text that is to be continued, and its continuation if that is known; as tokens, the whole being one after the
    other, as in training.
    """

    prompt: str
    completion: str | None
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Ask:
    """A question to what `reference` stands for, which must be one version or the backbone's name."""

    question: Question
    reference: str
    max_tokens: int


def tokenize_questions(
    texts: Sequence[tuple[str, str | None]], codec: TokenCodec, *, max_model_len: int, param: str
) -> tuple[Question, ...]:
    """Prompts with their completions. Raises InvalidRequestError, naming the prompt by its place in `param`."""
    questions = []
    for index, (prompt, completion) in enumerate(texts):
        prompt_ids = encode_prompt(
            prompt, codec, add_special_tokens=True, max_model_len=max_model_len, param=f"{param}.{index}.prompt"
        )
        completion_ids: tuple[int, ...] = ()
        if completion is not None:
            completion_ids = encode_prompt(
                completion,
                codec,
                add_special_tokens=False,
                max_model_len=max_model_len,
                param=f"{param}.{index}.completion",
            )
        questions.append(
            Question(prompt=prompt, completion=completion, prompt_ids=prompt_ids, completion_ids=completion_ids)
        )
    return tuple(questions)


def is_expected(answer: str, completion: str) -> bool:
    """Whether an answer is the completion: both without surrounding space, and the answer only up to the end of its
    first line unless the completion has several.
    """
    expected, given = completion.strip(), answer.strip()
    if "\n" not in expected:
        given = given.partition("\n")[0].rstrip()
    return given == expected


def slices(num_items: int, *, rows_each: int, max_tokens: int, settings: Settings) -> Iterator[range]:
    """Places of items that are asked together, each of them taking so many rows of so many new tokens at most: no more
    than one request may ask for.
    """
    max_rows = min(MAX_SLICE_ROWS, settings.max_waiting_rows, settings.max_request_tokens // max_tokens)
    size = max(max_rows // rows_each, 1)
    for start in range(0, num_items, size):
        yield range(start, min(start + size, num_items))


async def answer(
    runtime: "Runtime",
    caller: Caller,
    asks: Sequence[Ask],
    *,
    param: str,
    fills_context: bool,
    origin: RequestOrigin | None = None,
) -> list[str]:
    """The greedy answer to each. With `fills_context` one that has no room for all its new tokens has fewer; else that
    is a ContextLengthExceededError. Raises what running rows raises. Cancelled, it leaves no row behind.
    """

    async def ask_at_once(some: Sequence[Ask]) -> list[str]:
        return await _answer_at_once(runtime, caller, some, param=param, fills_context=fills_context, origin=origin)

    return await _in_parts(asks, ask_at_once)


async def score(
    runtime: "Runtime", caller: Caller, asks: Sequence[Ask], *, param: str, origin: RequestOrigin | None = None
) -> list[float]:
    """The log-likelihood of each question's completion, which must be known. Errors as in `answer`."""

    async def score_at_once(some: Sequence[Ask]) -> list[float]:
        return await _score_at_once(runtime, caller, some, param=param, origin=origin)

    return await _in_parts(asks, score_at_once)


async def _in_parts(
    asks: Sequence[Ask], ask_at_once: Callable[[Sequence[Ask]], Awaitable[list[Result]]]
) -> list[Result]:
    """All at once, or as many as the tenant's quota of rows allows. Raises QuotaExceededError when that is none."""
    try:
        return await ask_at_once(asks)
    except QuotaExceededError:
        if len(asks) == 1:
            raise
    half = len(asks) // 2
    return [*await _in_parts(asks[:half], ask_at_once), *await _in_parts(asks[half:], ask_at_once)]


async def _answer_at_once(
    runtime: "Runtime",
    caller: Caller,
    asks: Sequence[Ask],
    *,
    param: str,
    fills_context: bool,
    origin: RequestOrigin | None,
) -> list[str]:
    spec = GenerationSpec(
        prompts=tuple(ask.question.prompt_ids for ask in asks),
        references=tuple(ask.reference for ask in asks),
        n=1,
        sampling=SamplingParams(max_tokens=max(ask.max_tokens for ask in asks), temperature=0.0),
        fills_context=fills_context,
        priority=PRIORITY,
        param=param,
    )
    generation = await runtime.prepare(caller, spec, origin=origin)
    rows = tuple(
        replace(row, sampling=replace(row.sampling, max_tokens=min(row.sampling.max_tokens, ask.max_tokens)))
        for row, ask in zip(generation.rows, asks, strict=True)
    )
    return [output.text for output in await _run(runtime, replace(generation, rows=rows), origin)]


async def _score_at_once(
    runtime: "Runtime", caller: Caller, asks: Sequence[Ask], *, param: str, origin: RequestOrigin | None
) -> list[float]:
    spec = GenerationSpec(
        prompts=tuple((*ask.question.prompt_ids, *ask.question.completion_ids) for ask in asks),
        references=tuple(ask.reference for ask in asks),
        n=1,
        sampling=SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=0),
        priority=PRIORITY,
        param=param,
    )
    generation = await runtime.prepare(caller, spec, origin=origin)
    outputs = await _run(runtime, generation, origin)
    return [
        math.fsum(
            entry.logprob
            for entry in (output.prompt_logprobs or ())[len(ask.question.prompt_ids) :]
            if entry is not None
        )
        for output, ask in zip(outputs, asks, strict=True)
    ]


async def _run(runtime: "Runtime", generation: Generation, origin: RequestOrigin | None) -> list[RowOutput]:
    """One output a row, in the order of rows. Raises the first row's error."""
    running = runtime.submit(generation, arrived_at_s=time.monotonic(), origin=origin)
    stream = running.stream
    outputs: list[RowOutput] = []
    try:
        while not stream.is_finished:
            news = await stream.read()
            for output in news:
                if output.error is not None:
                    raise output.error
            outputs.extend(news)
    finally:
        stream.close()
    by_row = {output.row_id: output for output in merge_outputs(outputs)}
    return [by_row[row.row_id] for row in generation.rows]
