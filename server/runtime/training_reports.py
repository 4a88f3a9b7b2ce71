"""What a job tells: events for its client while it runs, and what is kept with the prompt that came of it.

`JobReports` is written on the engine's thread and read on the event loop's. Refuses to know where events are kept.
"""

import math
import threading
from collections import deque
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

from prompt_store.manifest import PromptVersion
from prompt_store.training_values import EventLevel, TrainingEvent, TrainingJob
from server.runtime.training_data import JobData
from server.runtime.training_specs import JobSpec
from tuning.records import HistoryPoint, TrainedPrompt, TrainEvent

# So many steps of a job are told of, at most; evaluations are all told of.
MAX_STEP_EVENTS: Final = 100
MAX_CURVE_POINTS: Final = 50
MAX_LABELS_KEPT: Final = 100
MAX_LABELS_BYTES: Final = 4096


class JobReports:
    """The events of one job that the store has not got yet, and how far it is."""

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id
        self._lock = threading.Lock()
        self._events: deque[TrainingEvent] = deque()
        self._last_loss: float | None = None
        self.num_new_steps = 0
        self.num_new_examples = 0

    def began(self, spec: JobSpec, data: JobData, *, is_resumed: bool) -> None:
        config = spec.config
        how = "goes on" if is_resumed else "begins"
        self._say(
            "info",
            f"Training {how}: {config.method}, {config.num_virtual_tokens} virtual tokens, {config.num_steps} steps of "
            f"{config.batch_size} out of {len(data.task.train)} examples.",
        )

    def take(self, event: TrainEvent) -> None:
        """What the trainer has to tell, on its own thread."""
        if event.kind == "step":
            with self._lock:
                self.num_new_steps += 1
                self.num_new_examples += event.num_examples
                self._last_loss = event.loss
            stride = max(1, event.num_steps // MAX_STEP_EVENTS)
            if event.step % stride == 0 or event.step in (1, event.num_steps):
                self._tell_step(event, valid_loss=None)
        elif event.kind == "evaluated":
            self._tell_step(event, valid_loss=event.validation_loss)

    def succeeded(self, model: str, trained: TrainedPrompt) -> None:
        early = ", stopped early" if trained.stopped_early else ""
        self._say("info", f"The best prompt is of step {trained.best_step} of {trained.num_steps}{early}.")
        self._say("info", f"New fine-tuned model created: {model}")

    def failed(self, reason: str) -> None:
        self._say("error", f"The job failed: {reason}")

    def count_from_here(self) -> None:
        with self._lock:
            self.num_new_steps = self.num_new_examples = 0

    def take_events(self) -> list[TrainingEvent]:
        """Those that are new, oldest first; each is given out once."""
        with self._lock:
            events = list(self._events)
            self._events.clear()
            return events

    def put_back(self, events: Sequence[TrainingEvent]) -> None:
        """They could not be kept; they come first when there is another try."""
        with self._lock:
            self._events.extendleft(reversed(events))

    def _tell_step(self, event: TrainEvent, *, valid_loss: float | None) -> None:
        train_loss = event.loss if event.loss is not None else self._last_loss
        losses = {"train_loss": _finite(train_loss), "valid_loss": _finite(valid_loss)}
        data: dict[str, Any] = {"step": event.step, "total_steps": event.num_steps}
        data |= {name: loss for name, loss in losses.items() if loss is not None}
        words = {"train_loss": "training loss", "valid_loss": "validation loss"}
        told = ", ".join(f"{words[name]}={loss:.4f}" for name, loss in losses.items() if loss is not None)
        self._put(
            TrainingEvent(
                level="info",
                type="metrics",
                message=f"Step {event.step}/{event.num_steps}: {told}",
                at=datetime.now(UTC),
                data=data,
            )
        )

    def _say(self, level: EventLevel, message: str) -> None:
        self._put(TrainingEvent(level=level, type="message", message=message, at=datetime.now(UTC)))

    def _put(self, event: TrainingEvent) -> None:
        with self._lock:
            self._events.append(event)


def describe_result(job: TrainingJob, version: PromptVersion, data: JobData, trained: TrainedPrompt) -> dict[str, Any]:
    """What the store keeps of a job that succeeded. A version that is not active is named with its number."""
    is_active = version.state == "active"
    return {
        "fine_tuned_model": job.task if is_active else f"{job.task}@{version.version}",
        "version": version.version,
        "digest": version.digest,
        "num_steps": trained.num_steps,
        "best_step": trained.best_step,
        "best_loss": _finite(trained.best_loss),
        "has_validation": bool(data.task.validation),
        "train_loss": _loss_at(trained.history, trained.best_step),
        "stopped_early": trained.stopped_early,
        "trained_tokens": round(data.tokens_an_example * trained.num_examples),
    }


def prompt_metadata(job: TrainingJob, spec: JobSpec, data: JobData, trained: TrainedPrompt) -> dict[str, Any]:
    """Where the version comes from, kept with it."""
    config = spec.config
    metadata: dict[str, Any] = {
        "training": {
            "job": job.id,
            "method": config.method,
            "init": config.usual_init,
            "num_virtual_tokens": config.num_virtual_tokens,
            "learning_rate": config.usual_learning_rate,
            "optimizer": config.optimizer,
            "batch_size": config.batch_size,
            "seed": config.seed,
            "num_steps": trained.num_steps,
            "num_examples": len(data.task.train),
            "num_parameters": trained.num_parameters,
            "data_digest": f"sha256:{job.data_digest}",
            "metrics": {"best_step": trained.best_step, "best_loss": _finite(trained.best_loss)},
            "curve": _curve(trained.history),
        }
    }
    labels = list(data.labels[:MAX_LABELS_KEPT])
    if labels and len(labels) == len(data.labels) and len("".join(labels).encode()) <= MAX_LABELS_BYTES:
        # Those that /v1/classify chooses from when it is not told.
        metadata["labels"] = labels
    return metadata


def _curve(history: Sequence[HistoryPoint]) -> list[dict[str, Any]]:
    """Every so many steps, and each evaluation as far as there is room."""
    evaluated = [point for point in history if point.validation_loss is not None]
    stride = max(1, math.ceil(len(history) / MAX_CURVE_POINTS))
    chosen = {point.step: point for point in [*history[::stride], *history[-1:], *evaluated[-MAX_CURVE_POINTS:]]}
    return [
        {"step": step, "loss": _finite(point.loss)}
        | ({} if point.validation_loss is None else {"validation_loss": _finite(point.validation_loss)})
        for step, point in sorted(chosen.items())
    ]


def _loss_at(history: Sequence[HistoryPoint], step: int) -> float | None:
    return next((_finite(point.loss) for point in history if point.step == step), None)


def _finite(loss: float | None) -> float | None:
    """JSON has no other numbers."""
    return round(loss, 6) if loss is not None and math.isfinite(loss) else None
