"""Many prompts at once are each what they would be alone, and what PEFT's usual loop makes of them."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from tests.factories import make_tokenizer
from tuning.examples import EncodedExample
from tuning.forward import PackedPass
from tuning.methods import PromptBuilder
from tuning.methods.p_tuning import PTuning
from tuning.optimizers import DataOrder, learning_rate_at
from tuning.records import TrainedPrompt, TrainEvent, TrainTask, TrainTaskError
from tuning.trainer import Trainer

from .tiny import load_tiny, make_run, make_task

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

TASKS = (
    make_task("vectors", num_steps=8, learning_rate=0.05),
    make_task("deep", "p_tuning_v2", num_steps=5, batch_size=3, data_seed=1, num_virtual_tokens=6),
    make_task("encoder", "p_tuning", num_steps=6, data_seed=2, num_validation=5, eval_every=2, num_virtual_tokens=3),
    make_task("mlp", "prefix_tuning", num_steps=7, data_seed=3, schedule="cosine"),
    make_task("text", "cartridge", num_steps=6, data_seed=4, num_validation=4),
    make_task("adafactor", optimizer="adafactor", num_steps=6, data_seed=5, weight_decay=0.01, init="random"),
)


@pytest.fixture
def model(tmp_path: Path) -> PreTrainedModel:
    return load_tiny("llama", tmp_path)


def train(
    model: PreTrainedModel, tasks: Sequence[TrainTask], folder: Path, **run: Any
) -> tuple[dict[str, TrainedPrompt], list[TrainEvent]]:
    events: list[TrainEvent] = []
    trainer = Trainer(model, make_tokenizer(), tasks, run=make_run(**run), folder=folder, listener=events.append)
    return trainer.run(), events


def tensor_of(prompt: TrainedPrompt) -> torch.Tensor:
    return load_file(prompt.folder / "adapter_model.safetensors")["prompt_embeddings"]


def assert_same(found: TrainedPrompt, expected: TrainedPrompt) -> None:
    assert [point.step for point in found.history] == [point.step for point in expected.history]
    for one, other in zip(found.history, expected.history, strict=True):
        assert one.loss == pytest.approx(other.loss, abs=2e-4)
        assert one.validation_loss == (
            None if other.validation_loss is None else pytest.approx(other.validation_loss, abs=2e-4)
        )
    torch.testing.assert_close(tensor_of(found), tensor_of(expected), atol=2e-3, rtol=1e-2)
    assert (found.best_step, found.num_steps, found.num_examples) == (
        expected.best_step,
        expected.num_steps,
        expected.num_examples,
    )


@pytest.mark.parametrize(
    "run",
    [
        {},
        {"max_tasks_at_once": 2},
        {"max_tokens_per_pass": 40},
        {"max_tokens_per_pass": 1, "activation_checkpointing": True},
    ],
)
def test_together_is_alone(model: PreTrainedModel, tmp_path: Path, run: dict[str, Any]) -> None:
    together, _ = train(model, TASKS, tmp_path / "together", **run)
    assert {*together} == {task.name for task in TASKS}
    for task in TASKS:
        alone, _ = train(model, [task], tmp_path / f"alone-{task.name}")
        assert_same(together[task.name], alone[task.name])


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_v2"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_losses_are_those_of_pefts_usual_loop(tmp_path: Path, family: str, method: Any) -> None:
    model = load_tiny(family, tmp_path)
    task = make_task("task", method, num_steps=8, learning_rate=0.02, max_grad_norm=0.5, num_warmup_steps=2)
    start = PromptBuilder(PackedPass(model), make_tokenizer()).build(task).tensors()["prompt_embeddings"]
    expected, final = usual_loop(copy.deepcopy(model), task, start)
    result = train(model, [task], tmp_path / "run")[0]["task"]
    assert [point.loss for point in result.history] == pytest.approx(expected, abs=2e-4)
    torch.testing.assert_close(tensor_of(result), final, atol=1e-3, rtol=1e-2)
    assert not torch.allclose(final, start, atol=0.05)


def usual_loop(base: PreTrainedModel, task: TrainTask, start: torch.Tensor) -> tuple[list[float], torch.Tensor]:
    """PEFT's model, right-padded batches, all logits, AdamW: losses before each update, and the final prompt."""
    kind: Any = peft.PromptTuningConfig if task.config.method == "prompt_tuning" else peft.PrefixTuningConfig
    model: Any = peft.get_peft_model(base, kind(task_type="CAUSAL_LM", num_virtual_tokens=len(start)))
    encoder = model.prompt_encoder["default"]
    with torch.no_grad():
        encoder.embedding.weight.copy_(start)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1.0, weight_decay=task.config.weight_decay)
    order, losses = DataOrder(len(task.train), task.config.batch_size, task.config.seed), []
    for step, places in enumerate(order.batches(task.config.num_steps)):
        loss = padded_loss(model, [task.train[place] for place in places])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, task.config.max_grad_norm)
        optimizer.param_groups[0]["lr"] = learning_rate_at(task.config, step)
        optimizer.step()
        losses.append(loss.item())
    return losses, encoder.embedding.weight.detach()


