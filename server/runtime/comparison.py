"""How two versions of a task behave on the same inputs: what they answer, and how likely they find what was expected.

Both answer greedily, in the same batches, so that the prompt is all that differs. Owns the figures that come of it.
Refuses to know HTTP, and what the prompts are made of (`server.runtime.inspection`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from server.runtime.answers import Ask, Question, answer, is_expected, score, slices
from server.runtime.receipts import RequestOrigin
from server.tenancy.keys import Caller

if TYPE_CHECKING:
    from server.runtime.service import Runtime

MAX_INPUTS = 256
MAX_NEW_TOKENS = 128
MAX_TEXT_CHARS = 32_768
MAX_DIFFERENCES = 20
MAX_SHOWN_CHARS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class DifferentAnswer:
    """An input that the two answer differently; long texts are cut. `logprobs` are the completion's, if it is known."""

    index: int
    prompt: str
    completion: str | None
    answers: tuple[str, str]
    logprobs: tuple[float, float] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """`exact_match` and `logprobs` (means over `num_scored` inputs) are None where no completion is known."""

    num_inputs: int
    agreement: float
    exact_match: tuple[float, float] | None
    logprobs: tuple[float, float] | None
    num_scored: int
    num_different: int
    differences: tuple[DifferentAnswer, ...]


@dataclass(frozen=True, slots=True)
class _Result:
    question: Question
    answers: tuple[str, str]
    logprobs: tuple[float, float] | None


async def compare(
    runtime: "Runtime",
    caller: Caller,
    references: tuple[str, str],
    questions: Sequence[Question],
    *,
    max_tokens: int,
    param: str,
    origin: RequestOrigin | None = None,
) -> Comparison:
    """Ask both at least one question. Each reference must be one version, or the backbone's name.

    Raises what running rows raises; errors about an input name `param`.
    """
    results: list[_Result] = []
    for places in slices(len(questions), rows_each=2, max_tokens=max_tokens, settings=runtime.settings):
        asked = [questions[place] for place in places]
        asks = [Ask(question, reference, max_tokens) for reference in references for question in asked]
        answers = await answer(runtime, caller, asks, param=param, fills_context=False, origin=origin)
        scored = [ask for ask in asks if ask.question.completion is not None]
        scores = await score(runtime, caller, scored, param=param, origin=origin) if scored else []
        results.extend(_pair(asked, answers, scores))
    return _summarize(results)


def _pair(asked: Sequence[Question], answers: Sequence[str], scores: Sequence[float]) -> list[_Result]:
    """Answers and scores hold those of the first version, then those of the second."""
    pairs = zip(answers[: len(asked)], answers[len(asked) :], strict=True)
    half = len(scores) // 2
    of_scored = iter(zip(scores[:half], scores[half:], strict=True))
    return [
        _Result(question, pair, next(of_scored) if question.completion is not None else None)
        for question, pair in zip(asked, pairs, strict=True)
    ]


def _summarize(results: Sequence[_Result]) -> Comparison:
    different = [index for index, result in enumerate(results) if result.answers[0] != result.answers[1]]
    matches = [
        tuple(is_expected(text, result.question.completion) for text in result.answers)
        for result in results
        if result.question.completion is not None
    ]
    scores = [result.logprobs for result in results if result.logprobs is not None]
    return Comparison(
        num_inputs=len(results),
        agreement=1 - len(different) / len(results),
        exact_match=(_share(matches, 0), _share(matches, 1)) if matches else None,
        logprobs=(_mean(scores, 0), _mean(scores, 1)) if scores else None,
        num_scored=len(scores),
        num_different=len(different),
        differences=tuple(_show(index, results[index]) for index in different[:MAX_DIFFERENCES]),
    )


def _share(matches: Sequence[tuple[bool, ...]], place: int) -> float:
    return sum(match[place] for match in matches) / len(matches)


def _mean(scores: Sequence[tuple[float, float]], place: int) -> float:
    return math.fsum(pair[place] for pair in scores) / len(scores)


def _show(index: int, result: _Result) -> DifferentAnswer:
    question = result.question
    return DifferentAnswer(
        index=index,
        prompt=cut(question.prompt),
        completion=None if question.completion is None else cut(question.completion),
        answers=(cut(result.answers[0]), cut(result.answers[1])),
        logprobs=result.logprobs,
    )


def cut(text: str) -> str:
    return text if len(text) <= MAX_SHOWN_CHARS else text[: MAX_SHOWN_CHARS - 1] + "…"
