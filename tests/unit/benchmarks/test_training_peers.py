"""PEFT's usual loop, and that promptmux's trainer takes the same steps: the benchmark compares like with like."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from benchmarks.training_peers import UsualLoop, attach_lora, attach_prompt, load_model, pad_batch
from tuning.config import RunConfig, TrainConfig
from tuning.examples import EncodedExample
from tuning.forward import PackedPass
from tuning.methods import PromptBuilder
from tuning.optimizers import DataOrder, learning_rate_at
from tuning.records import TrainEvent, TrainTask
from tuning.trainer import Trainer

NUM_STEPS = 4


def make_examples(count: int) -> list[EncodedExample]:
    generator = torch.Generator().manual_seed(count)

    def draw(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(4, 120, (length,), generator=generator).tolist())

    return [EncodedExample(draw(3 + index % 5), (*draw(1 + index % 3), 2)) for index in range(count)]


def make_config(method: str) -> TrainConfig:
    fields: dict[str, Any] = {"method": method, "num_virtual_tokens": 3, "num_steps": NUM_STEPS, "batch_size": 3}
    return TrainConfig.model_validate(fields | {"num_warmup_steps": 2, "learning_rate": 0.01, "seed": 5})


@pytest.fixture
def model(chat_backbone_folder: Path) -> PreTrainedModel:
    return load_model(str(chat_backbone_folder), torch.float32, frozen=True)


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_v2", "prefix_tuning"])
def test_trainer_and_peft_s_loop_have_the_same_losses_at_every_step(
    method: str, model: PreTrainedModel, chat_backbone_folder: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_backbone_folder)
    config = make_config(method)
    task = TrainTask(name="a", config=config, train=make_examples(9))
    together: list[float] = []

    def listen(event: TrainEvent) -> None:
        if event.kind == "step" and event.loss is not None:
            together.append(event.loss)

    Trainer(model, tokenizer, [task], run=RunConfig.model_validate({}), folder=tmp_path, listener=listen).run()
    loop = UsualLoop(
        attach_prompt(model, PromptBuilder(PackedPass(model), tokenizer).build(task)),
        learning_rate=config.usual_learning_rate,
        num_steps=NUM_STEPS,
        num_warmup_steps=config.num_warmup_steps,
    )
    order = DataOrder(len(task.train), config.batch_size, config.seed)
    peft = [loop.step([task.train[place] for place in order.batch(step)]) for step in range(NUM_STEPS)]

    assert together == pytest.approx(peft, abs=2e-4)
    assert max(peft) - min(peft) > 1e-3, "nothing was learnt: equal losses would say nothing"


def test_schedule_is_the_trainer_s(model: PreTrainedModel) -> None:
    config = make_config("prompt_tuning")
    loop = UsualLoop(attach_lora(model, rank=2, seed=0), learning_rate=0.01, num_steps=NUM_STEPS, num_warmup_steps=2)
    rates = []
    for _ in range(NUM_STEPS):
        rates.append(loop.learning_rate)
        loop.step(make_examples(2))

    assert rates == pytest.approx([learning_rate_at(config, step) for step in range(NUM_STEPS)])


def test_batch_is_padded_on_the_right_and_only_completions_have_labels() -> None:
    batch = [EncodedExample((5, 6, 7), (8, 2)), EncodedExample((9,), (2,))]

    padded = {name: tensor.tolist() for name, tensor in pad_batch(batch, 0, "cpu").items()}

    assert padded == {
        "input_ids": [[5, 6, 7, 8, 2], [9, 2, 0, 0, 0]],
        "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]],
        "labels": [[-100, -100, -100, 8, 2], [-100, 2, -100, -100, -100]],
    }


def test_lora_trains_its_factors_alone(model: PreTrainedModel) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loop = UsualLoop(attach_lora(model, rank=2, seed=0), learning_rate=0.01, num_steps=3, num_warmup_steps=1)
    for _ in range(3):
        loop.step(make_examples(4))

    after = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert loop.num_parameters == sum(value.numel() for name, value in after.items() if "lora_" in name)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_full_fine_tuning_learns_its_batch(chat_backbone_folder: Path, checkpointing: bool) -> None:
    model = load_model(str(chat_backbone_folder), torch.float32, frozen=False)
    loop = UsualLoop(model, learning_rate=1e-2, num_steps=10, num_warmup_steps=1, checkpointing=checkpointing)
    batch = make_examples(4)

    losses = [loop.step(batch) for _ in range(8)]

    assert losses[-1] < losses[0] / 2
    assert loop.num_parameters == model.num_parameters()


def test_validation_loss_weighs_tokens_and_not_batches(model: PreTrainedModel) -> None:
    loop = UsualLoop(attach_lora(model, rank=2, seed=0), learning_rate=0.01, num_steps=3, num_warmup_steps=1)
    examples = make_examples(7)

    assert loop.validation_loss(examples, 2) == pytest.approx(loop.validation_loss(examples, 7), abs=1e-4)
