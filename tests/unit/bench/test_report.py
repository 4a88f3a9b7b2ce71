"""The report says what was measured, in the units that its names promise, and is plain JSON."""

import json
import re
from collections.abc import Sequence

import pytest

from server.bench.load import Failure, LoadResult
from server.bench.profiling import Operator
from server.bench.report import TOP_OPERATORS, Report
from server.bench.server_metrics import StepStats
from server.bench.summary import Slo, summarize
from tests.unit.bench.records import load_of, record

STEPS = StepStats(
    num_steps=4,
    phases_s={"plan": 0.2, "forward": 1.0},
    mean_rows=6.5,
    mean_distinct_prompts=2.5,
    num_prompt_loads=3,
    num_preemptions=1,
    num_isolation_violations=0,
)
LOAD = load_of(
    record([1.0, 1.5, 2.0], prompt=3),
    record([], ended_s=0.25, failure=Failure(kind="queue_full", message="[red]too many[/red]")),
)


def make_report(
    load: LoadResult = LOAD,
    *,
    slo: Slo | None = None,
    steps: StepStats | None = STEPS,
    operators: Sequence[Operator] | None = None,
) -> Report:
    slo = slo if slo is not None else Slo(ttft_s=1.0, itl_s=0.25)
    return Report(
        mode="online",
        date="2026-01-01T00:00:00+00:00",
        seed=7,
        target={"url": "http://localhost"},
        options={"rate": 2.0},
        environment={"commit": "abc", "machine": {"cores": 2}, "versions": {"torch": "2"}},
        summary=summarize(load, slo),
        slo=slo,
        steps=steps,
        operators=operators,
    )


def text_of(report: Report) -> str:
    return "\n".join(" | ".join(row) for table in report.tables() for row in (table.columns, *table.rows))


def test_json_has_everything_that_another_run_is_compared_by() -> None:
    found = json.loads(json.dumps(make_report().to_json(), allow_nan=False))

    assert (found["seed"], found["commit"], found["machine"]) == (7, "abc", {"cores": 2})
    assert found["latency_ms"]["ttft"] == {"count": 1, "mean": 1000, "p50": 1000, "p90": 1000, "p99": 1000, "max": 1000}
    assert found["latency_ms"]["itl"]["p99"] == 500
    assert found["new_tokens_per_s"] == 1.5
    assert found["requests"]["failures"] == {"queue_full": 1}
    assert found["requests"]["total"] == 2
    assert found["goodput"] == {"slo_ttft_ms": 1000, "slo_itl_ms": 250, "good_requests": 0, "requests_per_s": 0}
    assert found["steps"]["mean_phase_ms"] == {"plan": 50, "forward": 250}
    assert (found["steps"]["mean_rows"], found["steps"]["preemptions"]) == (6.5, 1)
    assert found["is_profiled"] is False


def test_what_was_not_measured_is_null_and_has_no_table() -> None:
    report = make_report(load_of(record([1.0])), slo=Slo(), steps=None)
    found = report.to_json()

    assert (found["goodput"], found["steps"], found["operators"]) == (None, None, None)
    assert found["latency_ms"]["itl"] is None
    assert [table.columns[0] for table in report.tables()] == ["online", "latency, ms"]


def test_tables_show_rates_latencies_failures_and_steps() -> None:
    text = text_of(make_report())

    assert "requests that ended well | 1 of 2" in text
    assert re.search(r"goodput \| 0\.00 requests/s \(0\.0% within TTFT 1000 ms, ITL 250 ms\)", text)
    assert "time to first token | 1000.00" in text
    assert "queue_full | 1 | [red]too many[/red]" in text
    assert "forward | 250.000 | 50.0%" in text
    assert "VIOLATION" not in text


def test_an_isolation_violation_cannot_be_overlooked() -> None:
    steps = StepStats(
        num_steps=1,
        phases_s={},
        mean_rows=1.0,
        mean_distinct_prompts=1.0,
        num_prompt_loads=0,
        num_preemptions=0,
        num_isolation_violations=2,
    )
    assert "2 ISOLATION VIOLATIONS" in text_of(make_report(steps=steps))


@pytest.mark.parametrize("device_s", [None, 0.5])
def test_the_longest_operators_are_shown_with_their_share_of_all(device_s: float | None) -> None:
    operators = [Operator(f"aten::op{i}", i + 1, 1.0 if i == 0 else 0.1, device_s) for i in range(TOP_OPERATORS + 5)]
    report = make_report(operators=operators)

    table = report.tables()[-1]
    assert len(table.rows) == TOP_OPERATORS
    share = 1.0 / (1.0 + 0.1 * (TOP_OPERATORS + 4))
    assert table.rows[0][:4] == ("aten::op0", "1", "1000.0", f"{share:.1%}")
    assert table.rows[0][4:] == (() if device_s is None else ("500.0",))
    assert len(table.columns) == len(table.rows[0])
    assert report.to_json()["is_profiled"] is True
    assert len(report.to_json()["operators"]) == len(operators)
