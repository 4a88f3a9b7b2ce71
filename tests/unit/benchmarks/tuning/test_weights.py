"""Trained weights are those of the best checkpoint, whatever came after it."""

from pathlib import Path

import pytest
import torch

from benchmarks.training_peers import UsualLoop
from benchmarks.tuning.cells import FULL, LORA, Cell, Recipe
from benchmarks.tuning.weights import train_weights
from tuning.examples import EncodedExample

TRAIN = [EncodedExample((10 + index, 20), (30 + index % 3, 2)) for index in range(8)]
VALIDATION = [EncodedExample((50 + index, 20), (30 + index % 3, 2)) for index in range(4)]


@pytest.mark.parametrize("method", [LORA, FULL])
def test_model_answers_with_its_best_checkpoint(method: str, chat_backbone_folder: Path) -> None:
    # So fast that training soon makes it worse.
    recipe = Recipe(
        num_steps=8, batch_size=4, eval_every=1, num_warmup_steps=0, lora_learning_rate=1.0, full_learning_rate=0.3
    )
    looks = 0

    def look() -> None:
        nonlocal looks
        looks += 1

    made = train_weights(
        Cell(task="a", method=method, seed=0),
        recipe,
        folder=str(chat_backbone_folder),
        dtype=torch.float32,
        pad_token_id=0,
        train=TRAIN,
        validation=VALIDATION,
        check_deadline=look,
    )

    trained = UsualLoop(made.model, learning_rate=0.1, num_steps=1, num_warmup_steps=0)
    assert trained.validation_loss(VALIDATION, 4) == pytest.approx(made.training.best_loss, abs=1e-5)
    assert made.training.best_step < recipe.num_steps
    assert made.training.num_examples == 32
    assert looks == recipe.num_steps
