"""When requests are sent: a closed loop of so many clients, or an open loop of Poisson arrivals.

Owns arrival times and the record of every request that was sent: none is dropped, whatever became of it. Refuses to
know whom it sends to. All times are of the running event loop's clock, which is `time.monotonic`.

An open loop does not wait for answers, so that a server that falls behind is seen to fall behind; its latencies count
from when a request was due, not from when it could be sent (coordinated omission: Tene, "How NOT to measure latency").
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from server.bench.workload import BenchRequest

FAILURE_PAUSE_S = 0.1  # a client whose request failed waits, so that a dead server is not hammered


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a request failed. `kind` is the server's error code, or what broke on the way; `status` the HTTP status."""

    kind: str
    message: str
    status: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back: when each token did, when it was over, and what went wrong, if anything."""

    token_times_s: Sequence[float]
    ended_s: float
    num_cached_tokens: int = 0
    failure: Failure | None = None


class Target(Protocol):
    """Whoever answers requests: the engine in process, or a server."""

    async def answer(self, request: BenchRequest) -> Answer:
        """Sends one request and waits for its end. What goes wrong is in the answer, not raised."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """One request from beginning to end; times are seconds from the load's start.

    `num_new_tokens` were asked for; as many came as there are `token_times_s`.
    """

    prompt: int | None
    num_prompt_tokens: int
    num_new_tokens: int
    due_s: float
    sent_s: float
    token_times_s: tuple[float, ...]
    ended_s: float
    num_cached_tokens: int
    failure: Failure | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """How hard and how long. One of `concurrency` (closed loop) and `rate` (open loop, requests a second) is set.

    It ends after `num_requests` or `duration_s`, whichever comes first; requests that are running then go on to their
    end and count. One of the two is set.
    """

    concurrency: int | None = None
    rate: float | None = None
    num_requests: int | None = None
    duration_s: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        assert (self.concurrency is None) != (self.rate is None)
        assert self.num_requests is not None or self.duration_s is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadResult:
    """All records, in the order in which the requests ended, and the time from the start to the last end."""

    records: Sequence[RequestRecord]
    wall_s: float


def poisson_arrivals(rate: float, seed: int) -> Iterator[float]:
    """Arrival times in seconds, from 0 on: gaps are exponential with mean 1 / `rate`."""
    rng = np.random.default_rng((seed, 3))
    now_s = 0.0
    while True:
        now_s += float(rng.exponential(1 / rate))
        yield now_s


async def run_load(
    target: Target,
    requests: Iterable[BenchRequest],
    plan: LoadPlan,
    on_record: Callable[[RequestRecord], None] = lambda record: None,
) -> LoadResult:
    """Sends requests as planned and waits for the last answer. `on_record` is called as each request ends."""
    run = _Run(target, plan, on_record)
    supply = iter(requests)
    if plan.rate is not None:
        await run.open_loop(supply, plan.rate)
    else:
        await run.closed_loop(supply, plan.concurrency or 1)
    return LoadResult(records=run.records, wall_s=max((record.ended_s for record in run.records), default=0.0))


class _Run:
    """One load while it runs."""

    def __init__(self, target: Target, plan: LoadPlan, on_record: Callable[[RequestRecord], None]) -> None:
        self.records: list[RequestRecord] = []
        self._target = target
        self._plan = plan
        self._on_record = on_record
        self._clock = asyncio.get_running_loop().time
        self._start_s = self._clock()
        self._num_sent = 0

    async def open_loop(self, supply: Iterator[BenchRequest], rate: float) -> None:
        async with asyncio.TaskGroup() as tasks:
            for due_s in poisson_arrivals(rate, self._plan.seed):
                if self._is_over(due_s):
                    break
                await asyncio.sleep(self._start_s + due_s - self._clock())
                tasks.create_task(self._send(next(supply), due_s))

    async def closed_loop(self, supply: Iterator[BenchRequest], concurrency: int) -> None:
        limit = self._plan.num_requests
        async with asyncio.TaskGroup() as tasks:
            for _ in range(concurrency if limit is None else min(concurrency, limit)):
                tasks.create_task(self._client(supply))

    async def _client(self, supply: Iterator[BenchRequest]) -> None:
        """One client: the next request as soon as the last is answered."""
        while not self._is_over(self._clock() - self._start_s):
            record = await self._send(next(supply), None)
            if record.failure is not None:
                await asyncio.sleep(FAILURE_PAUSE_S)

    def _is_over(self, at_s: float) -> bool:
        """Whether nothing more is sent; counts what is."""
        plan = self._plan
        if plan.num_requests is not None and self._num_sent >= plan.num_requests:
            return True
        if plan.duration_s is not None and at_s >= plan.duration_s:
            return True
        self._num_sent += 1
        return False

    async def _send(self, request: BenchRequest, due_s: float | None) -> RequestRecord:
        sent_s = self._clock() - self._start_s
        answer = await self._target.answer(request)
        record = RequestRecord(
            prompt=request.prompt,
            num_prompt_tokens=len(request.token_ids),
            num_new_tokens=request.num_new_tokens,
            due_s=sent_s if due_s is None else due_s,
            sent_s=sent_s,
            token_times_s=tuple(time_s - self._start_s for time_s in answer.token_times_s),
            ended_s=answer.ended_s - self._start_s,
            num_cached_tokens=answer.num_cached_tokens,
            failure=answer.failure,
        )
        self.records.append(record)
        self._on_record(record)
        return record
