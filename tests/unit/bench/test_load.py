"""Loops send when they should, wait for every answer, and drop nothing. Time is virtual: nothing here waits."""

import asyncio
import math
from collections.abc import Iterator
from itertools import islice, pairwise

import numpy as np
import pytest

from server.bench.load import FAILURE_PAUSE_S, Answer, Failure, LoadPlan, LoadResult, poisson_arrivals, run_load
from server.bench.workload import BenchRequest
from tests.unit.bench.virtual_time import run_in_virtual_time


class SlowTarget:
    """Answers after `answer_s` with a token at half time; requests whose number of new tokens is in `broken` fail."""

    def __init__(self, answer_s: float, broken: frozenset[int] = frozenset()) -> None:
        self.num_running = 0
        self.max_running = 0
        self.sent: list[int] = []
        self._answer_s = answer_s
        self._broken = broken

    async def answer(self, request: BenchRequest) -> Answer:
        loop = asyncio.get_running_loop()
        self.sent.append(request.num_new_tokens)
        self.num_running += 1
        self.max_running = max(self.max_running, self.num_running)
        began_s = loop.time()
        await asyncio.sleep(self._answer_s)
        self.num_running -= 1
        failed = request.num_new_tokens in self._broken
        return Answer(
            token_times_s=[began_s + self._answer_s / 2],
            ended_s=loop.time(),
            num_cached_tokens=2,
            failure=Failure(kind="broken", message="it broke") if failed else None,
        )


def numbered_requests() -> Iterator[BenchRequest]:
    """Their numbers of new tokens tell them apart: 1, 2, …"""
    number = 0
    while True:
        number += 1
        yield BenchRequest(None, (5, 6, 7), number)


def run(target: SlowTarget, plan: LoadPlan) -> LoadResult:
    return run_in_virtual_time(run_load(target, numbered_requests(), plan))


def test_closed_loop_keeps_exactly_so_many_requests_running() -> None:
    target = SlowTarget(2.0)
    result = run(target, LoadPlan(concurrency=4, num_requests=10))

    assert target.sent == list(range(1, 11))
    assert target.max_running == 4
    assert [record.sent_s for record in result.records] == [0.0] * 4 + [2.0] * 4 + [4.0] * 2
    assert result.wall_s == 6.0


def test_closed_loop_has_no_more_clients_than_requests() -> None:
    target = SlowTarget(1.0)
    assert len(run(target, LoadPlan(concurrency=100, num_requests=3)).records) == 3
    assert target.max_running == 3


def test_duration_ends_the_sending_and_what_runs_is_finished_and_counted() -> None:
    target = SlowTarget(2.0)
    result = run(target, LoadPlan(concurrency=3, duration_s=5.0))

    assert [record.sent_s for record in result.records] == [0.0] * 3 + [2.0] * 3 + [4.0] * 3
    assert result.wall_s == 6.0
    assert target.num_running == 0


def test_the_first_of_two_ends_is_the_end() -> None:
    assert len(run(SlowTarget(1.0), LoadPlan(concurrency=1, duration_s=3.5, num_requests=50)).records) == 4
    assert len(run(SlowTarget(1.0), LoadPlan(concurrency=1, duration_s=99.0, num_requests=2)).records) == 2


def test_open_loop_sends_at_the_arrival_times_whatever_runs() -> None:
    target = SlowTarget(100.0)
    result = run(target, LoadPlan(rate=5.0, num_requests=30, seed=4))

    expected = list(islice(poisson_arrivals(5.0, 4), 30))
    assert [record.due_s for record in result.records] == expected
    assert [record.sent_s for record in result.records] == pytest.approx(expected)
    assert target.max_running == 30
    assert result.wall_s == pytest.approx(expected[-1] + 100.0)


def test_open_loop_of_a_duration_sends_all_arrivals_within_it() -> None:
    result = run(SlowTarget(0.1), LoadPlan(rate=7.0, duration_s=20.0, seed=4))

    expected = [at_s for at_s in islice(poisson_arrivals(7.0, 4), 1000) if at_s < 20.0]
    assert sorted(record.due_s for record in result.records) == expected


def test_open_loop_that_is_held_up_keeps_to_the_times_that_were_due() -> None:
    class BlockingTarget(SlowTarget):
        async def answer(self, request: BenchRequest) -> Answer:
            # The whole loop stands still, as when the client's machine is busy.
            asyncio.get_running_loop()._now_s += 3.0  # type: ignore[attr-defined]
            return await super().answer(request)

    result = run(BlockingTarget(0.0), LoadPlan(rate=1.0, num_requests=8, seed=1))

    assert [record.due_s for record in result.records] == list(islice(poisson_arrivals(1.0, 1), 8))
    assert max(record.sent_s - record.due_s for record in result.records) > 5.0


def test_failed_requests_are_recorded_and_the_client_pauses_before_its_next() -> None:
    result = run(SlowTarget(1.0, frozenset({1, 2})), LoadPlan(concurrency=1, num_requests=3))

    assert [record.failure is not None for record in result.records] == [True, True, False]
    assert [record.sent_s for record in result.records] == pytest.approx(
        [0.0, 1.0 + FAILURE_PAUSE_S, 2.0 + 2 * FAILURE_PAUSE_S]
    )
    assert [record.num_new_tokens for record in result.records] == [1, 2, 3]


def test_records_say_what_was_asked_and_when_in_seconds_from_the_start() -> None:
    (record,) = run(SlowTarget(3.0), LoadPlan(concurrency=1, num_requests=1)).records

    assert (record.prompt, record.num_prompt_tokens, record.num_new_tokens) == (None, 3, 1)
    assert (record.sent_s, record.token_times_s, record.ended_s) == (0.0, (1.5,), 3.0)
    assert record.num_cached_tokens == 2


def test_every_record_is_told_as_it_ends() -> None:
    told: list[int] = []
    plan = LoadPlan(concurrency=2, num_requests=5)
    result = run_in_virtual_time(
        run_load(SlowTarget(1.0), numbered_requests(), plan, lambda record: told.append(record.num_new_tokens))
    )

    assert told == [record.num_new_tokens for record in result.records] == [1, 2, 3, 4, 5]


def test_arrivals_are_those_of_a_poisson_process() -> None:
    rate, count = 4.0, 20_000
    times = np.array(list(islice(poisson_arrivals(rate, 11), count)))
    gaps = np.diff(times)

    # Kolmogorov-Smirnov against the exponential distribution; 1.95 / sqrt(n) is passed once in a thousand seeds.
    shares = 1 - np.exp(-rate * np.sort(gaps))
    steps = np.arange(1, len(gaps) + 1) / len(gaps)
    assert float(np.abs(shares - steps).max()) < 1.95 / math.sqrt(len(gaps))
    # Counts in windows: mean and variance alike, which is not so for a steady or a bursty clock.
    counts = np.bincount(times.astype(int))[:-1]
    assert counts.var() / counts.mean() == pytest.approx(1.0, abs=0.1)
    # A gap says nothing about the next.
    assert abs(float(np.corrcoef(gaps[:-1], gaps[1:])[0, 1])) < 0.03


def test_arrivals_depend_on_the_seed_alone_and_scale_with_the_rate() -> None:
    first, again, other, fast = (
        list(islice(poisson_arrivals(rate, seed), 50)) for rate, seed in ((2.0, 1), (2.0, 1), (2.0, 2), (8.0, 1))
    )

    assert first == again
    assert first != other
    assert [at_s * 4 for at_s in fast] == pytest.approx(first)
    assert all(a < b for a, b in pairwise(first))
