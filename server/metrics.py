"""Every Prometheus metric of the server, in one place.

Owns names, labels, buckets and help texts (docs/metrics.md is generated from them). Refuses to know who counts: the
engine, the runtime and the API reach a metric as an attribute named like the metric without its `promptmux_` prefix.
No label holds a task, a key or a request, so that ten thousand tasks add no series; numbers of one task are served by
`/v1/tasks/{task}/stats`. Names follow vLLM's where it has the same metric.
"""

from collections.abc import Iterable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

PREFIX = "promptmux_"

# The `_created` twin of every counter and histogram would triple the series and tell nothing.
disable_created_metrics()  # type: ignore[no-untyped-call]

_LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKEN_LATENCY_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
_STEP_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_CHANGE_LAG_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)
_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)

TIERS = ("device", "host")
GATE_RESULTS = ("passed", "failed", "conflict", "error")
RECEIPT_RESULTS = ("written", "dropped", "failed")
STEP_FORMS = ("full", "limited", "express")
STEP_PHASES = ("plan", "forward", "sample", "deliver")
JOB_RESULTS = ("succeeded", "failed", "cancelled")
JOB_STATUSES = ("queued", "running")
BESIDE_ROWS = ("yes", "no")
# The codes that alerts look for; a row may fail for others.
ROW_FAILURES = ("non_finite_logits", "isolation_violation", "prompt_corrupt")
AUDIT_RESULTS = ("match", "mismatch", "skipped", "error")
BUILD_LABELS = ("version", "torch", "backbone", "fingerprint", "device", "dtype", "path")


