"""The queue on a tiny backbone: nothing is made twice, what was interrupted goes on, a cell is the same each time."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.tuning.cells import FULL, LATENCY, LORA, Cell, K, Recipe
from benchmarks.tuning.latency import LatencyRun, measure
from benchmarks.tuning.ledger import Ledger, Record, read_ledger
from benchmarks.tuning.options import DeadlineReached, Options
from benchmarks.tuning.prompts import _Progress
from benchmarks.tuning.queue import Outcome, run_queue
from server.engine.backbone import Backbone
from tuning.records import TrainEvent

TASK = "country-continent"
PROMPTS = [
    Cell(task=TASK, method="prompt_tuning", init="labels", k=3, seed=0),
    Cell(task=TASK, method="prompt_tuning", init="random", k=2, seed=1),
    Cell(task=TASK, method="p_tuning_v2", k=3, seed=0),
]
TEXTS = [Cell(task=TASK, method="none"), Cell(task=TASK, method="few-shot-chat", seed=0)]
WEIGHTS = [Cell(task=TASK, method=LORA, seed=0), Cell(task=TASK, method=FULL, seed=0)]


@pytest.fixture
def options(chat_backbone_folder: Path, tmp_path: Path) -> Options:
    return Options(
        backbone=str(chat_backbone_folder),
        dtype=torch.float32,
        num_threads=1,
        folder=tmp_path / "work",
        ledger=tmp_path / "cells.jsonl",
        recipe=Recipe(num_steps=4, batch_size=2, eval_every=2, num_shots=2, num_warmup_steps=1),
        checkpoint_every=100,
    )


def figures(path: Path) -> dict[str, object]:
    """What must be the same each time, by key."""
    return {record.key: _figures(record) for record in read_ledger(path)}


def _figures(record: Record) -> object:
    training = record.training
    return record.scores, None if training is None else (training.best_loss, training.best_step)


def stop_after(monkeypatch: pytest.MonkeyPatch, num_looks: int) -> None:
    """The deadline is reached when it is looked at once more than so often."""
    looks = itertools.count(1)

    def check(self: Options) -> None:
        if next(looks) > num_looks:
            raise DeadlineReached

    monkeypatch.setattr(Options, "check_deadline", check)


def test_every_kind_of_cell_is_made_once_and_the_same_again_elsewhere(options: Options, tmp_path: Path) -> None:
    cells = [*TEXTS, *PROMPTS, *WEIGHTS]
    assert run_queue(cells, options) == Outcome(num_made=7, num_left=0)
    before = options.ledger.read_bytes()

    assert run_queue(cells, options) == Outcome(num_made=0, num_left=0)
    assert options.ledger.read_bytes() == before

    again = replace(options, folder=tmp_path / "other", ledger=tmp_path / "other.jsonl")
    run_queue(cells, again)
    assert figures(again.ledger) == figures(options.ledger)
    assert not any(options.runs_folder.iterdir())


def test_records_say_what_was_trained_together(options: Options) -> None:
    run_queue([*PROMPTS, *WEIGHTS], options)
    records = {record.cell: record for record in read_ledger(options.ledger)}

    first, second, third = (records[cell] for cell in PROMPTS)
    assert first.group is not None
    assert first.group.keys == (PROMPTS[0].key, PROMPTS[1].key)
    assert first.group == second.group
    assert third.group is not None
    assert third.group.keys == (PROMPTS[2].key,)
    assert first.training is not None
    assert (first.training.num_parameters, first.training.num_examples) == (3 * 32, 8)
    full = records[WEIGHTS[1]].training
    assert full is not None
    assert full.num_parameters > 10_000
    for cell in PROMPTS:
        (folder,) = options.prompts_folder.glob(f"{cell.slug}-*")
        assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps that the first prompt takes, as they are taken."""
    taken: list[int] = []
    show = _Progress.__call__

    def listen(self: _Progress, event: TrainEvent) -> None:
        if event.kind == "step" and event.task == PROMPTS[0].slug:
            taken.append(event.step)
        show(self, event)

    monkeypatch.setattr(_Progress, "__call__", listen)
    return taken


