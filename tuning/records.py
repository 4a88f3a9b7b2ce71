"""What goes into a training run and what comes out of it: tasks, events, histories, finished prompts, errors.

Plain values, safe to hand to another thread. Refuses to know how anything is trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tuning.config import TrainConfig
from tuning.examples import EncodedExample

EventKind = Literal["started", "step", "evaluated", "finished", "failed", "cancelled"]


class TuningError(RuntimeError):
    """Base of what a run raises; the message says what to change."""


class UnsupportedBackboneError(TuningError):
    """No prompt can be trained over this backbone: it was seen to compute something else than its stock form."""


class TrainTaskError(TuningError):
    """A task cannot be trained as it is described; `task` and `field` name what is at fault."""

    def __init__(self, message: str, *, task: str, field: str) -> None:
        super().__init__(f"{task}: {field}: {message}")
        self.task = task
        self.field = field


class RunStateError(TuningError):
    """The state that an earlier run left cannot be gone on from: it is damaged, or of other tasks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainTask:
    """One prompt to be trained. `name` is unique in the run and names a folder.

    `label_ids` are the token ids of each class label, for `init="labels"`; empty where the task has none.
    """

    name: str
    config: TrainConfig
    train: Sequence[EncodedExample]
    validation: Sequence[EncodedExample] = ()
    label_ids: Sequence[Sequence[int]] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryPoint:
    """One step of one prompt. Losses in nats a token: `loss` before the step's update, `validation_loss` after it."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    validation_loss: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainEvent:
    """Something that happened to one task. Steps count from 1; 0 is before the first.

    `loss` is set for "step", `validation_loss` for "evaluated", `message` for "failed". `num_examples` are those of
    this step, `seconds` those since the task began, without what lay between a run's end and its going on.
    """

    kind: EventKind
    task: str
    step: int
    num_steps: int
    num_examples: int = 0
    seconds: float = 0.0
    loss: float | None = None
    validation_loss: float | None = None
    learning_rate: float | None = None
    message: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedPrompt:
    """A finished prompt. `folder` holds PEFT's two files of the best checkpoint.

    `best_loss` is the validation loss at `best_step` where the task has a validation split, else the training loss of
    the last step. `num_steps` were taken, fewer than asked for after an early stop. `num_examples` were seen in them,
    repeats counted. `seconds` are the task's own wall-clock time, shared with what trained beside it.
    """

    name: str
    folder: Path
    best_step: int
    best_loss: float
    num_steps: int
    stopped_early: bool
    history: tuple[HistoryPoint, ...]
    num_examples: int
    num_parameters: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainFailure:
    """A task that ended without a prompt, the others going on."""

    name: str
    step: int
    reason: str
