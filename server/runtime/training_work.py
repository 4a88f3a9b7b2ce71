"""Training on the engine's thread: which job has the next optimizer step, and how a job is left in its middle.

Every job has a trainer of its own, and they take turns, a step each: examples of two tenants are never in one pass.
Runs inside `server.engine.background`, which lets serving in between two layers. Owns what of a trainer needs the
thread that owns the device. Refuses to know the store, events' texts and HTTP.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import torch

from server.engine.background import BackgroundStopped, GiveWay
from tuning.config import RunConfig
from tuning.examples import EncodedExample
from tuning.forward import PackedPass
from tuning.gate import check_backbone
from tuning.records import TrainedPrompt, TrainEvent, TrainTask, UnsupportedBackboneError
from tuning.trainer import Trainer

logger = logging.getLogger(__name__)

EXAMPLES_A_BOUNDARY = 64

Outcome = TrainedPrompt | Exception
"""How a job's training ended: a prompt, or why there is none."""


class TrainingFailedError(RuntimeError):
    """The trainer gave the task up; the message says why."""


class _Left(BaseException):
    """The step is left in its middle. Not an Exception: the trainer must not take it for a fault of the task's."""


@dataclass(eq=False)
class TrainingRun:
    """One job in training. `on_event` and `on_end` are called on the engine's thread and must return at once."""

    job_id: str
    task: TrainTask
    folder: Path
    on_event: Callable[[TrainEvent], None]
    on_end: Callable[[Outcome], None]
    trainer: Trainer | None = field(default=None, repr=False)
    is_dropped: bool = False


class TrainingWork:
    """The engine's background work. `run` is the engine's to call, the other methods are for any thread.

    Its first piece is to compare a packed training pass with the stock model's: `fault` says what is wrong with it,
    None if nothing is, or while it is not known.
    """

    def __init__(self, model: Any, tokenizer: Any, run_config: RunConfig, *, model_name: str) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._run_config = run_config
        self._model_name = model_name
        self._lock = threading.Lock()
        self._runs: list[TrainingRun] = []
        self._current: TrainingRun | None = None
        self._give_way: GiveWay = lambda: None
        self._is_checked = False
        self._is_closing = False
        self._closed = threading.Event()
        self.fault: str | None = None

    def add(self, run: TrainingRun) -> None:
        with self._lock:
            self._runs.append(run)

    def drop(self, job_id: str) -> None:
        """Train the job no further; `on_end` is not called any more. In the middle of a step, at its next boundary."""
        with self._lock:
            for run in self._runs:
                run.is_dropped = run.is_dropped or run.job_id == job_id
            self._runs = [run for run in self._runs if not run.is_dropped]

    def close(self) -> None:
        """Train nothing any further, and write down how far each job is. Returns at once."""
        self._is_closing = True

    def wait_closed(self, timeout_s: float) -> bool:
        """Whether all of that has been done, which is waited for. The engine must have been given its work anew."""
        return self._closed.wait(timeout_s)

    def run(self, give_way: GiveWay) -> bool:
        run = self._next_run()
        if self._is_closing:
            self._save_all()
            return False
        if run is None and self._is_checked:
            return False
        self._current, self._give_way = run, give_way
        try:
            # Also on CUDA the backward pass, and with it each boundary, is to be on this thread: serving runs there.
            with torch.autograd.set_multithreading_enabled(False):
                self._check()
                if run is not None:
                    self._step(run)
        except _Left:
            logger.info("a step of training was left in its middle")
        except BackgroundStopped:
            self._save_all()
            raise
        finally:
            self._current, self._give_way = None, lambda: None
        return True

    def _next_run(self) -> TrainingRun | None:
        """Each in its turn."""
        with self._lock:
            if not self._runs:
                return None
            self._runs.append(self._runs.pop(0))
            return self._runs[-1]

    def _check(self) -> None:
        if self._is_checked:
            return
        try:
            with torch.inference_mode(False), torch.enable_grad():
                check_backbone(PackedPass(self._model, boundary=self._at_boundary))
        except UnsupportedBackboneError as error:
            self.fault = str(error)
            logger.warning("no prompts can be made here: %s", error)
        self._is_checked = True

    def _step(self, run: TrainingRun) -> None:
        try:
            if self.fault is not None:
                raise UnsupportedBackboneError(self.fault)
            if run.trainer is None:
                run.trainer = self._make_trainer(run)
            has_more = run.trainer.step()
        except Exception as error:
            logger.warning("training of %s failed", run.job_id, exc_info=True)
            self._end(run, error)
            return
        if has_more:
            return
        name = run.task.name
        if name in run.trainer.results:
            self._end(run, run.trainer.results[name])
        else:
            failure = run.trainer.failures.get(name)
            self._end(run, TrainingFailedError(failure.reason if failure is not None else "no prompt came of it"))

    def _make_trainer(self, run: TrainingRun) -> Trainer:
        # To look through a large file takes seconds; rows are not to wait for that either.
        task = replace(
            run.task,
            train=_GivingWay(run.task.train, self._at_boundary),
            validation=_GivingWay(run.task.validation, self._at_boundary),
        )
        return Trainer(
            self._model,
            self._tokenizer,
            [task],
            run=_with_checkpointing(self._run_config, run.task),
            folder=run.folder,
            listener=run.on_event,
            boundary=self._at_boundary,
            base_model_name=self._model_name,
            checks_backbone=False,
        )

    def _at_boundary(self) -> None:
        if self._is_closing or (self._current is not None and self._current.is_dropped):
            raise _Left
        self._give_way()

    def _save_all(self) -> None:
        """Between two steps of each: a step that was given up has changed nothing."""
        with self._lock:
            runs, self._runs = self._runs, []
        for run in runs:
            if run.trainer is None:
                continue
            try:
                run.trainer.save()
            except Exception:
                logger.warning("training of %s goes on from an earlier step", run.job_id, exc_info=True)
        self._closed.set()

    def _end(self, run: TrainingRun, outcome: Outcome) -> None:
        with self._lock:
            self._runs = [other for other in self._runs if other is not run]
            if run.is_dropped:
                return
        run.on_end(outcome)


class _GivingWay(Sequence[EncodedExample]):
    """Examples; whoever goes through them comes by a boundary every so often."""

    def __init__(self, examples: Sequence[EncodedExample], boundary: Callable[[], None]) -> None:
        self._examples = examples
        self._boundary = boundary

    def __len__(self) -> int:
        return len(self._examples)

    @overload
    def __getitem__(self, place: int) -> EncodedExample: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[EncodedExample]: ...
    def __getitem__(self, place: int | slice) -> EncodedExample | Sequence[EncodedExample]:
        return self._examples[place]

    def __iter__(self) -> Iterator[EncodedExample]:
        for number, example in enumerate(self._examples, start=1):
            if number % EXAMPLES_A_BOUNDARY == 0:
                self._boundary()
            yield example


def _with_checkpointing(config: RunConfig, task: TrainTask) -> RunConfig:
    """A row that is longer than a pass is a pass of its own: of that, the layers' inputs alone are kept."""
    longest = max((example.num_tokens for example in (*task.train, *task.validation)), default=0)
    if task.config.num_virtual_tokens + longest <= config.max_tokens_per_pass:
        return config
    return config.model_copy(update={"activation_checkpointing": True})
