"""Metrics: the names of the HTTP contract, bounded series, and a rendering that Prometheus reads."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.metrics import ROW_FAILURES, STEP_PHASES, TIERS, Metrics

# As the HTTP contract lists them.
GAUGES = {
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_ratio",
    "prompts_registered",
    "prompts_resident",
    "draining",
}
COUNTERS = {
    "prompt_tokens_total": (),
    "generation_tokens_total": (),
    "num_preemptions_total": (),
    "requests_total": ("endpoint", "status"),
    "request_success_total": ("finish_reason",),
    "requests_rejected_total": ("reason",),
    "prompt_uploads_total": ("result",),
    "prompt_cache_hits_total": ("tier",),
    "prompt_cache_misses_total": ("tier",),
    "prompt_cache_evictions_total": ("tier",),
    "isolation_checks_total": (),
    "isolation_violations_total": (),
    "isolation_audits_total": ("result",),
    "prompt_digest_mismatch_total": (),
    "client_disconnects_total": (),
}
HISTOGRAMS = {
    "time_to_first_token_seconds": (),
    "inter_token_latency_seconds": (),
    "e2e_request_latency_seconds": (),
    "request_queue_time_seconds": (),
    "batch_rows": (),
    "batch_distinct_prompts": (),
    "prompt_load_seconds": (),
    "step_seconds": ("phase",),
}


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text, _ = metrics.render()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("gauge", dict.fromkeys(GAUGES, ())), ("counter", COUNTERS), ("histogram", HISTOGRAMS)],
)
def test_contract_names_kinds_and_labels(kind: str, expected: dict[str, tuple[str, ...]]) -> None:
    metrics = Metrics()

    for name, labels in expected.items():
        metric = getattr(metrics, name)
        family = next(iter(metric.describe()))
        assert family.type == kind
        assert family.name == "promptmux_" + name.removesuffix("_total")
        assert metric._labelnames == labels


def test_every_sample_has_the_prefix_or_is_of_the_process() -> None:
    metrics = Metrics()
    metrics.set_build_info(
        version="1", torch="2", backbone="b", fingerprint="f", device="cpu", dtype="float32", path="packed"
    )

    names = {name for name, _ in samples(metrics)}

    assert all(name.startswith(("promptmux_", "process_")) for name in names)
    assert not any(name.endswith("_created") for name in names)


def test_series_with_known_labels_start_at_zero() -> None:
    found = samples(Metrics())

    for tier in TIERS:
        assert found["promptmux_prompt_cache_hits_total", (("tier", tier),)] == 0
    for phase in STEP_PHASES:
        assert found["promptmux_step_seconds_count", (("phase", phase),)] == 0
    for reason in ROW_FAILURES:
        assert found["promptmux_rows_failed_total", (("reason", reason),)] == 0
    assert found["promptmux_isolation_violations_total", ()] == 0
    assert found["promptmux_draining", ()] == 0


def test_counted_values_are_rendered() -> None:
    metrics = Metrics()
    metrics.requests_total.labels(endpoint="/v1/completions", status="200").inc(3)
    metrics.batch_rows.observe(7)
    metrics.kv_cache_usage_ratio.set(0.25)

    found = samples(metrics)

    assert found["promptmux_requests_total", (("endpoint", "/v1/completions"), ("status", "200"))] == 3
    assert found["promptmux_batch_rows_bucket", (("le", "8.0"),)] == 1
    assert found["promptmux_batch_rows_bucket", (("le", "4.0"),)] == 0
    assert found["promptmux_kv_cache_usage_ratio", ()] == 0.25


def test_build_info_carries_what_runs() -> None:
    metrics = Metrics()
    metrics.set_build_info(
        version="0.1", torch="2.13", backbone="tiny", fingerprint="f", device="cpu", dtype="float32", path="dense"
    )

    labels = next(labels for name, labels in samples(metrics) if name == "promptmux_build_info")

    assert dict(labels) == {
        "version": "0.1",
        "torch": "2.13",
        "backbone": "tiny",
        "fingerprint": "f",
        "device": "cpu",
        "dtype": "float32",
        "path": "dense",
    }


def test_two_servers_in_one_process_count_apart() -> None:
    first, second = Metrics(), Metrics()
    first.generation_tokens_total.inc(5)

    assert samples(first)["promptmux_generation_tokens_total", ()] == 5
    assert samples(second)["promptmux_generation_tokens_total", ()] == 0


def test_content_type_is_the_text_format() -> None:
    assert Metrics().render()[1] == "text/plain; version=0.0.4; charset=utf-8"
