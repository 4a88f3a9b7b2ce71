"""Numbers mean what they are said to mean."""

import statistics

import numpy as np
import pytest

from server.bench.load import Failure, LoadResult
from server.bench.summary import Distribution, Slo, in_flight, summarize
from tests.unit.bench.records import load_of, record

BROKEN = Failure(kind="queue_full", message="too many")


def test_latencies_are_counted_from_when_a_request_was_due() -> None:
    late = record([3.0, 3.5, 5.0], due_s=1.0, sent_s=2.0, ended_s=5.25)
    latencies = summarize(load_of(late), Slo()).latencies

    found = {name: item for name, item in latencies.items() if item is not None}
    assert found["ttft"].mean == 2.0
    assert (found["itl"].count, found["itl"].mean, found["itl"].max) == (2, 1.0, 1.5)
    assert (found["tpot"].count, found["tpot"].mean) == (1, 1.0)
    assert found["e2e"].mean == 4.25
    assert summarize(load_of(late), Slo()).max_lag_s == 1.0


def test_percentiles_are_numpy_s_and_agree_with_the_standard_library() -> None:
    values = np.random.default_rng(3).lognormal(size=500).tolist()
    found = Distribution.of(values)

    assert found is not None
    hundredths = statistics.quantiles(values, n=100, method="inclusive")
    for percentile, value in found.percentiles.items():
        assert value == float(np.percentile(values, percentile))
        assert value == pytest.approx(hundredths[percentile - 1])
    assert (found.count, found.max) == (500, max(values))
    assert found.mean == pytest.approx(statistics.fmean(values))


def test_gaps_of_all_requests_are_taken_together_and_their_means_one_by_one() -> None:
    fast, slow = record([0.0, 0.1, 0.2, 0.3]), record([0.0, 1.0])
    latencies = summarize(load_of(fast, slow), Slo()).latencies

    assert latencies["itl"] is not None
    assert latencies["tpot"] is not None
    assert latencies["itl"].mean == pytest.approx((3 * 0.1 + 1.0) / 4)
    assert latencies["tpot"].mean == pytest.approx((0.1 + 1.0) / 2)


def test_a_request_of_one_token_has_no_gap() -> None:
    latencies = summarize(load_of(record([1.0])), Slo()).latencies

    assert latencies["itl"] is None
    assert latencies["tpot"] is None
    assert latencies["ttft"] is not None


def test_failed_requests_are_counted_by_kind_and_not_in_rates_and_latencies() -> None:
    cut = record([0.5], ended_s=9.0, failure=Failure(kind="stream_cut", message="cut"))
    refused = record([], ended_s=0.1, failure=BROKEN)
    also = record([], ended_s=0.2, failure=Failure(kind="queue_full", message="again"))
    summary = summarize(load_of(record([1.0, 2.0], ended_s=2.0), cut, refused, also), Slo())

    assert (summary.num_requests, summary.num_failed) == (4, 3)
    assert summary.failures == {"queue_full": 2, "stream_cut": 1}
    assert summary.failure_messages == {"queue_full": "too many", "stream_cut": "cut"}
    assert (summary.new_tokens, summary.new_tokens_of_failed) == (2, 1)
    assert (summary.prompt_tokens, summary.cached_prompt_tokens) == (10, 4)
    assert summary.wall_s == 9.0
    assert summary.new_tokens_per_s == pytest.approx(2 / 9)
    assert summary.requests_per_s == pytest.approx(1 / 9)
    assert summary.total_tokens_per_s == pytest.approx(12 / 9)
    assert summary.latencies["e2e"] is not None
    assert summary.latencies["e2e"].max == 2.0


def test_goodput_counts_requests_that_kept_every_limit() -> None:
    good = record([0.5, 0.6, 0.9])  # mean gap 0.2, though one is 0.3
    late = record([1.5, 1.6])
    slow = record([0.5, 1.5])
    one_token = record([0.5])
    failed = record([0.1, 0.2], failure=BROKEN)
    load = load_of(good, late, slow, one_token, failed)

    def num_good(slo: Slo) -> int | None:
        return summarize(load, slo).num_good

    assert num_good(Slo()) is None
    assert num_good(Slo(ttft_s=1.0)) == 3
    assert num_good(Slo(itl_s=0.25)) == 3
    assert num_good(Slo(ttft_s=1.0, itl_s=0.25)) == 2
    assert summarize(load, Slo(ttft_s=1.0)).goodput == pytest.approx(3 / load.wall_s)


def test_limits_are_kept_by_what_equals_them() -> None:
    assert summarize(load_of(record([0.5, 0.75])), Slo(ttft_s=0.5, itl_s=0.25)).num_good == 1


def test_requests_under_way_make_room_at_the_moment_they_end() -> None:
    first, second, third = record([1.0]), record([2.0]), record([3.0], due_s=1.0)
    times, running = in_flight([first, second, third])

    assert times == [0.0, 0.0, 1.0, 1.0, 2.0, 3.0]
    assert running == [1, 2, 1, 2, 1, 0]
    assert summarize(load_of(first, second, third), Slo()).max_in_flight == 2


def test_distinct_prompts_are_counted_without_the_bare_backbone() -> None:
    load = load_of(*(record([1.0], prompt=prompt) for prompt in (None, 4, 4, 0)))

    assert summarize(load, Slo()).num_distinct_prompts == 2


def test_a_load_of_nothing_has_numbers_too() -> None:
    summary = summarize(LoadResult(records=[], wall_s=0.0), Slo(ttft_s=1.0))

    assert (summary.num_requests, summary.new_tokens_per_s, summary.goodput) == (0, 0.0, 0.0)
    assert set(summary.latencies.values()) == {None}
