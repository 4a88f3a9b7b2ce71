"""One measurement from warm-up to the last answer. Owns the order of things; refuses to know who answers."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from server.bench.load import Failure, LoadPlan, LoadResult, RequestRecord, Target, run_load
from server.bench.server_metrics import StepStats
from server.bench.workload import BenchRequest

SETTLE_S = 0.1
MAX_SETTLING_ROUNDS = 8

Look = Callable[[], Awaitable[str | None]]


class WarmUpError(Exception):
    """No request of the warm-up was answered: there is nothing to measure. `failure` is the first of them."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(f"{failure.kind}: {failure.message}")
        self.failure = failure


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """A load's records, and what the server's metrics say of the same time (None where they cannot be read)."""

    result: LoadResult
    steps: StepStats | None


async def measure(
    target: Target,
    requests: Iterable[BenchRequest],
    plan: LoadPlan,
    *,
    warm_up: Iterator[Sequence[BenchRequest]],
    warm_up_concurrency: int,
    is_settled: Callable[[], bool] = lambda: True,
    read_metrics: Look,
    around: AbstractContextManager[object],
    on_record: Callable[[RequestRecord], None] = lambda record: None,
) -> Measurement:
    """Sends the warm-up, which is not counted, and then the load.

    `warm_up` yields the requests of a round, other ones each time, or none where there is to be no warm-up. Rounds are
    sent until `is_settled`: one at least, `MAX_SETTLING_ROUNDS` at most.
    `read_metrics` gives the server's metrics as exposition text. `around` is entered for the load alone, such as a
    profiler. Raises WarmUpError.
    """
    for requests_of_round in itertools.islice(warm_up, MAX_SETTLING_ROUNDS):
        await _warm_up(target, requests_of_round, warm_up_concurrency)
        if is_settled():
            break
    with around:
        # Entering and leaving a profiler take seconds, which must not fall into a step that is still being timed.
        before = await _look(read_metrics)
        result = await run_load(target, requests, plan, on_record)
        after = await _look(read_metrics)
    return Measurement(result=result, steps=_steps(before, after))


async def _warm_up(target: Target, requests: Sequence[BenchRequest], concurrency: int) -> None:
    if not requests:
        return
    warm = await run_load(target, requests, LoadPlan(concurrency=concurrency, num_requests=len(requests)))
    failures = [record.failure for record in warm.records if record.failure is not None]
    if len(failures) == len(requests):
        raise WarmUpError(failures[0])


async def _look(read_metrics: Look) -> str | None:
    """The metrics, once the last step is in them: it hands its tokens over before it is counted."""
    await asyncio.sleep(SETTLE_S)
    return await read_metrics()


def _steps(before: str | None, after: str | None) -> StepStats | None:
    if before is None or after is None:
        return None
    try:
        return StepStats.between(before, after)
    except ValueError:
        # Something else than promptmux answers there.
        return None