def padded_loss(model: Any, batch: Sequence[EncodedExample]) -> torch.Tensor:
    length = max(example.num_tokens for example in batch)
    ids, labels = torch.zeros((len(batch), length), dtype=torch.long), torch.full((len(batch), length), -100)
    mask = torch.zeros_like(ids)
    for row, example in enumerate(batch):
        end = example.num_tokens
        ids[row, :end] = torch.tensor([*example.prompt_ids, *example.completion_ids])
        labels[row, len(example.prompt_ids) : end] = torch.tensor(example.completion_ids)
        mask[row, :end] = 1
    loss: torch.Tensor = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    return loss


def test_finished_tasks_leave_and_waiting_ones_join(model: PreTrainedModel, tmp_path: Path) -> None:
    tasks = [make_task(f"t{number}", num_steps=steps) for number, steps in enumerate((2, 5, 3, 1))]
    running: set[str] = set()
    most, order = 0, []
    for event in train(model, tasks, tmp_path, max_tasks_at_once=2)[1]:
        if event.kind == "started":
            running.add(event.task)
        elif event.kind == "finished":
            running.remove(event.task)
            order.append(event.task)
        most = max(most, len(running))
    assert most == 2
    assert order == ["t0", "t1", "t2", "t3"]


def test_each_step_is_told(model: PreTrainedModel, tmp_path: Path) -> None:
    results, events = train(model, [make_task("a", num_steps=3, num_validation=4, eval_every=2)], tmp_path)
    assert [(event.kind, event.step) for event in events] == [
        ("started", 0), ("step", 1), ("step", 2), ("evaluated", 2), ("step", 3), ("evaluated", 3), ("finished", 3),
    ]  # fmt: skip
    assert [event.loss for event in events if event.kind == "step"] == [p.loss for p in results["a"].history]
    assert {event.num_examples for event in events if event.kind == "step"} == {5}
    assert results["a"].num_examples == 15


