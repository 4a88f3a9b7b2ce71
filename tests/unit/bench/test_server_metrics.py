"""The step split is the difference between two looks at the real metrics."""

import pytest

from server.bench.server_metrics import StepStats
from server.metrics import STEP_PHASES, Metrics


def step(metrics: Metrics, *, rows: int, prompts: int, **phases_s: float) -> None:
    metrics.batch_rows.observe(rows)
    metrics.batch_distinct_prompts.observe(prompts)
    for phase, seconds in phases_s.items():
        metrics.step_seconds.labels(phase=phase).observe(seconds)


def text_of(metrics: Metrics) -> str:
    return metrics.render()[0].decode()


def test_only_what_happened_between_the_looks_counts() -> None:
    metrics = Metrics()
    step(metrics, rows=60, prompts=9, plan=5.0, forward=5.0, sample=5.0, deliver=5.0)
    metrics.num_preemptions_total.inc(7)
    before = text_of(metrics)
    step(metrics, rows=4, prompts=2, plan=0.1, forward=0.5, sample=0.2, deliver=0.05)
    step(metrics, rows=8, prompts=3, plan=0.3, forward=0.7, sample=0.2, deliver=0.05)
    metrics.num_preemptions_total.inc(2)
    metrics.prompt_load_seconds.observe(0.5)
    metrics.isolation_violations_total.inc()

    stats = StepStats.between(before, text_of(metrics))

    assert stats is not None
    assert stats.num_steps == 2
    assert stats.phases_s == pytest.approx({"plan": 0.4, "forward": 1.2, "sample": 0.4, "deliver": 0.1})
    assert tuple(stats.phases_s) == STEP_PHASES
    assert (stats.mean_rows, stats.mean_distinct_prompts) == (6.0, 2.5)
    assert (stats.num_prompt_loads, stats.num_preemptions, stats.num_isolation_violations) == (1, 2, 1)


def test_no_steps_are_no_statistics() -> None:
    text = text_of(Metrics())

    assert StepStats.between(text, text) is None
    assert StepStats.between("", "# HELP other x\n# TYPE other counter\nother_total 1.0\n") is None


def test_a_page_that_is_no_metrics_is_a_value_error() -> None:
    with pytest.raises(ValueError, match=r"."):
        StepStats.between("", "<html>no metrics</html>")
