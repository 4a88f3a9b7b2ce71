"""The engine: one thread that owns the device and runs the step loop.

A step on one screen (`_step`): the scheduler says which rows compute how many tokens; the plan says in index tensors
who is who; the isolation check compares the plan with the ledger of owners; the backbone runs; the sampler chooses;
the outputs of all rows are handed over in one call. Other threads reach the engine through a queue of commands in and
that one call out.
"""

import itertools
import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from prompt_store.manifest import SoftPrompt
from server.engine.audit import Auditor
from server.engine.backbone import Backbone
from server.engine.config import EngineConfig
from server.engine.isolation import check_plan
from server.engine.kv import KvCache
from server.engine.memory import make_ledger
from server.engine.observer import EngineObserver, StepClock
from server.engine.plan import StepPlan, build_plan
from server.engine.prefix import Residency
from server.engine.request import FINISH_CANCELLED, FINISH_LENGTH, FINISH_STOP, PromptRef, RowOutput, RowRequest
from server.engine.residency import PrefixResidency
from server.engine.results import StepResults
from server.engine.row import Row, RowState
from server.engine.scheduler import Admission, ScheduledRow, Scheduler
from server.engine.step import claim, plan_entry
from server.engine.text import TextStream
from server.errors import (
    ContextLengthExceededError,
    DrainingError,
    EngineFailedError,
    IsolationError,
    PromptmuxError,
    QueueFullError,
)
from server.metrics import Metrics

logger = logging.getLogger(__name__)

Deliver = Callable[[Sequence[RowOutput]], None]

IDLE_WAIT_S = 0.5
STEPS_BETWEEN_AUDITS = 32
COMPILE_RUNNING_S = 0.1
COMPILE_IDLE_S = 0.25


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """A look at the engine from another thread. `failure` is the error that ended the step loop, or None."""

    num_running: int
    num_waiting: int
    kv_usage_ratio: float
    prompts_resident: int
    heartbeat_age_s: float
    failure: str | None


