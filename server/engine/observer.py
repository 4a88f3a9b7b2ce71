"""What the engine tells the metrics, in one place. Knows rows and times; changes nothing."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from server.engine.request import RowOutput
from server.engine.row import Row
from server.engine.scheduler import ScheduledRow
from server.metrics import Metrics


@dataclass(slots=True)
class StepClock:
    """When the phases of one step ended, on the performance counter."""

    began_s: float = field(default_factory=time.perf_counter)
    planned_s: float = 0.0
    forwarded_s: float = 0.0


class EngineObserver:
    """Counts and times for the engine thread. Latencies are a row's, from its submission."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def row_admitted(self, row: Row) -> None:
        if row.queue_s is not None:
            self._metrics.request_queue_time_seconds.observe(row.queue_s)

    def token_made(self, row: Row) -> None:
        now_s = time.monotonic()
        self._metrics.generation_tokens_total.inc()
        if row.last_token_at_s is None:
            self._metrics.time_to_first_token_seconds.observe(now_s - row.arrived_at_s)
        else:
            self._metrics.inter_token_latency_seconds.observe(now_s - row.last_token_at_s)
        row.last_token_at_s = now_s

    def row_ended(self, row: Row, output: RowOutput) -> None:
        if output.error is None:
            self._metrics.request_success_total.labels(finish_reason=output.finish_reason).inc()
            self._metrics.e2e_request_latency_seconds.observe(time.monotonic() - row.arrived_at_s)

    def step_done(self, packed: Sequence[ScheduledRow], clock: StepClock) -> None:
        prompts = {item.row.request.prompt.prefix_key for item in packed if item.row.request.prompt is not None}
        self._metrics.batch_rows.observe(len(packed))
        self._metrics.batch_distinct_prompts.observe(len(prompts))
        phases = self._metrics.step_seconds
        phases.labels(phase="plan").observe(clock.planned_s - clock.began_s)
        phases.labels(phase="forward").observe(clock.forwarded_s - clock.planned_s)
        phases.labels(phase="sample").observe(time.perf_counter() - clock.forwarded_s)

    def outputs_delivered(self, seconds: float) -> None:
        self._metrics.step_seconds.labels(phase="deliver").observe(seconds)