def test_a_task_whose_numbers_are_not_finite_ends_alone(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = iter(range(100))
    right = PTuning.forward
    monkeypatch.setattr(PTuning, "forward", lambda self: right(self) * (float("nan") if next(steps) >= 3 else 1.0))
    tasks = [TASKS[0], make_task("bad", "p_tuning", num_steps=8), TASKS[1]]
    trainer = Trainer(model, make_tokenizer(), tasks, run=make_run(), folder=tmp_path / "together")
    trainer.run()
    assert {*trainer.results} == {"vectors", "deep"}
    failure = trainer.failures["bad"]
    assert (failure.step, failure.reason[:40]) == (3, "the loss of step 4 is not a finite numbe")
    assert not (tmp_path / "together" / "bad").exists()
    for task in (TASKS[0], TASKS[1]):
        assert_same(trainer.results[task.name], train(model, [task], tmp_path / task.name)[0][task.name])


def test_the_best_checkpoint_is_kept(model: PreTrainedModel, tmp_path: Path) -> None:
    # So fast that it gets worse.
    task = make_task("a", num_steps=12, num_validation=8, eval_every=1, learning_rate=2.0, num_warmup_steps=0)
    result = train(model, [task], tmp_path)[0]["a"]
    losses = [point.validation_loss for point in result.history if point.validation_loss is not None]
    assert result.best_loss == min(losses)
    assert result.best_step == 1 + losses.index(min(losses)) < 12
    prompt = PromptBuilder(PackedPass(model), make_tokenizer()).build(task)
    again = make_task("a", num_steps=1, num_validation=8)
    assert again.validation == task.validation
    assert validation_loss(model, prompt.values(tensor_of(result), torch.float32), task) == pytest.approx(
        result.best_loss, abs=1e-5
    )


def validation_loss(model: PreTrainedModel, values: Any, task: TrainTask) -> float:
    """By the stock model, one example at a time."""
    stock: Any = model
    total = count = 0.0
    for example in task.validation:
        ids = torch.tensor([*example.prompt_ids, *example.completion_ids[:-1]])
        embeds = torch.cat([values, model.get_input_embeddings()(ids)]).unsqueeze(0)
        with torch.no_grad():
            logits = stock(inputs_embeds=embeds).logits[0, -len(example.completion_ids) :]
        targets = torch.tensor(example.completion_ids)
        total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        count += len(example.completion_ids)
    return total / count


def test_training_stops_early_when_validation_no_longer_improves(model: PreTrainedModel, tmp_path: Path) -> None:
    task = make_task("a", num_steps=50, num_validation=8, eval_every=2, patience=3, learning_rate=2.0)
    result = train(model, [task], tmp_path)[0]["a"]
    assert result.stopped_early
    assert result.num_steps == result.best_step + 6 < 50


def test_small_improvements_do_not_count(model: PreTrainedModel, tmp_path: Path) -> None:
    task = make_task("a", num_steps=50, num_validation=8, eval_every=1, patience=2, min_delta=100.0)
    result = train(model, [task], tmp_path)[0]["a"]
    # The first evaluation is better than none, and no later one is by so much.
    assert (result.num_steps, result.stopped_early) == (3, True)


def test_a_cancelled_task_ends_without_a_result(model: PreTrainedModel, tmp_path: Path) -> None:
    events: list[TrainEvent] = []
    tasks = [make_task("a"), make_task("b"), make_task("c")]
    trainer = Trainer(
        model, make_tokenizer(), tasks, run=make_run(max_tasks_at_once=2), folder=tmp_path, listener=events.append
    )
    assert trainer.step()
    trainer.cancel("a")
    trainer.cancel("c")
    trainer.cancel("unknown")
    assert {*trainer.run()} == {"b"}
    assert [(event.task, event.step) for event in events if event.kind == "cancelled"] == [("a", 1), ("c", 0)]
    assert not (tmp_path / "a").exists()


def test_a_task_may_join_a_running_trainer(model: PreTrainedModel, tmp_path: Path) -> None:
    trainer = Trainer(model, make_tokenizer(), [TASKS[0]], run=make_run(), folder=tmp_path / "run")
    trainer.step()
    trainer.add(TASKS[1])
    with pytest.raises(TrainTaskError, match="vectors: name: another task"):
        trainer.add(TASKS[0])
    results = trainer.run()
    for task in TASKS[:2]:
        assert_same(results[task.name], train(model, [task], tmp_path / task.name)[0][task.name])


def test_a_step_that_a_boundary_gives_up_changes_nothing(model: PreTrainedModel, tmp_path: Path) -> None:
    expected, _ = train(model, TASKS[:3], tmp_path / "expected", max_tokens_per_pass=60)
    calls, limit, num_given_up = iter(range(10**9)), 10**9, 0

    def boundary() -> None:
        if next(calls) >= limit:
            raise InterruptedError

    run = make_run(max_tokens_per_pass=60)
    trainer = Trainer(model, make_tokenizer(), TASKS[:3], run=run, folder=tmp_path / "run", boundary=boundary)
    is_going, limit = True, 4
    while is_going:
        calls = iter(range(10**9))
        try:
            is_going = trainer.step()
            limit = 4
        except InterruptedError:
            num_given_up, limit = num_given_up + 1, limit + 9
    assert num_given_up > 10
    for name, prompt in trainer.results.items():
        assert prompt.history == expected[name].history
        assert torch.equal(tensor_of(prompt), tensor_of(expected[name]))


def test_training_works_on_a_thread_that_serves_without_gradients(model: PreTrainedModel, tmp_path: Path) -> None:
    with torch.inference_mode():
        results, _ = train(model, TASKS[:2], tmp_path / "served")
    for task in TASKS[:2]:
        assert results[task.name].history == train(model, TASKS[:2], tmp_path / task.name)[0][task.name].history


def test_the_backbone_does_not_move(model: PreTrainedModel, tmp_path: Path) -> None:
    before = copy.deepcopy(model.state_dict())
    train(model, TASKS, tmp_path)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in model.parameters())