class Engine:
    """Generates tokens for rows of any tasks over one backbone.

    `load_prompt` is called on a loader thread, must verify the digest and may raise PromptmuxError. `start`, `submit`,
    `cancel`, `evict`, `pin`, `status`, `residency`, `start_drain` and `stop` may be called from any thread.
    """

    def __init__(
        self,
        backbone: Backbone,
        config: EngineConfig,
        metrics: Metrics,
        load_prompt: Callable[[PromptRef], SoftPrompt],
    ) -> None:
        """Raises ValueError when the memory for keys and values holds no row of the backbone's context length."""
        self._backbone = backbone
        self._config = config
        self._metrics = metrics
        self._serials = itertools.count(1)
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._num_waiting = 0  # submitted and not yet admitted; under the lock
        self._rows: dict[str, Row] = {}
        self._kv = KvCache(
            backbone.layers,
            make_ledger(backbone, config),
            dtype=backbone.dtype,
            device=backbone.device,
            poison_freed=config.poison_freed_slots,
        )
        self._scheduler = Scheduler(
            max_rows=config.max_rows,
            max_step_tokens=config.max_step_tokens,
            prefill_chunk=config.prefill_chunk,
            try_admit=self._try_admit,
        )
        self._prefixes = PrefixResidency(
            backbone,
            config,
            metrics,
            load_prompt=load_prompt,
            wake=self._wake.set,
            next_serial=lambda: next(self._serials),
        )
        self._observer = EngineObserver(metrics)
        self._results = StepResults(backbone.eos_token_ids)
        self._auditor = Auditor(backbone, config.audit_share, metrics)
        self._deliver: Deliver = lambda outputs: None
        self._outputs: list[RowOutput] = []
        self._doomed: set[str] = set()  # prefix keys of deleted prompts
        self._steps_since_audit = 0
        self._heartbeat_s = time.monotonic()
        self._is_draining = False
        self._is_stopping = False
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # --- called from any thread -----------------------------------------------------------------------------------

    def start(self, deliver: Deliver) -> None:
        """Start the step loop. `deliver` is called on the engine thread, at most once a step, with what is new."""
        self._deliver = deliver
        self._prefixes.loader.start()
        self._thread.start()

    def submit(self, rows: Sequence[RowRequest]) -> None:
        """Queue rows: all of them or none.

        Raises QueueFullError, DrainingError, EngineFailedError, or ContextLengthExceededError for a row that fits no
        slot.
        """
        limit = self._backbone.max_model_len
        for row in rows:
            k = row.prompt.num_virtual_tokens if row.prompt is not None else 0
            if k + len(row.token_ids) + row.sampling.max_tokens > limit:
                raise ContextLengthExceededError(
                    f"This model's maximum context length is {limit} tokens: {k} virtual, {len(row.token_ids)} prompt "
                    f"and {row.sampling.max_tokens} new tokens are more."
                )
        with self._lock:
            if self._failure is not None:
                raise EngineFailedError(f"the engine has failed: {self._failure}")
            if self._is_draining or self._is_stopping:
                raise DrainingError("the server is shutting down and takes no new requests")
            if self._num_waiting + len(rows) > self._config.max_waiting_rows:
                raise QueueFullError(
                    f"{self._num_waiting} rows wait already; the limit is {self._config.max_waiting_rows}"
                )
            self._num_waiting += len(rows)
            self._post(lambda: self._add_rows(rows))

    def cancel(self, row_ids: Iterable[str]) -> None:
        """End rows before the next step; ids that are unknown or have ended are ignored."""
        ids = list(row_ids)
        self._post(lambda: self._cancel_rows(ids))

    def evict(self, prefix_key: str) -> None:
        """Forget a deleted prompt, once the rows that were submitted with it have ended or hold its prefix."""
        self._post(lambda: self._doomed.add(prefix_key))

    def pin(self, refs: Sequence[PromptRef]) -> None:
        """Keep exactly these prompts on the device, and bring those that are not there."""
        self._post(lambda: self._pin(refs))

    def residency(self, prefix_key: str) -> Residency:
        return self._prefixes.residency_of(prefix_key)

    def status(self) -> EngineStatus:
        with self._lock:
            num_waiting = self._num_waiting
        return EngineStatus(
            num_running=len(self._scheduler.running),
            num_waiting=num_waiting,
            kv_usage_ratio=self._kv.ledger.tokens_used / self._kv.ledger.budget_tokens,
            prompts_resident=len(self._prefixes.device),
            heartbeat_age_s=time.monotonic() - self._heartbeat_s,
            failure=self._failure,
        )

    def start_drain(self) -> None:
        """Take no new rows; those submitted run to their end."""
        with self._lock:
            self._is_draining = True

    def stop(self, timeout_s: float) -> None:
        """Stop the loop after the current step. Rows that are left get an error output."""
        with self._lock:
            self._is_stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        self._prefixes.loader.stop()

    # --- the step loop: everything below runs on the engine thread ---------------------------------------------------

    def run_once(self) -> bool:
        """One turn of the loop; returns whether there was anything to do.

        The loop calls it; a test or an offline program that has not called `start` may call it in its place.
        """
        self._heartbeat_s = time.monotonic()
        self._take_commands()
        self._evict_doomed()
        self._take_prompts()
        worked = self._step()
        self._flush()
        return self._audit_sometimes(is_idle=not worked) or worked

    def check_invariants(self) -> None:
        """Raises RuntimeError when rows, slots and prefixes contradict each other. Engine thread only."""
        self._scheduler.check_invariants()
        self._kv.ledger.check_invariants()
        self._prefixes.device.check_invariants()
        held = {row.slot.owner for row in self._scheduler.running if row.slot is not None}
        if len(held) != self._kv.ledger.num_slots_used:
            raise RuntimeError(f"{self._kv.ledger.num_slots_used} slots are in use by {len(held)} running rows")
        users = sum(row.prefix is not None and row.prefix.is_alive for row in self._scheduler.running)
        if users != self._prefixes.device.num_users:
            raise RuntimeError(f"prefixes count {self._prefixes.device.num_users} users, {users} rows hold one")

    def _run(self) -> None:
        try:
            while not self._is_stopping:
                if not self.run_once():
                    self._wake.wait(IDLE_WAIT_S)
                    self._wake.clear()
        except Exception as error:
            logger.exception("the step loop has ended")
            with self._lock:
                self._failure = f"{type(error).__name__}: {error}"
        finally:
            self._end_all()

    def _step(self) -> bool:
        """One step. Returns False when there was nothing to do."""
        clock = StepClock()
        scheduled = self._scheduler.schedule()
        step = self._plan(scheduled)
        if step is None:
            return False
        plan, packed = step
        clock.planned_s = time.perf_counter()
        logits = self._backbone.forward(self._kv, plan)
        clock.forwarded_s = time.perf_counter()
        for row, output in self._results.collect(plan, packed, logits):
            self._emit(row, output)
        self._observer.step_done(packed, clock)
        return True

    def _plan(self, scheduled: list[ScheduledRow]) -> tuple[StepPlan, list[ScheduledRow]] | None:
        """A checked plan and its rows in packed order; rows that fail the check end here. None: nothing is left."""
        while scheduled:
            plan, order = build_plan([plan_entry(item) for item in scheduled])
            packed = [scheduled[i] for i in order]
            violations = check_plan(plan, [claim(item) for item in packed], self._kv.ledger.slabs)
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

    # --- rows come and go -----------------------------------------------------------------------------------------

    def _add_rows(self, requests: Sequence[RowRequest]) -> None:
        now_s = time.monotonic()
        for request in requests:
            sampling = request.sampling
            row = Row(
                request=request,
                serial=next(self._serials),
                arrived_at_s=now_s,
                text=TextStream(
                    self._backbone.tokenizer,
                    context=request.token_ids,
                    stop=sampling.stop,
                    skip_special_tokens=sampling.skip_special_tokens,
                ),
                is_audited=self._auditor.selects(request.row_id),
                seed=sampling.seed if sampling.seed is not None else secrets.randbits(63),
            )
            self._rows[row.row_id] = row
            self._scheduler.add(row)
            self._metrics.prompt_tokens_total.inc(row.num_prompt_tokens)
            if request.prompt is not None:
                self._prefixes.prefetch(request.prompt)

    def _try_admit(self, row: Row) -> Admission:
        prompt = row.request.prompt
        if prompt is not None and prompt.prefix_key not in self._prefixes.device:
            self._prefixes.bring(prompt)
            return Admission.PREFIX_NOT_READY
        slot = self._kv.allocate(row.serial, row.max_total_tokens)
        if slot is None:
            return Admission.NO_ROOM
        prefix = self._prefixes.acquire(prompt) if prompt is not None else None
        row.slot, row.prefix = slot, prefix
        if prefix is not None:
            self._kv.copy_in(slot, prefix.tensors, prefix.uid)
        with self._lock:
            self._num_waiting -= 1
        row.first_scheduled_at_s = time.monotonic()
        self._observer.row_admitted(row)
        return Admission.ADMITTED

    def _emit(self, row: Row, output: RowOutput) -> None:
        self._outputs.append(output)
        if output.token_ids:
            self._observer.token_made(row)
        if output.is_last:
            self._retire(row, output)

    def _end_row(self, row: Row, *, finish_reason: str | None = None, error: PromptmuxError | None = None) -> None:
        text = row.text.finish() if error is None else ""
        self._emit(
            row,
            RowOutput(
                row_id=row.row_id,
                text=text,
                finish_reason=finish_reason,
                error=error,
            ),
        )

    def _retire(self, row: Row, output: RowOutput) -> None:
        """Take an ended row out of everything: queue or batch, slot, prefix."""
        if row.state is RowState.WAITING:
            with self._lock:
                self._num_waiting -= 1
        slot, row.slot = row.slot, None
        prefix, row.prefix = row.prefix, None
        self._scheduler.remove(row)
        # A slot whose ledger entry is disputed is given to nobody any more.
        if slot is not None and self._kv.ledger.holds(slot):
            self._kv.free(slot, min(slot.capacity, row.next_column))
        if prefix is not None:
            self._prefixes.device.release(prefix)
        del self._rows[row.row_id]
        self._observer.row_ended(row, output)
        if output.finish_reason in (FINISH_STOP, FINISH_LENGTH) and row.is_audited:
            to_read = self._auditor.add(row)
            if to_read is not None:
                self._prefixes.loader.request_for_audit(to_read)

    def _cancel_rows(self, row_ids: Sequence[str]) -> None:
        for row_id in row_ids:
            row = self._rows.get(row_id)
            if row is not None:
                self._end_row(row, finish_reason=FINISH_CANCELLED)

    def _end_all(self) -> None:
        if self._failure is not None:
            error: PromptmuxError = EngineFailedError(f"the engine has failed: {self._failure}")
        else:
            error = DrainingError("the server shut down before this row was finished")
        try:
            self._take_commands()
            for row in list(self._rows.values()):
                self._outputs.append(RowOutput(row_id=row.row_id, error=error))
            self._rows.clear()
            self._scheduler.clear()
            with self._lock:
                self._num_waiting = 0
            self._flush()
        except Exception:
            logger.exception("the rows that were left could not be told")

    # --- prompts come and go ----------------------------------------------------------------------------------------

    def _take_prompts(self) -> None:
        """Take in loaded prompts and compile those that rows wait for: at least one a turn, longer when idle."""
        failed, for_audit = self._prefixes.poll()
        for loaded in for_audit:
            self._auditor.supply(loaded.ref, loaded.prompt)
        for loaded in failed:
            if loaded.error is not None:
                logger.warning("%s@%s could not be loaded: %s", loaded.ref.task, loaded.ref.version, loaded.error)
                self._fail_waiting(loaded.ref, loaded.error, same_version_only=True)
        if self._prefixes.num_wanted:
            limit_s = COMPILE_RUNNING_S if self._scheduler.running else COMPILE_IDLE_S
            for ref, error in self._prefixes.compile_wanted(limit_s):
                self._fail_waiting(ref, error)

    def _fail_waiting(self, ref: PromptRef, error: PromptmuxError, *, same_version_only: bool = False) -> None:
        """End the rows that wait for a prompt that will not come.

        What cannot be compiled cannot be for anyone; but a load may have failed because one of two versions that share
        a file was deleted, and rows of the other ask again by themselves.
        """
        for row in list(self._scheduler.waiting):
            prompt = row.request.prompt
            if prompt is not None and prompt.prefix_key == ref.prefix_key and (prompt == ref or not same_version_only):
                self._end_row(row, error=error)

    def _evict_doomed(self) -> None:
        if self._doomed:
            waiting = {r.request.prompt.prefix_key for r in self._scheduler.waiting if r.request.prompt is not None}
            for key in self._doomed - waiting:
                self._prefixes.evict(key)
            self._doomed &= waiting

    def _pin(self, refs: Sequence[PromptRef]) -> None:
        self._prefixes.device.pin(frozenset(ref.prefix_key for ref in refs))
        for ref in refs:
            self._prefixes.bring(ref)

    def _audit_sometimes(self, *, is_idle: bool) -> bool:
        """Replay a finished row when nothing else is to be done, and now and then when there is always something."""
        self._steps_since_audit += 1
        if not self._auditor.num_ready or not (is_idle or self._steps_since_audit >= STEPS_BETWEEN_AUDITS):
            return False
        self._steps_since_audit = 0
        self._auditor.run_one()
        return True

    # --- plumbing ---------------------------------------------------------------------------------------------------

    def _post(self, command: Callable[[], None]) -> None:
        self._commands.put(command)
        self._wake.set()

    def _take_commands(self) -> None:
        while not self._commands.empty():
            self._commands.get()()

    def _flush(self) -> None:
        """Hand over everything new in one call."""
        if self._outputs:
            started_s = time.perf_counter()
            outputs, self._outputs = self._outputs, []
            self._deliver(outputs)
            self._observer.outputs_delivered(time.perf_counter() - started_s)
