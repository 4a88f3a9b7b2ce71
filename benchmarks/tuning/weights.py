"""The cells that change weights: LoRA by PEFT, and full fine-tuning, one task at a time by the usual loop.

Owns their recipe, which is that of the prompts as far as it goes: the same examples, steps, batch, schedule and
clipping, and the checkpoint with the lowest validation loss. Refuses to know how answers are scored.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from benchmarks.peak_memory import PeakMemory
from benchmarks.training_peers import UsualLoop, attach_lora, load_model
from benchmarks.tuning.cells import LORA, Cell, Recipe
from benchmarks.tuning.ledger import Group, Training
from tuning.examples import EncodedExample
from tuning.optimizers import DataOrder


@dataclass(frozen=True, slots=True)
class TrainedWeights:
    """A model that answers with its best checkpoint, and what making it took."""

    model: PreTrainedModel
    training: Training
    group: Group


def train_weights(
    cell: Cell,
    recipe: Recipe,
    *,
    folder: str,
    dtype: torch.dtype,
    pad_token_id: int,
    train: Sequence[EncodedExample],
    validation: Sequence[EncodedExample],
    check_deadline: Callable[[], None],
) -> TrainedWeights:
    """Train a model of its own for the cell. What `check_deadline` raises ends it, and nothing of it is kept.

    LoRA adapts the model in `dtype` with factors in fp32. Full fine-tuning holds all weights in fp32, for small updates
    would be lost in bf16, and computes in `dtype`.
    """
    seed = cell.seed or 0
    torch.manual_seed(seed)
    if cell.method == LORA:
        base = load_model(folder, dtype, frozen=True)
        peak = PeakMemory()
        model: PreTrainedModel | PeftModel = attach_lora(base, rank=recipe.lora_rank, seed=seed)
        learning_rate = recipe.lora_learning_rate
    else:
        model = base = load_model(folder, torch.float32, frozen=False)
        peak = PeakMemory()
        learning_rate = recipe.full_learning_rate
    loop = UsualLoop(
        model,
        learning_rate=learning_rate,
        num_steps=recipe.num_steps,
        num_warmup_steps=recipe.num_warmup_steps,
        pad_token_id=pad_token_id,
        autocast=cell.method != LORA and dtype == torch.bfloat16,
    )
    order = DataOrder(len(train), recipe.batch_size, seed)
    started_s = time.monotonic()
    best = _Best(loop)
    for step in range(1, recipe.num_steps + 1):
        check_deadline()
        loop.step([train[place] for place in order.batch(step - 1)])
        if step % recipe.eval_every == 0 or step == recipe.num_steps:
            best.offer(step, loop.validation_loss(validation, recipe.batch_size))
    seconds = time.monotonic() - started_s
    best.restore()
    training = Training(
        num_parameters=loop.num_parameters,
        num_steps=recipe.num_steps,
        num_examples=recipe.num_steps * recipe.batch_size,
        seconds=round(seconds, 2),
        learning_rate=learning_rate,
        best_step=best.step,
        best_loss=best.loss,
    )
    # PEFT puts its factors into the model's own layers, so that the model itself answers with them.
    return TrainedWeights(base, training, Group(keys=(cell.key,), seconds=round(seconds, 2), peak_memory_mb=peak.mb))


class _Best:
    """The trained numbers at the lowest validation loss so far."""

    def __init__(self, loop: UsualLoop) -> None:
        self._parameters = loop.parameters
        self._kept: list[torch.Tensor] = []
        self.step, self.loss = 0, float("inf")

    def offer(self, step: int, loss: float) -> None:
        if loss < self.loss:
            self.step, self.loss = step, loss
            self._kept = [parameter.detach().cpu().clone() for parameter in self._parameters]

    @torch.no_grad()
    def restore(self) -> None:
        """Raises FloatingPointError when no loss was a number."""
        if not self._kept:
            raise FloatingPointError("the validation loss was never a number")
        for parameter, kept in zip(self._parameters, self._kept, strict=True):
            parameter.copy_(kept)