class Metrics:
    """All metrics of one server. `registry` None makes a fresh one, so that two servers in a process do not mix."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry if registry is not None else CollectorRegistry()
        # Memory, CPU time and open descriptors of the process, under Prometheus' usual names.
        ProcessCollector(registry=self.registry)

        self.num_requests_running = self._gauge("num_requests_running", "Rows running in the batch.")
        self.num_requests_waiting = self._gauge("num_requests_waiting", "Rows waiting for a place in the batch.")
        self.kv_cache_usage_ratio = self._gauge(
            "kv_cache_usage_ratio", "Share of the memory for keys and values that running rows hold, 0 to 1."
        )
        self.prompts_registered = self._gauge("prompts_registered", "Prompt versions in the store, all tenants.")
        self.prompts_resident = self._gauge("prompts_resident", "Prefixes resident on the device.")
        self.draining = self._gauge("draining", "1 while the server finishes its rows before it exits, else 0.")

        self.prompt_tokens_total = self._counter(
            "prompt_tokens_total",
            "Prompt tokens of the clients, counted when rows are submitted; virtual tokens are not.",
        )
        self.prompt_tokens_cached_total = self._counter(
            "prompt_tokens_cached_total",
            "Prompt tokens of the clients that were not computed: their keys and values were kept from earlier rows.",
        )
        self.generation_tokens_total = self._counter("generation_tokens_total", "Tokens generated.")
        self.num_preemptions_total = self._counter(
            "num_preemptions_total", "Rows that gave up their memory and are computed again later."
        )
        self.steps_total = self._counter(
            "steps_total",
            "Steps: full, limited (tenants with more than their share got part of it, since a small one is about), or "
            "express (a small tenant's rows alone).",
            ("form",),
        )
        self.requests_total = self._counter(
            "requests_total",
            "HTTP requests by route template (`other` where none matched) and status code.",
            ("endpoint", "status"),
        )
        self.request_success_total = self._counter(
            "request_success_total", "Rows that ended well, by finish reason.", ("finish_reason",)
        )
        self.rows_failed_total = self._counter(
            "rows_failed_total", "Rows that ended with an error, by its code.", ("reason",)
        )
        self.requests_rejected_total = self._counter(
            "requests_rejected_total", "Requests refused before they ran, by error code.", ("reason",)
        )
        self.prompt_uploads_total = self._counter(
            "prompt_uploads_total",
            "Uploads: created, existing (the same digest again), or the error code.",
            ("result",),
        )
        self.prompt_cache_hits_total = self._counter(
            "prompt_cache_hits_total", "Rows whose prompt was resident when they were submitted, by tier.", ("tier",)
        )
        self.prompt_cache_misses_total = self._counter(
            "prompt_cache_misses_total",
            "Rows whose prompt was not resident when they were submitted, by tier.",
            ("tier",),
        )
        self.prompt_cache_evictions_total = self._counter(
            "prompt_cache_evictions_total", "Prompts that made room for others, by tier.", ("tier",)
        )
        self.isolation_checks_total = self._counter(
            "isolation_checks_total", "Rows of steps' plans that were checked against the ledger of owners."
        )
        self.isolation_violations_total = self._counter(
            "isolation_violations_total", "Rows ended because plan and ledger disagreed. Anything but 0 is an incident."
        )
        self.isolation_audits_total = self._counter(
            "isolation_audits_total", "Finished rows replayed alone and compared, by result.", ("result",)
        )
        self.prompt_digest_mismatch_total = self._counter(
            "prompt_digest_mismatch_total", "Prompts whose stored bytes no longer had their digest."
        )
        self.gate_runs_total = self._counter(
            "gate_runs_total",
            "Gates of versions that came to an end: passed, failed, conflict (passed, but another version had become "
            "active), or error.",
            ("result",),
        )
        self.store_reachable = self._gauge(
            "store_reachable", "1 while the store's database answers, which a folder's always does; else 0."
        )
        self.store_stale_seconds = self._gauge(
            "store_stale_seconds",
            "Since all changes of other servers of the shared store were known. Under a second while it answers.",
        )
        self.store_position = self._gauge(
            "store_position",
            "Number of the last change of the shared store that is in force here; 0 where the store is a folder's. "
            "Servers of one store that differ for longer than a second serve different versions.",
        )
        self.store_reconnects_total = self._counter(
            "store_reconnects_total", "Times that the connection to the shared store was lost and made again."
        )
        self.store_change_lag_seconds = self._histogram(
            "store_change_lag_seconds",
            "From another server's change of the shared store to its being in force here, by the store's clock.",
            _CHANGE_LAG_S,
        )
        self.receipts_total = self._counter(
            "receipts_total",
            "Receipts: written, dropped (the queue was full) or failed (the disk did not take them).",
            ("result",),
        )
        self.background_seconds_total = self._counter(
            "background_seconds_total",
            "Engine time that training took, by whether rows waited or ran beside it.",
            ("beside_rows",),
        )
        self.training_jobs_total = self._counter(
            "training_jobs_total", "Training jobs that came to an end, by result.", ("result",)
        )
        self.training_steps_total = self._counter("training_steps_total", "Optimizer steps of training jobs.")
        self.training_examples_total = self._counter(
            "training_examples_total", "Examples that steps of training jobs have used, each time one was."
        )
        self.training_jobs_unfinished = self._gauge("training_jobs_unfinished", "Training jobs by status.", ("status",))
        self.client_disconnects_total = self._counter(
            "client_disconnects_total", "Requests whose client left, or stopped reading, before the end."
        )

        self.time_to_first_token_seconds = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival to a row's first token.", _LATENCY_S
        )
        self.inter_token_latency_seconds = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of one row.", _TOKEN_LATENCY_S
        )
        self.e2e_request_latency_seconds = self._histogram(
            "e2e_request_latency_seconds", "From a request's arrival to its last token.", _LATENCY_S
        )
        self.request_queue_time_seconds = self._histogram(
            "request_queue_time_seconds", "From a row's arrival to its admission into the batch.", _LATENCY_S
        )
        self.batch_rows = self._histogram("batch_rows", "Rows in one step.", _ROWS)
        self.batch_distinct_prompts = self._histogram(
            "batch_distinct_prompts", "Distinct prompts in one step; rows without a prompt count as one.", _ROWS
        )
        self.prompt_load_seconds = self._histogram(
            "prompt_load_seconds", "From a cold prompt's first row to its prefix being resident.", _LATENCY_S
        )
        self.step_seconds = self._histogram("step_seconds", "Time of one step, by phase.", _STEP_S, ("phase",))

        self.build_info = Info(f"{PREFIX}build", "What runs, as labels; the value is 1.", registry=self.registry)

        self._start_at_zero()

    def set_build_info(
        self, *, version: str, torch: str, backbone: str, fingerprint: str, device: str, dtype: str, path: str
    ) -> None:
        """Publishes what runs; `path` is how the backbone is served: `packed` or `dense`."""
        values = (version, torch, backbone, fingerprint, device, dtype, path)
        self.build_info.info(dict(zip(BUILD_LABELS, values, strict=True)))

    def render(self) -> tuple[bytes, str]:
        """The exposition text and its content type, ready for `/metrics`."""
        return generate_latest(self.registry), CONTENT_TYPE_PLAIN_0_0_4

    def _start_at_zero(self) -> None:
        """Makes series with known labels appear before the first event: `rate()` misses a first jump from nothing."""
        for counter in (
            self.prompt_cache_hits_total,
            self.prompt_cache_misses_total,
            self.prompt_cache_evictions_total,
        ):
            for tier in TIERS:
                counter.labels(tier=tier)
        for reason in ("stop", "length"):
            self.request_success_total.labels(finish_reason=reason)
        for reason in ROW_FAILURES:
            self.rows_failed_total.labels(reason=reason)
        for result in AUDIT_RESULTS:
            self.isolation_audits_total.labels(result=result)
        for result in GATE_RESULTS:
            self.gate_runs_total.labels(result=result)
        for result in RECEIPT_RESULTS:
            self.receipts_total.labels(result=result)
        for result in JOB_RESULTS:
            self.training_jobs_total.labels(result=result)
        for status in JOB_STATUSES:
            self.training_jobs_unfinished.labels(status=status)
        for is_beside_rows in BESIDE_ROWS:
            self.background_seconds_total.labels(beside_rows=is_beside_rows)
        for form in STEP_FORMS:
            self.steps_total.labels(form=form)
        for phase in STEP_PHASES:
            self.step_seconds.labels(phase=phase)

    def _gauge(self, name: str, help_text: str, labels: Iterable[str] = ()) -> Gauge:
        return Gauge(PREFIX + name, help_text, tuple(labels), registry=self.registry)

    def _counter(self, name: str, help_text: str, labels: Iterable[str] = ()) -> Counter:
        return Counter(PREFIX + name, help_text, tuple(labels), registry=self.registry)

    def _histogram(self, name: str, help_text: str, buckets: Iterable[float], labels: Iterable[str] = ()) -> Histogram:
        return Histogram(PREFIX + name, help_text, tuple(labels), buckets=tuple(buckets), registry=self.registry)
