"""Runs training jobs: claims them from the store, prepares their data, hands them to the engine, ends them.

Owns a job's way from `queued` to its end, and what it tells on the way. What a server had in hand when it was killed it
takes up again at its next start, from the trainer's last checkpoint; what it has in hand when it drains it gives back.
A job that was cancelled is the canceller's: whatever this runner still has to say of it, the store does not take.
Refuses to know HTTP. The event loop's thread alone uses it, but for `wake` and `cancel`.
"""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import structlog

from prompt_store.errors import PromptStoreError
from prompt_store.training_values import TrainingJob
from server.engine.background import BackgroundWork
from server.errors import InvalidRequestError, PromptmuxError
from server.metrics import JOB_STATUSES
from server.runtime.store_errors import client_errors
from server.runtime.tasks import PromptUpload
from server.runtime.training_data import JobData, load_job_data
from server.runtime.training_endings import Ending, failed, failed_in_training
from server.runtime.training_folders import TrainingFolders
from server.runtime.training_reports import JobReports, describe_result, prompt_metadata
from server.runtime.training_specs import JobSpec, read_spec
from server.runtime.training_work import Outcome, TrainingRun, TrainingWork
from server.tenancy.keys import Caller
from tuning.config import ConfigError, RunConfig
from tuning.records import TrainedPrompt

if TYPE_CHECKING:
    from server.runtime.service import Runtime

# How often the store is told that a job's runner lives, and how long it may be silent before another server takes over.
HEARTBEAT_S = 10.0
STALE_S = 60.0
# How long a job's events are gathered: each report is a write to the disk.
REPORT_INTERVAL_S = 1.0
RETRY_S = 5.0
CLOSE_TIMEOUT_S = 5.0
# A row that comes waits for one layer of one pass: where that takes long, passes are short.
MAX_TOKENS_PER_PASS = 2048
MAX_CPU_TOKENS_PER_PASS = 256
CHECKPOINT_EVERY = 20
# A job that ends the server with it must not do so for ever.
MAX_STARTS = 5
KEEP_ENDED_JOBS = timedelta(days=90)
FORGET_INTERVAL_S = 3600.0
FOLDER = "training"

_log = structlog.get_logger("promptmux.training")


