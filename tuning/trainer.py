"""Trains many prompts at once over one frozen backbone: every step is one optimizer step of every running task.

The rows of all running tasks are packed into the same passes; each prompt has its own optimizer, learning rate, data
order, clipping, early stopping and best checkpoint, so that a task's result is that of training it alone, but for
rounding. Finished tasks leave, waiting ones join. A task whose numbers are no longer finite ends alone.

One thread at a time. The run's state is written at intervals; who makes a trainer over the same folder goes on from it.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tuning.config import RunConfig
from tuning.forward import PackedPass, PromptValues
from tuning.gate import check_backbone
from tuning.limits import check_task
from tuning.methods import PromptBuilder, save_peft_files
from tuning.objective import target_losses
from tuning.packing import Row, example_row, split_rows
from tuning.records import (
    EventKind,
    RunStateError,
    TrainedPrompt,
    TrainEvent,
    TrainFailure,
    TrainTask,
    TrainTaskError,
    TuningError,
)
from tuning.run_state import TaskState, load_state, save_state
from tuning.task_run import NotFiniteError, TaskRun, history_tensor, read_history, task_digest

_MAX_LOGITS = 1 << 27
"""Logits of one pass: what a large vocabulary lets be held at once."""

__all__ = ["TrainEvent", "TrainFailure", "TrainTask", "TrainTaskError", "TrainedPrompt", "Trainer", "TuningError"]


class Trainer:
    """A run of many tasks. `results` and `failures` hold the finished and the failed ones, by name.

    `model` is frozen, in eval mode, and stays so; outside of its passes, and while `boundary` runs, it is as it was.
    `boundary` is called between layers, forward and backward, and between passes. It may raise: the step is given up,
    nothing has changed, and `step` may be called again. `listener` is called on the thread that calls `step`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tasks: Sequence[TrainTask],
        *,
        run: RunConfig,
        folder: Path,
        listener: Callable[[TrainEvent], None] | None = None,
        boundary: Callable[[], None] | None = None,
        base_model_name: str | None = None,
        checks_backbone: bool = True,
    ) -> None:
        """Check the backbone and the tasks, and go on from the folder's state, if there is one.

        `folder` gets a folder a finished task, with PEFT's two files. `base_model_name` is written into them; None: the
        last part of the model's own name. Without `checks_backbone` the caller has seen to it that the backbone passes
        (`tuning.gate`). Raises UnsupportedBackboneError, TrainTaskError, RunStateError.
        """
        self.results: dict[str, TrainedPrompt] = {}
        self.failures: dict[str, TrainFailure] = {}
        self._run = run
        self._folder = folder
        self._listener = listener
        self._waiting: list[TrainTask] = []
        self._running: list[TaskRun] = []
        self._cancelled: set[str] = set()
        self._digests: dict[str, str] = {}
        self._num_unsaved = 0
        with _gradients():
            self._packed = PackedPass(model, activation_checkpointing=run.activation_checkpointing, boundary=boundary)
            if checks_backbone:
                check_backbone(self._packed)
            self._builder = PromptBuilder(self._packed, tokenizer, name=base_model_name)
            self._max_targets = max(1, _MAX_LOGITS // self._builder.vocab_size)
            saved = load_state(folder)
            for task in tasks:
                self.add(task, saved.get(task.name))

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to train."""
        return not self._running and not self._waiting

    def add(self, task: TrainTask, saved: TaskState | None = None) -> None:
        """Have a task join when there is room. `saved` is its part of an earlier run's state.

        Raises TrainTaskError, RunStateError.
        """
        if task.name in self._digests:
            raise TrainTaskError("another task of the run has it", task=task.name, field="name")
        check_task(task, self._builder, self._packed.model)
        digest = task_digest(task, self._builder.facts, self._packed.dtype)
        if saved is not None and saved.facts["digest"] != digest:
            raise RunStateError(
                f"{self._folder} holds the state of another training of {task.name}: its configuration, its data or "
                "the backbone was changed; train into another folder, or remove this one"
            )
        self._digests[task.name] = digest
        if saved is None:
            self._waiting.append(task)
        else:
            self._restore(task, saved)

    def cancel(self, name: str) -> None:
        """End a task without a result, before the next step. Unknown and finished names are let be. Any thread."""
        self._cancelled.add(name)

    def run(self) -> dict[str, TrainedPrompt]:
        """Train until nothing is left, and return `results`."""
        while self.step():
            pass
        return self.results

    def step(self) -> bool:
        """One optimizer step of every running task. False when nothing is left to train."""
        with _gradients():
            self._drop_cancelled()
            self._admit()
            num_before = len(self._running)
            if num_before:
                # An evaluation that was given up comes before the next step.
                if not any(run.wants_evaluation for run in self._running):
                    self._train(list(self._running))
                self._evaluate([run for run in self._running if run.wants_evaluation])
                for run in [run for run in self._running if run.is_finished]:
                    self._finish(run)
                self._num_unsaved += 1
                if len(self._running) < num_before or self._num_unsaved >= self._run.checkpoint_every:
                    self.save()
        return not self.is_done

    def save(self) -> None:
        """Write the run's state, for a later trainer over the same folder. Between steps."""
        states = {run.name: run.save() for run in self._running}
        states |= {name: self._ended_state(name) for name in (*self.results, *self.failures)}
        for name, state in states.items():
            state.facts["digest"] = self._digests[name]
        save_state(self._folder, states)
        self._num_unsaved = 0

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._run.max_tasks_at_once:
            task = self._waiting[0]
            run = TaskRun(task, self._builder.build(task), self._builder.teacher(task))
            self._waiting.pop(0)
            self._running.append(run)
            self._tell("started", run)

    def _train(self, runs: Sequence[TaskRun]) -> None:
        started = time.monotonic()
        rows = [example_row(place, example) for place, run in enumerate(runs) for example in run.batch()]
        prompts = [run.prepare(self._packed.dtype) for run in runs]
        counts = _num_targets(rows)
        weights = torch.tensor([1 / counts[place] for place in range(len(runs))], device=self._packed.device)
        losses = torch.zeros(len(runs), dtype=torch.float64)
        for members in self._passes(runs, rows):
            with self._losses(runs, members, prompts) as (owners, found):
                torch.autograd.backward((found * weights[owners]).sum())
            losses.index_add_(0, owners.cpu(), found.detach().double().cpu())
        seconds = time.monotonic() - started
        for place, run in enumerate(runs):
            run.seconds += seconds
            try:
                point = run.update(float(losses[place]) / counts[place])
            except NotFiniteError as error:
                self._fail(run, str(error))
            else:
                self._tell("step", run, loss=point.loss, learning_rate=point.learning_rate)

    @torch.no_grad()
    def _evaluate(self, runs: Sequence[TaskRun]) -> None:
        started = time.monotonic()
        rows = [example_row(place, example) for place, run in enumerate(runs) for example in run.task.validation]
        prompts = [run.values(self._packed.dtype) for run in runs]
        losses = torch.zeros(len(runs), dtype=torch.float64)
        for members in self._passes(runs, rows):
            with self._losses(runs, members, prompts) as (owners, found):
                losses.index_add_(0, owners.cpu(), found.double().cpu())
        counts = _num_targets(rows)
        seconds = time.monotonic() - started
        for place, run in enumerate(runs):
            run.seconds += seconds
            loss = float(losses[place]) / counts[place]
            try:
                run.record_validation(loss)
            except NotFiniteError as error:
                self._fail(run, str(error))
            else:
                self._tell("evaluated", run, validation_loss=loss)

    def _passes(self, runs: Sequence[TaskRun], rows: Sequence[Row]) -> Iterator[list[Row]]:
        """The rows pass by pass, with a boundary before each."""
        slots = [run.prompt.slot for run in runs]
        limit = self._run.max_tokens_per_pass
        for members in split_rows(rows, slots, max_tokens=limit, max_targets=self._max_targets):
            self._packed.at_boundary()
            yield [rows[index] for index in members]

    @contextmanager
    def _losses(
        self, runs: Sequence[TaskRun], rows: Sequence[Row], prompts: Sequence[PromptValues]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Whose each target is, by the place in `runs`, and its loss."""
        slots = [run.prompt.slot for run in runs]
        teachers = [run.teacher for run in runs]
        with target_losses(self._packed, rows, slots, prompts, teachers) as (batch, losses):
            yield batch.target_prompts, losses

    def _finish(self, run: TaskRun) -> None:
        folder = self._folder / run.name
        try:
            save_peft_files(folder, run.prompt.peft_config(), run.final_tensors())
        except ValueError as error:
            self._fail(run, f"its prompt cannot be saved: {error}")
            return
        self._running.remove(run)
        self.results[run.name] = TrainedPrompt(
            name=run.name,
            folder=folder,
            best_step=run.best_step,
            best_loss=run.best_loss,
            num_steps=run.step,
            stopped_early=run.stopped_early,
            history=tuple(run.history),
            num_examples=run.num_examples,
            num_parameters=run.prompt.num_parameters,
            seconds=run.seconds,
        )
        self._tell("finished", run)

    def _fail(self, run: TaskRun, reason: str) -> None:
        self._running.remove(run)
        self.failures[run.name] = TrainFailure(name=run.name, step=run.step, reason=reason)
        self._tell("failed", run, message=reason)

    def _drop_cancelled(self) -> None:
        names = set(self._cancelled)
        num_before = len(self._running) + len(self._waiting)
        for run in [run for run in self._running if run.name in names]:
            self._running.remove(run)
            self._tell("cancelled", run)
        for task in [task for task in self._waiting if task.name in names]:
            self._waiting.remove(task)
            self._emit(TrainEvent(kind="cancelled", task=task.name, step=0, num_steps=task.config.num_steps))
        self._cancelled -= names
        if num_before > len(self._running) + len(self._waiting):
            self.save()

    def _ended_state(self, name: str) -> TaskState:
        """What a later trainer must know of a task that has ended."""
        if name in self.failures:
            failure = self.failures[name]
            facts = {"status": "failed", "step": failure.step, "reason": failure.reason}
            return TaskState(facts=facts)
        result = self.results[name]
        facts = {
            "status": "finished",
            "best_step": result.best_step,
            "best_loss": result.best_loss,
            "num_steps": result.num_steps,
            "stopped_early": result.stopped_early,
            "num_examples": result.num_examples,
            "num_parameters": result.num_parameters,
            "seconds": result.seconds,
        }
        return TaskState({"history": history_tensor(list(result.history))}, facts)

    def _restore(self, task: TrainTask, saved: TaskState) -> None:
        facts = dict(saved.facts)
        status = facts.pop("status")
        facts.pop("digest")
        if status == "failed":
            self.failures[task.name] = TrainFailure(name=task.name, **facts)
        elif status == "finished":
            history = tuple(read_history(saved.tensors["history"]))
            self.results[task.name] = TrainedPrompt(
                name=task.name, folder=self._folder / task.name, history=history, **facts
            )
        else:
            run = TaskRun(task, self._builder.build(task), self._builder.teacher(task))
            run.load(saved)
            self._running.append(run)

    def _tell(
        self,
        kind: EventKind,
        run: TaskRun,
        *,
        loss: float | None = None,
        validation_loss: float | None = None,
        learning_rate: float | None = None,
        message: str | None = None,
    ) -> None:
        event = TrainEvent(
            kind=kind,
            task=run.name,
            step=run.step,
            num_steps=run.task.config.num_steps,
            num_examples=run.task.config.batch_size if kind == "step" else 0,
            seconds=run.seconds,
            loss=loss,
            validation_loss=validation_loss,
            learning_rate=learning_rate,
            message=message,
        )
        self._emit(event)

    def _emit(self, event: TrainEvent) -> None:
        if self._listener is not None:
            self._listener(event)


def _num_targets(rows: Sequence[Row]) -> Counter[int]:
    counts: Counter[int] = Counter()
    for row in rows:
        counts[row.prompt] += len(row.target_ids)
    return counts


@contextmanager
def _gradients() -> Iterator[None]:
    """Gradients, also on a thread that serves without them."""
    with torch.inference_mode(False), torch.enable_grad():
        yield
