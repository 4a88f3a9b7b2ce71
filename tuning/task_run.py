"""One task in training: its prompt, its optimizer, and how far it is. Knows nothing of the tasks beside it."""

import hashlib
import math
from typing import Any

import torch

from tuning.examples import EncodedExample
from tuning.forward import PromptValues
from tuning.methods import BackboneFacts, SoftPrompt, Teacher
from tuning.optimizers import DataOrder, learning_rate_at, make_optimizer
from tuning.records import HistoryPoint, TrainTask
from tuning.run_state import TaskState

_NUM_EVALUATIONS = 10
"""Where a task with a validation split says nothing else, it is evaluated so often."""

_COLUMNS = ("step", "loss", "grad_norm", "learning_rate", "validation_loss")


class NotFiniteError(ArithmeticError):
    """A task's loss or gradient is not a number: it can be trained no further."""


class TaskRun:
    """Holds a task's prompt between its first step and its last.

    A step is `batch`, `prepare`, some passes over the prompt that `prepare` gave, whose gradients add up in it, and
    `update`. Until `update`, nothing has changed: a step that was given up can be taken again.
    """

    def __init__(self, task: TrainTask, prompt: SoftPrompt, teacher: Teacher | None) -> None:
        self.task = task
        self.prompt = prompt
        self.teacher = teacher
        self.step = 0
        self.seconds = 0.0
        self.history: list[HistoryPoint] = []
        self.best_step = 0
        self.best_loss = math.inf
        self.best_tensors: dict[str, torch.Tensor] = {}
        self.stopped_early = False
        self._num_vain = 0
        self._parameters = [p for p in prompt.parameters() if p.requires_grad]
        self._optimizer = make_optimizer(task.config, self._parameters)
        self._order = DataOrder(len(task.train), task.config.batch_size, task.config.seed)
        self._output: torch.Tensor | None = None
        self._leaf: torch.Tensor | None = None

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def is_finished(self) -> bool:
        return self.stopped_early or self.step >= self.task.config.num_steps

    @property
    def num_examples(self) -> int:
        """Examples seen so far, repeats counted."""
        return self.step * self.task.config.batch_size

    @property
    def wants_evaluation(self) -> bool:
        """Whether the validation loss after the last step is due, and not known yet."""
        config = self.task.config
        if not self.task.validation or not self.history or self.history[-1].validation_loss is not None:
            return False
        every = config.eval_every or max(1, config.num_steps // _NUM_EVALUATIONS)
        return self.step % every == 0 or self.step >= config.num_steps

    def batch(self) -> list[EncodedExample]:
        """The examples of the next step."""
        return [self.task.train[place] for place in self._order.batch(self.step)]

    def prepare(self, dtype: torch.dtype) -> PromptValues:
        """The prompt as passes take it. What made it out of the parameters is run once, not once a pass."""
        self._output = self.prompt()
        self._leaf = self._output.detach().requires_grad_()
        return self.prompt.values(self._leaf, dtype)

    @torch.no_grad()
    def values(self, dtype: torch.dtype) -> PromptValues:
        """The prompt as it is, without gradients."""
        return self.prompt.values(self.prompt(), dtype)

    def update(self, loss: float) -> HistoryPoint:
        """Take the step. `loss` is that of the batch, whose gradient lies in what `prepare` gave.

        Raises NotFiniteError, and changes nothing then.
        """
        assert self._output is not None
        assert self._leaf is not None
        for parameter in self._parameters:
            parameter.grad = None
        torch.autograd.backward(self._output, self._leaf.grad)
        self._output = self._leaf = None
        config = self.task.config
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, config.max_grad_norm))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = "loss" if not math.isfinite(loss) else "gradient"
            raise NotFiniteError(
                f"the {what} of step {self.step + 1} is not a finite number; a lower learning rate than "
                f"{config.usual_learning_rate:g} may help"
            )
        rate = learning_rate_at(config, self.step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self.step += 1
        self.history.append(HistoryPoint(step=self.step, loss=loss, grad_norm=norm, learning_rate=rate))
        if not self.task.validation:
            self.best_step, self.best_loss = self.step, loss
        return self.history[-1]

    def record_validation(self, loss: float) -> None:
        """Keep the prompt if it is the best so far, and stop when it has not been for long enough.

        Raises NotFiniteError.
        """
        if not math.isfinite(loss):
            raise NotFiniteError(f"the validation loss after step {self.step} is not a finite number")
        last = self.history[-1]
        self.history[-1] = HistoryPoint(
            step=last.step,
            loss=last.loss,
            grad_norm=last.grad_norm,
            learning_rate=last.learning_rate,
            validation_loss=loss,
        )
        config = self.task.config
        self._num_vain = 0 if loss < self.best_loss - config.min_delta else self._num_vain + 1
        if loss < self.best_loss:
            self.best_step, self.best_loss = self.step, loss
            self.best_tensors = self.prompt.tensors()
        self.stopped_early = (
            config.patience is not None and self._num_vain >= config.patience and self.step < config.num_steps
        )

    def final_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of the best checkpoint, or of the last where nothing was evaluated."""
        return self.best_tensors or self.prompt.tensors()

    def save(self) -> TaskState:
        """All that the rest of the training depends on, but for the task itself."""
        tensors = {f"prompt/{name}": tensor for name, tensor in self.prompt.state_dict().items()}
        tensors |= {f"best/{name}": tensor for name, tensor in self.best_tensors.items()}
        tensors["history"] = history_tensor(self.history)
        slots: dict[str, dict[str, Any]] = {}
        for index, kept in self._optimizer.state_dict()["state"].items():
            for name, value in kept.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"optimizer/{index}/{name}"] = value
                else:
                    slots.setdefault(str(index), {})[name] = value
        facts = {
            "status": "running",
            "step": self.step,
            "seconds": self.seconds,
            "best_step": self.best_step,
            "best_loss": self.best_loss,
            "num_vain": self._num_vain,
            "stopped_early": self.stopped_early,
            "optimizer": slots,
        }
        return TaskState(tensors, facts)

    def load(self, state: TaskState) -> None:
        """Be where `save` was called."""
        facts = state.facts
        self.prompt.load_state_dict(_below(state.tensors, "prompt/"))
        self.best_tensors = _below(state.tensors, "best/")
        self.history = read_history(state.tensors["history"])
        slots: dict[int, dict[str, Any]] = {int(index): dict(kept) for index, kept in facts["optimizer"].items()}
        for key, tensor in _below(state.tensors, "optimizer/").items():
            index, _, name = key.partition("/")
            slots.setdefault(int(index), {})[name] = tensor
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": slots, "param_groups": groups})
        self.step, self.seconds = facts["step"], facts["seconds"]
        self.best_step, self.best_loss = facts["best_step"], facts["best_loss"]
        self._num_vain, self.stopped_early = facts["num_vain"], facts["stopped_early"]


def task_digest(task: TrainTask, backbone: BackboneFacts, dtype: torch.dtype) -> str:
    """SHA-256 (hex) of a task's configuration and data, and of what is known of the backbone, but for its place."""
    digest = hashlib.sha256(task.config.model_dump_json().encode())
    digest.update(repr((backbone.name, backbone.hidden_size, backbone.layers, dtype)).encode())
    for part in (task.train, task.validation):
        digest.update(b"|")
        for example in part:
            digest.update(repr((example.prompt_ids, example.completion_ids)).encode())
    digest.update(repr([tuple(label) for label in task.label_ids]).encode())
    return digest.hexdigest()


def history_tensor(history: list[HistoryPoint]) -> torch.Tensor:
    """`[steps, 5]`, float64, exact; NaN where nothing was evaluated."""
    rows = [
        [math.nan if (value := getattr(point, column)) is None else value for column in _COLUMNS] for point in history
    ]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(history), len(_COLUMNS))


def read_history(tensor: torch.Tensor) -> list[HistoryPoint]:
    """The inverse of `history_tensor`."""
    return [
        HistoryPoint(
            step=int(step),
            loss=loss,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            validation_loss=None if math.isnan(validation_loss) else validation_loss,
        )
        for step, loss, grad_norm, learning_rate, validation_loss in tensor.tolist()
    ]


def _below(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
