"""The warm-up comes first and is not counted; the metrics are read around the load alone."""

import asyncio
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest

from server.bench.load import Answer, Failure, LoadPlan
from server.bench.measurement import MAX_SETTLING_ROUNDS, Measurement, WarmUpError, measure
from server.bench.workload import BenchRequest
from server.metrics import Metrics
from tests.unit.bench.virtual_time import run_in_virtual_time

WARM_UP = [BenchRequest(None, (5,), 100 + i) for i in range(3)]
LOAD = [BenchRequest(None, (5,), i) for i in range(4)]


class CountingTarget:
    """Makes a step a request; requests whose number of new tokens is in `broken` fail."""

    def __init__(self, broken: frozenset[int] = frozenset()) -> None:
        self.metrics = Metrics()
        self.log: list[object] = []
        self._broken = broken

    async def answer(self, request: BenchRequest) -> Answer:
        self.log.append(request.num_new_tokens)
        self.metrics.batch_rows.observe(1)
        failure = Failure(kind="broken", message=f"{request.num_new_tokens}", status=400)
        return Answer(
            token_times_s=[],
            ended_s=asyncio.get_running_loop().time(),
            failure=failure if request.num_new_tokens in self._broken else None,
        )

    async def read_metrics(self) -> str | None:
        self.log.append("look")
        return self.metrics.render()[0].decode()

    @contextmanager
    def around(self) -> Iterator[None]:
        self.log.append("enter")
        yield
        self.log.append("leave")


def run(target: CountingTarget, is_settled: Callable[[], bool] = lambda: True) -> Measurement:
    plan = LoadPlan(concurrency=1, num_requests=len(LOAD))
    return run_in_virtual_time(
        measure(
            target,
            LOAD,
            plan,
            warm_up=itertools.repeat(WARM_UP),
            warm_up_concurrency=1,
            is_settled=is_settled,
            read_metrics=target.read_metrics,
            around=target.around(),
        )
    )


def test_warm_up_then_look_then_load_then_look() -> None:
    target = CountingTarget()
    measured = run(target)

    assert target.log == [100, 101, 102, "enter", "look", 0, 1, 2, 3, "look", "leave"]
    assert [record.num_new_tokens for record in measured.result.records] == [0, 1, 2, 3]
    assert measured.steps is not None
    assert measured.steps.num_steps == 4


@pytest.mark.parametrize("rounds", [1, 3, 1000])
def test_warm_up_goes_on_until_it_has_settled_but_not_for_ever(rounds: int) -> None:
    target = CountingTarget()
    asked = itertools.count(1)
    run(target, is_settled=lambda: next(asked) >= rounds)

    assert target.log.count(100) == min(rounds, MAX_SETTLING_ROUNDS)
    assert target.log.index("enter") == 3 * min(rounds, MAX_SETTLING_ROUNDS)


def test_a_warm_up_of_failures_alone_ends_it_with_the_first() -> None:
    target = CountingTarget(frozenset({100, 101, 102}))

    with pytest.raises(WarmUpError, match="broken: 100") as caught:
        run(target)
    assert caught.value.failure.status == 400
    assert 0 not in target.log


def test_a_warm_up_that_fails_in_part_is_no_hindrance() -> None:
    assert len(run(CountingTarget(frozenset({100, 102, 2}))).result.records) == 4


@pytest.mark.parametrize("text", [None, "<html>not ours</html>"])
def test_metrics_that_cannot_be_read_leave_the_steps_out(text: str | None) -> None:
    async def look() -> str | None:
        return text

    measured = run_in_virtual_time(
        measure(
            CountingTarget(),
            LOAD,
            LoadPlan(concurrency=1, num_requests=2),
            warm_up=itertools.repeat(()),
            warm_up_concurrency=1,
            read_metrics=look,
            around=nullcontext(),
        )
    )
    assert measured.steps is None
    assert len(measured.result.records) == 2
