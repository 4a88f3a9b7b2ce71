"""The engine: one thread that owns the device and runs the step loop.

A step on one screen (`_step`): the scheduler says which rows compute how many tokens; the plan says in index tensors
who is who; the isolation check compares the plan with the ledger of owners; the backbone runs; the sampler chooses;
the outputs of all rows are handed over in one call. Where steps overlap (`pipeline`), what a step made is looked at
after the next has been launched. Other threads reach the engine through a queue of commands in and that one call out.
"""

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from prompt_store.manifest import SoftPrompt
from server.engine.audit import Auditor
from server.engine.backbone import Backbone
from server.engine.background import BackgroundStopped, BackgroundTurns, BackgroundWork
from server.engine.commands import Commands
from server.engine.config import EngineConfig
from server.engine.observer import EngineObserver, StepClock
from server.engine.pipeline import DueStep, StepPipeline
from server.engine.places import Admission
from server.engine.prefix import Residency
from server.engine.prompt_intake import PromptIntake
from server.engine.pulse import Pulse, step_kind
from server.engine.request import FINISH_CANCELLED, FINISH_LENGTH, FINISH_STOP, PromptRef, RowOutput, RowRequest
from server.engine.residency import PrefixResidency
from server.engine.results import StepResults
from server.engine.row import Row, make_row
from server.engine.row_memory import RowMemory
from server.engine.scheduler import Scheduler
from server.engine.status import EngineStatus
from server.engine.warm_up import warm_up
from server.errors import DrainingError, EngineFailedError, IsolationError, PromptmuxError, QueueFullError
from server.metrics import Metrics

logger = logging.getLogger(__name__)

Deliver = Callable[[Sequence[RowOutput]], None]

