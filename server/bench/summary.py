"""From the records of a load to its numbers.

Owns what each number means:

- time to first token (TTFT): from when a request was due (open loop) or sent (closed loop) to its first token;
- inter-token latency (ITL): between two tokens of one request, the gaps of all requests together;
- time per output token (TPOT): one number a request, the mean of its gaps;
- end to end (E2E): from when it was due or sent to its end.

Latencies and tokens are of requests that ended well; those that failed are counted by kind, with the tokens that they
had got.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from server.bench.load import LoadResult, RequestRecord

PERCENTILES = (50, 90, 99)
LATENCIES = ("ttft", "itl", "tpot", "e2e")


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Numbers of one kind, in seconds; `percentiles` are linear between the two nearest, as numpy's are."""

    count: int
    mean: float
    percentiles: Mapping[int, float]
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Distribution | None":
        """None for no values."""
        if not values:
            return None
        points = np.percentile(values, PERCENTILES)
        return cls(
            count=len(values),
            mean=float(np.mean(values)),
            percentiles={p: float(point) for p, point in zip(PERCENTILES, points, strict=True)},
            max=float(np.max(values)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """What a request must keep to be a good one; a limit of None is not asked for.

    `itl_s` is held against the mean gap of a request (TPOT), as vLLM's and GenAI-Perf's goodput do: one late token does
    not spoil an answer.
    """

    ttft_s: float | None = None
    itl_s: float | None = None

    @property
    def is_set(self) -> bool:
        return self.ttft_s is not None or self.itl_s is not None

    def is_met(self, record: RequestRecord) -> bool:
        """Whether a request ended well and in time."""
        if record.failure is not None:
            return False
        ttft_s, tpot_s = time_to_first_token(record), time_per_token(record)
        late = self.ttft_s is not None and ttft_s is not None and ttft_s > self.ttft_s
        slow = self.itl_s is not None and tpot_s is not None and tpot_s > self.itl_s
        return not late and not slow


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A load's numbers; rates are per second of `wall_s`, from the start to the last request's end."""

    wall_s: float
    num_requests: int
    num_failed: int
    failures: Mapping[str, int]
    failure_messages: Mapping[str, str]
    prompt_tokens: int
    cached_prompt_tokens: int
    new_tokens: int
    new_tokens_of_failed: int
    num_distinct_prompts: int
    max_in_flight: int
    max_lag_s: float
    latencies: Mapping[str, Distribution | None]
    num_good: int | None

    @property
    def requests_per_s(self) -> float:
        return _rate(self.num_requests - self.num_failed, self.wall_s)

    @property
    def new_tokens_per_s(self) -> float:
        return _rate(self.new_tokens, self.wall_s)

    @property
    def total_tokens_per_s(self) -> float:
        return _rate(self.prompt_tokens + self.new_tokens, self.wall_s)

    @property
    def goodput(self) -> float | None:
        """Good requests a second; None without a service level."""
        return None if self.num_good is None else _rate(self.num_good, self.wall_s)


def summarize(result: LoadResult, slo: Slo) -> Summary:
    """All numbers of a load."""
    records = result.records
    sound = [record for record in records if record.failure is None]
    failed = [record for record in records if record.failure is not None]
    kinds = Counter(record.failure.kind for record in failed if record.failure is not None)
    return Summary(
        wall_s=result.wall_s,
        num_requests=len(records),
        num_failed=len(failed),
        failures=dict(kinds.most_common()),
        failure_messages={r.failure.kind: r.failure.message for r in reversed(failed) if r.failure is not None},
        prompt_tokens=sum(record.num_prompt_tokens for record in sound),
        cached_prompt_tokens=sum(record.num_cached_tokens for record in sound),
        new_tokens=sum(len(record.token_times_s) for record in sound),
        new_tokens_of_failed=sum(len(record.token_times_s) for record in failed),
        num_distinct_prompts=len({record.prompt for record in records if record.prompt is not None}),
        max_in_flight=max(in_flight(records)[1], default=0),
        max_lag_s=max((record.sent_s - record.due_s for record in records), default=0.0),
        latencies=_latencies(sound),
        num_good=sum(slo.is_met(record) for record in records) if slo.is_set else None,
    )


def time_to_first_token(record: RequestRecord) -> float | None:
    """Seconds; None before there was a token."""
    return record.token_times_s[0] - record.due_s if record.token_times_s else None


def time_per_token(record: RequestRecord) -> float | None:
    """The mean gap between a request's tokens in seconds; None for fewer than two."""
    times = record.token_times_s
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None


def gaps(record: RequestRecord) -> list[float]:
    """Seconds between a request's tokens."""
    return np.diff(record.token_times_s).tolist() if len(record.token_times_s) > 1 else []


def in_flight(records: Sequence[RequestRecord]) -> tuple[list[float], list[int]]:
    """Moments at which requests began or ended, and how many were under way from each on."""
    # One that ends as another is sent makes room for it: at one moment, ends come first.
    changes = sorted([(record.sent_s, 1) for record in records] + [(record.ended_s, -1) for record in records])
    return [time_s for time_s, _ in changes], np.cumsum([change for _, change in changes], dtype=int).tolist()


def _latencies(records: Sequence[RequestRecord]) -> dict[str, Distribution | None]:
    values: dict[str, list[float]] = {name: [] for name in LATENCIES}
    for record in records:
        ttft_s, tpot_s = time_to_first_token(record), time_per_token(record)
        values["ttft"] += [ttft_s] if ttft_s is not None else []
        values["tpot"] += [tpot_s] if tpot_s is not None else []
        values["itl"] += gaps(record)
        values["e2e"].append(record.ended_s - record.due_s)
    return {name: Distribution.of(found) for name, found in values.items()}


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
