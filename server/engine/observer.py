"""What the engine tells the metrics, in one place. Knows rows and times; changes nothing."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from server.engine.request import RowOutput
from server.engine.row import Row
from server.engine.scheduler import StepForm
from server.metrics import Metrics


@dataclass(slots=True)
class StepClock:
    """How long the host took over each phase of one step. It may have done another step's between two of them.

    On a device of its own, `forward` is the time to hand the work over, and waiting for it is part of `sample`.
    """

    form: StepForm = StepForm.FULL
    plan_s: float = 0.0
    forward_s: float = 0.0
    sample_s: float = 0.0
    _since_s: float = field(default_factory=time.perf_counter)

    @property
    def total_s(self) -> float:
        return self.plan_s + self.forward_s + self.sample_s

    def planned(self, form: StepForm) -> None:
        self.form = form
        self.plan_s = self._lap()

    def forwarded(self) -> None:
        self.forward_s = self._lap()

    def sampled(self) -> None:
        """The sample has been asked for, or taken in: both count."""
        self.sample_s += self._lap()

    def go_on(self) -> None:
        """What happened since the last phase was not this step's."""
        self._lap()

    def _lap(self) -> float:
        before, self._since_s = self._since_s, time.perf_counter()
        return self._since_s - before


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
        else:
            self._metrics.rows_failed_total.labels(reason=output.error.code).inc()

    def step_done(self, rows: Sequence[Row], clock: StepClock) -> None:
        prompts = {row.request.prompt.prefix_key for row in rows if row.request.prompt is not None}
        self._metrics.steps_total.labels(form=clock.form.value).inc()
        self._metrics.batch_rows.observe(len(rows))
        self._metrics.batch_distinct_prompts.observe(len(prompts))
        phases = self._metrics.step_seconds
        phases.labels(phase="plan").observe(clock.plan_s)
        phases.labels(phase="forward").observe(clock.forward_s)
        phases.labels(phase="sample").observe(clock.sample_s)

    def background_ran(self, seconds: float, is_beside_rows: bool) -> None:
        self._metrics.background_seconds_total.labels(beside_rows="yes" if is_beside_rows else "no").inc(seconds)

    def outputs_delivered(self, seconds: float) -> None:
        self._metrics.step_seconds.labels(phase="deliver").observe(seconds)
