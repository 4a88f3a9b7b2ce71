"""The bucket against a sum over everything that was ever taken."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from server.tenancy.buckets import TokenBucket


@given(
    per_minute=st.integers(1, 1000),
    steps=st.lists(st.tuples(st.integers(0, 90), st.integers(0, 400)), max_size=30),
)
def test_no_minute_gives_more_than_twice_its_worth_and_waiting_helps(
    per_minute: int, steps: list[tuple[int, int]]
) -> None:
    """A full bucket and what drips in during the minute are the most that any minute can give."""
    bucket, now_s = TokenBucket(per_minute, 0.0), 0.0
    taken: list[tuple[float, int]] = []
    for pause_s, amount in steps:
        now_s += pause_s
        wait_s = bucket.wait_s(amount, now_s)
        if wait_s == 0:
            bucket.take(amount, now_s)
            taken.append((now_s, amount))
        elif amount <= per_minute:
            assert bucket.wait_s(amount, now_s + wait_s + 1e-6) == 0, "it may be taken when it was said"
            now_s += wait_s + 1e-6
            bucket.take(amount, now_s)
            taken.append((now_s, amount))
        else:
            assert wait_s == float("inf")
    for start_s, _ in taken:
        assert sum(amount for at_s, amount in taken if start_s <= at_s < start_s + 60) <= 2 * per_minute + 1e-3


def test_what_is_given_back_can_be_taken_again() -> None:
    bucket = TokenBucket(60, 0.0)
    bucket.take(60, 0.0)
    assert bucket.wait_s(30, 0.0) == pytest.approx(30)
    bucket.take(-40, 0.0)
    assert bucket.wait_s(30, 0.0) == 0
    bucket.take(-400, 0.0)
    assert bucket.level(0.0) == 60, "a bucket holds no more than a minute's worth"


def test_new_limit_keeps_what_is_missing() -> None:
    bucket = TokenBucket(100, 0.0)
    bucket.take(30, 0.0)
    bucket.set_limit(50, 0.0)
    assert bucket.level(0.0) == 20


def test_limit_of_zero_lets_nothing_through() -> None:
    bucket = TokenBucket(0, 0.0)
    assert bucket.wait_s(1, 1000.0) == float("inf")
    bucket.take(5, 0.0)
    assert bucket.wait_s(0, 1000.0) == float("inf")
