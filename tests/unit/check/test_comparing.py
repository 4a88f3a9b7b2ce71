"""When two answers are one: equal tokens within the tolerance, or a near-tie; anything else is a fault."""

import math
from collections.abc import Mapping

import pytest

from server.check.asking import Answer
from server.check.comparing import compare

TOLERANCE = 0.1


def answer(tokens: str, *logprobs: float, alternatives: Mapping[int, Mapping[str, float]] | None = None) -> Answer:
    """One character a token; `alternatives` by place, beside the chosen token."""
    more = alternatives or {}
    return Answer(
        digest="d",
        tokens=tuple(tokens),
        logprobs=logprobs,
        alternatives=tuple({t: p, **more.get(i, {})} for i, (t, p) in enumerate(zip(tokens, logprobs, strict=True))),
    )


def test_equal_tokens_within_the_tolerance_are_the_same_answer() -> None:
    found = compare(answer("abc", -1, -2, -3), answer("abc", -1.05, -2, -2.92), TOLERANCE)

    assert found.fault is None
    assert not found.is_near_tie
    assert found.num_compared == 3
    assert found.max_gap == pytest.approx(0.08)


@pytest.mark.parametrize("logprob", [-2.2, -1.8, math.nan, -math.inf])
def test_an_equal_token_with_another_probability_is_a_fault(logprob: float) -> None:
    found = compare(answer("abc", -1, -2, -3), answer("abc", -1, logprob, -3), TOLERANCE)

    assert found.fault is not None
    assert "token 1 ('b')" in found.fault


def test_another_token_that_was_as_likely_both_times_is_a_near_tie_and_ends_the_comparison() -> None:
    alone = answer("abc", -1, -2, -3, alternatives={1: {"x": -2.05}})
    mixed = answer("axz", -1, -1.99, -9, alternatives={1: {"b": -2.0}})

    found = compare(alone, mixed, TOLERANCE)

    assert found.fault is None
    assert found.is_near_tie
    assert found.num_compared == 1


@pytest.mark.parametrize(
    ("alone_says", "mixed_says"),
    [({"x": -2.5}, {"b": -2.0}), ({"x": -2.05}, {"b": -3.0}), ({}, {"b": -2.0}), ({"x": -2.05}, {})],
)
def test_another_token_that_was_less_likely_either_time_is_a_fault(
    alone_says: Mapping[str, float], mixed_says: Mapping[str, float]
) -> None:
    alone = answer("ab", -1, -2, alternatives={1: alone_says})
    mixed = answer("ax", -1, -2, alternatives={1: mixed_says})

    found = compare(alone, mixed, TOLERANCE)

    assert found.fault is not None
    assert "no near-tie" in found.fault


def test_an_answer_that_ends_early_is_a_fault() -> None:
    found = compare(answer("abc", -1, -2, -3), answer("ab", -1, -2), TOLERANCE)

    assert found.fault == "it has 2 tokens and had 3 alone"