def test_group_that_a_deadline_cut_off_goes_on_and_ends_as_if_it_had_not_been(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[int]
) -> None:
    whole = replace(options, folder=tmp_path / "whole", ledger=tmp_path / "whole.jsonl")
    run_queue(PROMPTS, whole)
    steps.clear()

    with monkeypatch.context() as patch:
        # One look before the group, two after steps of it; the fourth is after its third step.
        stop_after(patch, 3)
        assert run_queue(PROMPTS, options) == Outcome(num_made=0, num_left=3)
    (left,) = options.runs_folder.iterdir()

    assert run_queue(PROMPTS, options) == Outcome(num_made=3, num_left=0)
    assert steps == [1, 2, 3, 4], "a step was taken twice, or left out"
    assert figures(options.ledger) == figures(whole.ledger)
    assert not left.exists()


def test_group_that_was_killed_among_its_records_is_not_trained_again(
    options: Options, monkeypatch: pytest.MonkeyPatch, steps: list[int]
) -> None:
    append = Ledger.append

    def append_once(self: Ledger, record: Record) -> None:
        if read_ledger(options.ledger):
            raise KeyboardInterrupt
        append(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "append", append_once)
        with pytest.raises(KeyboardInterrupt):
            run_queue(PROMPTS[:2], options)

    assert run_queue(PROMPTS[:2], options) == Outcome(num_made=1, num_left=0)
    assert [record.cell for record in read_ledger(options.ledger)] == PROMPTS[:2]
    assert steps == [1, 2, 3, 4]


def test_deadline_that_is_over_makes_nothing(options: Options) -> None:
    assert run_queue(TEXTS, replace(options, deadline_s=0.0)) == Outcome(num_made=0, num_left=2)
    assert read_ledger(options.ledger) == []


def test_another_recipe_makes_the_cells_that_it_decides_again(options: Options) -> None:
    run_queue([*TEXTS, WEIGHTS[0]], options)
    other = replace(options, recipe=replace(options.recipe, lora_rank=2))
    assert run_queue([*TEXTS, WEIGHTS[0]], other) == Outcome(num_made=1, num_left=0)


def test_chats_are_left_out_where_there_is_no_template(options: Options, tiny_backbone_folder: object) -> None:
    assert callable(tiny_backbone_folder)
    bare = replace(options, backbone=str(tiny_backbone_folder("llama")))
    assert run_queue(TEXTS, bare) == Outcome(num_made=1, num_left=0)


def test_latency_is_of_items_behind_a_prompt_and_behind_nothing(chat_backbone_folder: Path) -> None:
    backbone = Backbone.load(str(chat_backbone_folder), dtype="float32")
    shared = list(range(4, 104)) * 2
    texts = [[*shared, 10 + index, 5] for index in range(6)]

    def run(k: int | None) -> LatencyRun:
        return LatencyRun(key="x", texts=texts, k=k, num_items=2, num_new_tokens=3)

    with_prompt, without = measure(backbone, run(K)), measure(backbone, run(None))

    for found in (with_prompt, without):
        assert 0 < found.first_token_ms <= found.whole_ms
        assert found.num_text_tokens == 202
        assert found.num_cached_tokens >= 176
        assert found.num_new_tokens == 3


def test_latency_cells_are_measured_in_a_process_of_the_engine(options: Options) -> None:
    recipe = replace(options.recipe, num_latency_items=2, num_latency_tokens=2)
    cells = [Cell(task=TASK, method=LATENCY, form="none"), Cell(task=TASK, method=LATENCY, form="prompt", k=2)]
    assert run_queue(cells, replace(options, recipe=recipe)) == Outcome(num_made=2, num_left=0)
    assert all(record.latency is not None for record in read_ledger(options.ledger))