IDLE_WAIT_S = 0.5


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
        """Raises ValueError when memory is too small, BackboneError when determinism cannot be had (`warm_up`)."""
        self._backbone = backbone
        self._config = config
        self._metrics = metrics
        self._serials = itertools.count(1)
        self._commands = Commands()
        self._lock = threading.Lock()
        self._num_waiting = 0  # submitted and not yet admitted; under the lock
        self._rows: dict[str, Row] = {}
        self._pool = warm_up(backbone, config)
        # Neither what was kept nor what was preempted is computed in the shapes that a row alone would give.
        self._memory = RowMemory(
            self._pool,
            keeps_texts=config.keeps_texts and not config.is_deterministic,
            reserves_all=config.is_deterministic,
        )
        self._scheduler = Scheduler(
            max_rows=config.max_rows,
            max_step_tokens=config.max_step_tokens,
            prefill_chunk=config.prefill_chunk,
            is_deterministic=config.is_deterministic,
            has_express_steps=backbone.device.type == "cpu",
            try_admit=self._try_admit,
            try_extend=self._memory.extend,
            preempt=self._preempt,
        )
        self._prefixes = PrefixResidency(
            backbone,
            self._pool,
            config,
            metrics,
            load_prompt=load_prompt,
            wake=self._commands.wake,
            next_serial=lambda: next(self._serials),
        )
        self._observer = EngineObserver(metrics)
        self._results = StepResults(backbone.eos_token_ids)
        self._auditor = Auditor(backbone, config.audit_share, metrics)
        # The dense path takes its tokens from the host.
        overlaps = config.overlaps if config.overlaps is not None else backbone.device.type == "cuda"
        overlaps = overlaps and backbone.path == "packed"
        self._pipeline = StepPipeline(backbone, self._pool, self._results, metrics, self._end_row, overlaps=overlaps)
        self._intake = PromptIntake(self._prefixes, self._memory, self._scheduler, self._auditor, self._end_row)
        self._deliver: Deliver = lambda outputs: None
        self._outputs: list[RowOutput] = []
        self._pulse = Pulse()
        self._background = BackgroundTurns(
            has_rows=lambda: bool(self._rows) or not self._commands.is_empty,
            serve=self._serve_within,
            is_stopping=lambda: self._is_stopping,
            beat=lambda: self._pulse.begin(None),
            share=config.background_share,
            on_time=self._observer.background_ran,
        )
        self._is_draining = False
        self._is_stopping = False
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # --- called from any thread -----------------------------------------------------------------------------------

    def start(self, deliver: Deliver) -> None:
        """Start the step loop. `deliver` is called on the engine thread, at most once a step, with what is new."""
        self._deliver = deliver
        self._prefixes.loader.start()
        if self._config.compiles and not self._config.is_deterministic:
            self._backbone.start_compiling()
        self._thread.start()

    def submit(self, rows: Sequence[RowRequest]) -> None:
        """Queue rows: all of them or none.

        Raises QueueFullError, DrainingError, EngineFailedError, or ContextLengthExceededError for a row that is longer
        than the backbone's context.
        """
        for row in rows:
            row.require_length(self._backbone.max_model_len)
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
            self._commands.post(lambda: self._add_rows(rows))

    def cancel(self, row_ids: Iterable[str]) -> None:
        """End rows before the next step; ids that are unknown or have ended are ignored."""
        ids = list(row_ids)
        self._commands.post(lambda: self._cancel_rows(ids))

    def evict(self, prefix_key: str) -> None:
        """Forget a deleted prompt, once the rows that were submitted with it have ended or hold its prefix.

        Not if rows are submitted with it, or it is pinned, before that.
        """
        self._commands.post(lambda: self._intake.evict_when_unwanted(prefix_key))

    def pin(self, refs: Sequence[PromptRef]) -> None:
        """Keep exactly these prompts on the device, and bring those that are not there."""
        self._commands.post(lambda: self._intake.pin(refs))

    def set_background(self, work: BackgroundWork) -> None:
        """Run this in the gaps from now on; called again, it is asked again whether there is something to do."""
        self._commands.post(lambda: self._background.set_work(work))

    def residency(self, prefix_key: str) -> Residency:
        return self._prefixes.residency_of(prefix_key)

    def status(self) -> EngineStatus:
        with self._lock:
            num_waiting = self._num_waiting
        silence_s, usual_step_s = self._pulse.look()
        return EngineStatus(
            num_running=len(self._scheduler.running),
            num_waiting=num_waiting,
            kv_usage_ratio=self._memory.usage_ratio,
            prompts_resident=len(self._prefixes.device),
            heartbeat_age_s=silence_s,
            usual_step_s=usual_step_s,
            failure=self._failure,
        )

    def start_drain(self) -> None:
        """Take no new rows; those submitted run to their end."""
        with self._lock:
            self._is_draining = True

    def stop(self, timeout_s: float) -> None:
        """Stop the loop after the current step, for good. Rows that are left get an error output.

        The backbone's compiled steps end with it: another engine over the same backbone runs uncompiled.
        """
        with self._lock:
            self._is_stopping = True
        self._commands.wake()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        self._prefixes.loader.stop()
        if not self._thread.is_alive():
            self._backbone.stop_compiling()

    # --- the step loop: everything below runs on the engine thread ---------------------------------------------------

    def run_once(self) -> bool:
        """One turn of the loop; returns whether there was anything to do.

        The loop calls it; a test or an offline program that has not called `start` may call it in its place.
        """
        self._background.begin_turn()
        worked = self._serve()
        worked = self._background.end_turn(has_served=worked) or worked
        return self._auditor.run_sometimes(is_idle=not worked) or worked

    def check_invariants(self) -> None:
        """Raises RuntimeError when rows, pages and prefixes contradict each other. Engine thread only."""
        self._scheduler.check_invariants()
        rows = self._rows.values()
        self._memory.check_invariants(rows)
        self._prefixes.check_invariants()
        users = sum(row.prefix is not None and row.prefix.is_alive for row in rows)
        if users != self._prefixes.device.num_users:
            raise RuntimeError(f"prefixes count {self._prefixes.device.num_users} users, {users} rows hold one")

    def _run(self) -> None:
        try:
            while not self._is_stopping:
                if not self.run_once():
                    self._commands.wait(IDLE_WAIT_S)
        except BackgroundStopped:
            logger.info("background work was left in its middle")
        except Exception as error:
            logger.exception("the step loop has ended")
            with self._lock:
                self._failure = f"{type(error).__name__}: {error}"
        finally:
            self._end_all()

    def _serve(self) -> bool:
        self._pulse.begin(None)
        self._commands.do_all()
        self._intake.turn()
        worked = self._step()
        self._flush()
        self._pulse.begin(None)
        return worked

    def _serve_within(self) -> bool:
        with self._backbone.serving_within():
            worked = self._serve()
            return self._auditor.run_sometimes(is_idle=False) or worked

    def _step(self) -> bool:
        """Plan and launch a step, collect the one that is due. Returns False when there was nothing to do."""
        clock = StepClock()
        planned = self._pipeline.plan(self._scheduler.schedule())
        clock.planned(self._scheduler.form)
        if planned is not None:
            self._pulse.begin(step_kind(planned[0].num_tokens, int(planned[0].lengths.max())))
        due = self._pipeline.launch(*planned, clock) if planned is not None else self._pipeline.take()
        if due is not None:
            self._collect(due)
        return planned is not None or due is not None

    def _collect(self, step: DueStep) -> None:
        step.clock.go_on()
        for row, output in self._results.collect(step.launched):
            self._emit(row, output)
        for item in step.launched.rows:
            # A client's text is offered as soon as it is computed: rows that wait now may begin with it.
            if item.is_current and item.num_tokens > 1 and item.num_left <= 1:
                self._keep_text(item.row)
        step.clock.sampled()
        num_tokens = sum(item.num_tokens for item in step.launched.rows)
        self._scheduler.step_times.add(len(step.launched.rows), num_tokens, step.clock.total_s)
        self._observer.step_done([item.row for item in step.launched.rows], step.clock)

    # --- rows come and go -----------------------------------------------------------------------------------------

    def _add_rows(self, requests: Sequence[RowRequest]) -> None:
        now_s = time.monotonic()
        for request in requests:
            row = make_row(
                request,
                serial=next(self._serials),
                arrived_at_s=now_s,
                tokenizer=self._backbone.tokenizer,
                is_audited=self._auditor.selects(request.row_id),
            )
            self._rows[row.row_id] = row
            self._scheduler.add(row)
            self._metrics.prompt_tokens_total.inc(row.num_prompt_tokens)
            if request.prompt is not None:
                self._intake.prefetch(request.prompt)

    def _try_admit(self, row: Row) -> Admission:
        prompt = row.request.prompt
        if prompt is not None and row.prefix is None:
            row.prefix = self._prefixes.acquire(prompt)
            if row.prefix is None:
                return Admission.PREFIX_NOT_READY
        if not self._memory.admit(row, row.prefix):
            # It keeps its prefix: had it to wait for that again, rows behind it would take the room it waits for.
            return Admission.NO_ROOM
        if row.num_preemptions:
            return Admission.ADMITTED
        with self._lock:
            self._num_waiting -= 1
        row.first_scheduled_at_s = time.monotonic()
        self._metrics.prompt_tokens_cached_total.inc(row.num_cached)
        self._observer.row_admitted(row)
        return Admission.ADMITTED

    def _preempt(self, row: Row) -> None:
        """Take a running row's pages; it waits, and computes its tokens again when there is room."""
        logger.info("row %s gives way: pages are short", row.row_id)
        self._keep_text(row)
        self._memory.release(row)
        # A token that was sampled for it and that nobody has seen yet is sampled again.
        row.num_computed = row.num_in_flight = row.num_pending = 0
        row.num_preemptions += 1
        row.pending_prompt_logprobs.clear()
        self._metrics.num_preemptions_total.inc()

    def _keep_text(self, row: Row) -> None:
        """Offer what the row has computed to later rows; nothing of it when its pages are not what it says."""
        try:
            self._memory.keep_text(row)
        except RuntimeError as error:
            self._metrics.isolation_violations_total.inc()
            logger.critical("isolation violation: row %s: its text is not kept: %s", row.row_id, error)

    def _emit(self, row: Row, output: RowOutput) -> None:
        self._outputs.append(output)
        if output.token_ids:
            self._observer.token_made(row)
        if output.is_last:
            self._retire(row, output)

    def _end_row(self, row: Row, *, finish_reason: str | None = None, error: PromptmuxError | None = None) -> None:
        text = row.text.finish() if error is None else ""
        self._emit(row, RowOutput(row_id=row.row_id, text=text, finish_reason=finish_reason, error=error))

    def _retire(self, row: Row, output: RowOutput) -> None:
        """Take an ended row out of everything: queue or batch, pages, prefix."""
        if row.first_scheduled_at_s is None:
            with self._lock:
                self._num_waiting -= 1
        self._scheduler.remove(row)
        if row.pages is not None:
            if output.error is None:
                self._keep_text(row)
            self._memory.release(row)
        prefix, row.prefix = row.prefix, None
        if prefix is not None:
            try:
                self._prefixes.device.release(prefix)
            except RuntimeError:
                # A row that was ended because of its prefix may have none to give back; the others go on.
                if not isinstance(output.error, IsolationError):
                    raise
                logger.critical("isolation violation: row %s: its prefix is not its own", row.row_id, exc_info=True)
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
            self._commands.do_all()
            for row in list(self._rows.values()):
                self._outputs.append(RowOutput(row_id=row.row_id, error=error))
            self._rows.clear()
            self._scheduler.clear()
            with self._lock:
                self._num_waiting = 0
            self._flush()
        except Exception:
            logger.exception("the rows that were left could not be told")

    def _flush(self) -> None:
        """Hand over everything new in one call."""
        if self._outputs:
            started_s = time.perf_counter()
            outputs, self._outputs = self._outputs, []
            self._deliver(outputs)
            self._observer.outputs_delivered(time.perf_counter() - started_s)