class JobRunner:
    """Runs as many jobs at once as the settings say, from `start` to `stop`."""

    def __init__(self, runtime: "Runtime", model: Any, set_background: Callable[[BackgroundWork], None]) -> None:
        self._runtime = runtime
        self._set_background = set_background
        parts = runtime.parts
        self._folders = TrainingFolders(runtime.settings.data_dir / FOLDER, parts.backbone.fingerprint)
        is_on_cpu = parts.backbone.device_name == "cpu"
        run_config = RunConfig(
            max_tokens_per_pass=MAX_CPU_TOKENS_PER_PASS if is_on_cpu else MAX_TOKENS_PER_PASS,
            # Long passes leave much to keep, on a device whose memory is mostly given to serving. On a CPU, only those
            # of single rows are long, which the trainer's work sees to.
            activation_checkpointing=not is_on_cpu,
            max_tasks_at_once=1,
            checkpoint_every=CHECKPOINT_EVERY,
        )
        self._work = TrainingWork(model, parts.backbone.tokenizer, run_config, model_name=parts.backbone.name)
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._jobs: dict[str, asyncio.Task[None]] = {}
        self._cancelled: set[str] = set()
        self._task: asyncio.Task[None] | None = None
        self._is_stopping = False
        self._name = ""
        self._forgets_at_s = float("-inf")

    def start(self) -> None:
        # The first piece is to see whether the backbone can be trained over at all.
        self._set_background(self._work)
        self._task = asyncio.create_task(self._run())

    @property
    def fault(self) -> str | None:
        """Why no prompt can be trained over the backbone; None if one can, or while that is not known."""
        return self._work.fault

    def wake(self) -> None:
        """There may be a job to run. Any thread may call this, also after `stop`."""
        try:
            self._loop.call_soon_threadsafe(self._changed.set)
        except RuntimeError:
            # The loop is gone; the store remembers.
            return

    def cancel(self, job_id: str) -> None:
        """The store has it as cancelled. Any thread may call this."""
        self._work.drop(job_id)
        try:
            self._loop.call_soon_threadsafe(self._end_cancelled, job_id)
        except RuntimeError:
            return

    def stop(self) -> None:
        """Begin no more, and give back what runs. Returns at once; may be called twice."""
        if self._task is not None and not self._is_stopping:
            self._is_stopping = True
            self._work.close()
            self._set_background(self._work)
            self._task.cancel()
            for task in self._jobs.values():
                task.cancel()

    async def wait_stopped(self) -> None:
        """Waits until what ran has been given back to the store. Call `stop` before."""
        if self._task is None:
            return
        await asyncio.gather(*self._jobs.values(), self._task, return_exceptions=True)
        if not await asyncio.to_thread(self._work.wait_closed, CLOSE_TIMEOUT_S):
            _log.warning("training_not_saved")

    def _end_cancelled(self, job_id: str) -> None:
        task = self._jobs.get(job_id)
        if task is not None:
            self._cancelled.add(job_id)
            task.cancel()

    async def _run(self) -> None:
        self._name = await asyncio.to_thread(self._folders.runner_name)
        while True:
            self._changed.clear()
            try:
                await self._look()
            except Exception:
                _log.warning("training_jobs_not_read", exc_info=True)
            try:
                async with asyncio.timeout(RETRY_S):
                    await self._changed.wait()
            except TimeoutError:
                continue

    async def _look(self) -> None:
        """Takes what there is to take. Where there is nothing, this reads, and writes nothing."""
        store, metrics = self._runtime.store, self._runtime.metrics
        counts = await self._runtime.call(store.count_training_jobs)
        if counts.get("queued", 0) or counts.get("running", 0) > len(self._jobs):
            await self._take_jobs()
            counts = await self._runtime.call(store.count_training_jobs)
        for status in JOB_STATUSES:
            metrics.training_jobs_unfinished.labels(status=status).set(counts.get(status, 0))
        now_s = self._loop.time()
        if now_s >= self._forgets_at_s:
            self._forgets_at_s = now_s + FORGET_INTERVAL_S
            await self._runtime.call(store.forget_ended_training_jobs, before=datetime.now(UTC) - KEEP_ENDED_JOBS)
            needed = await self._runtime.call(store.unfinished_training_jobs)
            await asyncio.to_thread(self._folders.sweep, needed | set(self._jobs))

    async def _take_jobs(self) -> None:
        store = self._runtime.store
        while len(self._jobs) < self._runtime.settings.training_jobs_at_once:
            job = await self._runtime.call(
                store.claim_training_job,
                self._name,
                held=tuple(self._jobs),
                stale_before=datetime.now(UTC) - timedelta(seconds=STALE_S),
            )
            if job is None:
                break
            self._jobs[job.id] = asyncio.create_task(self._run_job(job))

    async def _run_job(self, job: TrainingJob) -> None:
        reports = JobReports(job.id)
        ending: Ending | None = None
        try:
            ending = await self._train(job, reports)
        except asyncio.CancelledError:
            if job.id not in self._cancelled:
                ending = Ending("queued")
        except PromptmuxError as error:
            ending = failed(error)
        except Exception:
            _log.exception("training_job_failed", job=job.id)
            ending = failed(PromptmuxError("The server failed while it trained; its log says why."))
        if ending is None or ending.status != "queued":
            self._work.drop(job.id)
        try:
            await asyncio.shield(self._finish(job, reports, ending))
            if ending is None or ending.status != "queued":
                await asyncio.to_thread(self._folders.remove, job.id)
        except Exception:
            # It says `running` still: this server takes it up again, now or after its next start.
            _log.warning("training_job_not_ended", job=job.id, exc_info=True)
        finally:
            self._jobs.pop(job.id, None)
            self._cancelled.discard(job.id)
            self._changed.set()

    async def _train(self, job: TrainingJob, reports: JobReports) -> Ending | None:
        """None when the job was cancelled meanwhile, or taken over."""
        if job.num_starts > MAX_STARTS:
            raise PromptmuxError(f"The server ended {job.num_starts - 1} times while it trained this job.")
        try:
            spec = read_spec(job.spec)
        except (ConfigError, TypeError) as error:
            raise InvalidRequestError(f"The job was made by another release: {error}") from error
        name, folder = self._runtime.parts.backbone.name, self._folders.of(job.id)
        if spec.model != name:
            raise InvalidRequestError(f"The job is for {spec.model}; the server runs {name} by now.", param="model")
        data = await asyncio.to_thread(self._prepare, job, spec)
        reports.began(spec, data, is_resumed=await asyncio.to_thread(folder.exists))
        ended: asyncio.Future[Outcome] = self._loop.create_future()
        run = TrainingRun(
            job_id=job.id,
            task=data.task,
            folder=folder,
            on_event=reports.take,
            on_end=lambda outcome: self._tell(ended, outcome),
        )
        self._work.add(run)
        self._set_background(self._work)
        if not await self._follow(job, reports, ended):
            return None
        outcome = ended.result()
        if isinstance(outcome, Exception):
            return failed_in_training(outcome)
        uploaded = await self._runtime.call(self._upload, job, spec, data, outcome)
        reports.succeeded(uploaded["fine_tuned_model"], outcome)
        return Ending("succeeded", result=uploaded)

    async def _follow(self, job: TrainingJob, reports: JobReports, ended: "asyncio.Future[Outcome]") -> bool:
        """Reports what the job tells until it has ended; False when it is not this runner's any more."""
        metrics = self._runtime.metrics
        reported_at = float("-inf")
        while not ended.done():
            await asyncio.wait([ended], timeout=REPORT_INTERVAL_S)
            metrics.training_steps_total.inc(reports.num_new_steps)
            metrics.training_examples_total.inc(reports.num_new_examples)
            reports.count_from_here()
            events = reports.take_events()
            if not events and self._loop.time() - reported_at < HEARTBEAT_S:
                continue
            try:
                is_ours = await self._runtime.call(self._runtime.store.report_training, job.id, self._name, events)
            except Exception:
                # The disk may have room again before the job ends; what it had to tell is told then.
                reports.put_back(events)
                _log.warning("training_not_reported", job=job.id, exc_info=True)
                continue
            reported_at = self._loop.time()
            if not is_ours:
                return False
        # From here on it cannot be cancelled; cancelled before, it makes nothing. So the store is to know it.
        is_trained = not isinstance(ended.result(), Exception)
        while True:
            events = reports.take_events()
            try:
                return await self._runtime.call(
                    self._runtime.store.report_training, job.id, self._name, events, is_trained=is_trained
                )
            except PromptStoreError:
                reports.put_back(events)
                await asyncio.sleep(REPORT_INTERVAL_S)

    def _prepare(self, job: TrainingJob, spec: JobSpec) -> JobData:
        """Blocking."""
        store, backbone = self._runtime.store, self._runtime.parts.backbone

        def read(file_id: str) -> tuple[str, bytes]:
            file = store.get_training_file(job.tenant, file_id)
            return file.filename, store.read_training_file(file)

        with client_errors():
            training = read(job.training_file)
            validation = None if job.validation_file is None else read(job.validation_file)
        return load_job_data(
            job.task,
            spec.config,
            backbone.tokenizer,
            training=training,
            validation=validation,
            has_gate=spec.gate_threshold is not None,
            max_tokens=min(self._runtime.settings.max_training_tokens, backbone.max_model_len),
        )

    def _upload(self, job: TrainingJob, spec: JobSpec, data: JobData, trained: TrainedPrompt) -> dict[str, Any]:
        """Store the prompt as a version of the job's task; what came of it. Blocking."""
        caller = Caller(tenant=job.tenant, scopes=frozenset({"write"}), key_id=job.created_by or None)
        upload = PromptUpload(
            task=job.task,
            file=(trained.folder / "adapter_model.safetensors").read_bytes(),
            config=(trained.folder / "adapter_config.json").read_bytes(),
            activate=spec.activate,
            metadata=prompt_metadata(job, spec, data, trained),
            training_run=job.id,
            data_digest=f"sha256:{job.data_digest}",
            probes=data.probes,
            gate_threshold=spec.gate_threshold,
        )
        view, _ = self._runtime.parts.tasks.upload(caller, upload)
        return describe_result(job, view.version, data, trained)

    async def _finish(self, job: TrainingJob, reports: JobReports, ending: Ending | None) -> None:
        metrics = self._runtime.metrics
        if ending is None:
            metrics.training_jobs_total.labels(result="cancelled").inc()
            _log.info("training_job_cancelled", job=job.id, tenant=job.tenant, task=job.task)
            return
        if ending.status == "failed" and ending.error is not None:
            reports.failed(str(ending.error["message"]))
        is_ours = await self._runtime.call(
            self._runtime.store.finish_training_job,
            job.id,
            self._name,
            status=ending.status,
            result=ending.result,
            error=ending.error,
            events=reports.take_events(),
        )
        if ending.status == "queued":
            return
        result = ending.status if is_ours else "cancelled"
        metrics.training_jobs_total.labels(result=result).inc()
        _log.info(
            "training_job_ended",
            job=job.id,
            tenant=job.tenant,
            task=job.task,
            result=result,
            # Not its message, which may quote an example.
            error_code=None if ending.error is None else ending.error["code"],
        )

    def _tell(self, ended: "asyncio.Future[Outcome]", outcome: Outcome) -> None:
        """Called on the engine's thread."""

        def settle() -> None:
            if not ended.done():
                ended.set_result(outcome)

        try:
            self._loop.call_soon_threadsafe(settle)
        except RuntimeError:
            return
