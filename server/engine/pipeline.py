"""Steps between plan and outputs: how many the device has been given that the host has not looked at yet.

Overlapped, the host plans and launches a step before it collects the one before (as "async scheduling" in vLLM and the
"overlap scheduler" in SGLang): the device computes one step while the host delivers the last and prepares the next.
A step is planned on what is known without its predecessor's tokens: how many there are. Which they are is read on the
device, from the predecessor's sample, at places that the isolation check compares with the rows for which they were
chosen. What the host learns too late costs a row of one step, never a wrong token:

- A row that ended with the step before (EOS, a stop string, NaN, cancelled meanwhile) takes part once more; what it is
  given is dropped. Its pages and prefix go back at once all the same. All work on them is queued on one stream of the
  device, so that whoever is given them next writes behind the step that still reads them; and what it leaves for others
  (`RowMemory.keep_text`) ends before the columns that this step writes.
- A row that is preempted with a token on the way computes that token again.
- A row whose next token depends on which tokens it has (penalties) makes the engine wait for the last of them before it
  samples, but not before the pass: the device computes it meanwhile.

Otherwise a step is collected as soon as it is launched. Both are the same code, and give the same tokens: seeds are
used by a token's index, which is known ahead. In the deterministic mode overlapping changes which rows share a step,
never the shapes in which a row is computed.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from server.engine.backbone import Backbone
from server.engine.kv import KvPool
from server.engine.observer import StepClock
from server.engine.plan import IntArray, StepPlan
from server.engine.prompt_intake import EndRow
from server.engine.results import LaunchedStep, StepResults
from server.engine.row import RowState
from server.engine.scheduler import ScheduledRow
from server.engine.step import plan_step
from server.errors import IsolationError
from server.metrics import Metrics

logger = logging.getLogger(__name__)

_NOTHING: IntArray = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class DueStep:
    """A step that is to be collected now."""

    launched: LaunchedStep
    clock: StepClock


class StepPipeline:
    """Plans, checks and launches steps, and says when each is to be collected. Engine thread only.

    `end_row` ends a row with an error.
    """

    def __init__(
        self,
        backbone: Backbone,
        pool: KvPool,
        results: StepResults,
        metrics: Metrics,
        end_row: EndRow,
        *,
        overlaps: bool,
    ) -> None:
        self._backbone = backbone
        self._pool = pool
        self._results = results
        self._metrics = metrics
        self._end_row = end_row
        self.overlaps = overlaps
        self._in_flight: DueStep | None = None

    def take(self) -> DueStep | None:
        """The step in flight, to be collected; none is in flight afterwards."""
        due, self._in_flight = self._in_flight, None
        return due

    def plan(self, scheduled: Sequence[ScheduledRow]) -> tuple[StepPlan, list[ScheduledRow]] | None:
        """A checked plan and its rows in packed order; rows that fail the check end here. None: nothing is left."""
        sampled_for = self._in_flight.launched.sampled_for if self._in_flight is not None else _NOTHING
        while scheduled:
            plan, packed, violations = plan_step(scheduled, self._pool.ledger, sampled_for)
            self._metrics.isolation_checks_total.inc(len(packed))
            if not violations:
                return plan, packed
            for violation in violations:
                row = packed[violation.entry].row
                self._metrics.isolation_violations_total.inc()
                logger.critical("isolation violation: row %s: %s", row.row_id, violation.reason)
                self._end_row(row, error=IsolationError(f"the row was ended: {violation.reason}"))
            scheduled = [item for item in packed if item.row.state is RowState.RUNNING]
        return None

    def launch(self, plan: StepPlan, packed: Sequence[ScheduledRow], clock: StepClock) -> DueStep | None:
        """Give the device a checked plan. Returns the step that is to be collected now, which may be this one."""
        before = self.take()
        last = before.launched if before is not None else None
        sampled = last.sample.token_ids if last is not None and last.sample is not None else None
        logits = self._backbone.forward(self._pool, plan, sampled)
        clock.forwarded()
        launched = self._results.launch(plan, packed, logits, before=last, may_wait=not self.overlaps)
        clock.sampled()
        step = DueStep(launched, clock)
        if not self.overlaps:
            return step
        self._in_flight = step
        return before
