"""Which cells there are, in which order, and what makes two of them the same."""

import dataclasses
from typing import Any

import pytest

from benchmarks.tuning.cells import (
    FULL,
    FULL_TASKS,
    LATENCY,
    LORA,
    METHODS,
    SWEEP,
    Cell,
    K,
    Recipe,
    fingerprint,
    plan,
    select,
)

TASKS = ["word-sentiment", "number-words", "past-tense"]
LABELS = {"word-sentiment": ("positive", "negative")}


def print_of(cell: Cell, recipe: Recipe, data: str = "d") -> str:
    return fingerprint(cell, recipe, data_digest=data, backbone_digest="b", dtype="float32")


def test_every_method_is_planned_and_no_cell_twice() -> None:
    cells = plan(TASKS, [0, 1, 2], LABELS)

    assert {cell.method for cell in cells} == set(METHODS)
    assert len({cell.key for cell in cells}) == len(cells)
    assert len({cell.slug for cell in cells}) == len(cells)


def test_first_seed_comes_before_the_others_then_the_sweep_then_full_fine_tuning() -> None:
    cells = plan(TASKS, [0, 1, 2], LABELS)
    rounds = [0 if cell.seed in (0, None) and cell.k in (K, None) and cell.method != FULL else 1 for cell in cells]
    rounds = [0 if cell.method == LATENCY else number for cell, number in zip(cells, rounds, strict=True)]
    assert rounds == sorted(rounds)
    sweep = [index for index, cell in enumerate(cells) if cell.k in SWEEP and cell.method != LATENCY]
    full = [index for index, cell in enumerate(cells) if cell.method == FULL]
    assert max(sweep) < min(full)
    assert {cell.task for cell in cells if cell.method == FULL} == set(TASKS) & set(FULL_TASKS)


def test_prompts_have_three_beginnings_labels_only_where_there_are_some() -> None:
    found = {
        task: {cell.init for cell in plan(TASKS, [0], LABELS) if cell.method == "prompt_tuning" and cell.task == task}
        for task in TASKS
    }
    assert found["word-sentiment"] == {"vocab", "random", "labels"}
    assert found["past-tense"] == {"vocab", "random", "text"}


def test_texts_without_anything_drawn_have_one_run() -> None:
    cells = plan(TASKS, [0, 1, 2], LABELS)
    assert sum(cell.method == "instruction-plain" for cell in cells) == len(TASKS)
    assert sum(cell.method == "few-shot-plain" for cell in cells) == 3 * len(TASKS)


def test_select_keeps_the_order() -> None:
    cells = plan(TASKS, [0], LABELS)
    assert [cell.method for cell in select(cells, [LORA])] == [LORA] * 3
    assert list(select(cells, [])) == cells


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Cell)])
def test_another_cell_has_another_fingerprint(field: str) -> None:
    cell = Cell(task="a", method=LORA, init="x", k=1, seed=0, form="f")
    changed: dict[str, Any] = {field: "b" if isinstance(getattr(cell, field), str) else 9}
    other = dataclasses.replace(cell, **changed)
    assert print_of(cell, Recipe()) != print_of(other, Recipe())
    assert cell.key != other.key


def test_recipe_counts_for_the_cells_that_it_decides() -> None:
    usual, other = Recipe(), Recipe(lora_learning_rate=1.0)
    lora, prompt = (
        Cell(task="a", method=LORA, seed=0),
        Cell(task="a", method="prompt_tuning", init="vocab", k=K, seed=0),
    )

    assert print_of(lora, usual) != print_of(lora, other)
    assert print_of(prompt, usual) == print_of(prompt, other)
    for cell in (lora, prompt, Cell(task="a", method=FULL, seed=0)):
        assert print_of(cell, usual) != print_of(cell, Recipe(num_steps=3))
    assert print_of(prompt, usual) != print_of(prompt, usual, data="other")
