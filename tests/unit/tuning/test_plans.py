"""A folder of files becomes one plan a task, and plans that cannot be are refused with task and field."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.factories import make_tokenizer
from tuning.config import TrainConfig
from tuning.examples import DataError
from tuning.plans import PlanError, TaskPlan, check_names, plan_folder, prepare_task
from tuning.splits import DataFiles


def write(path: Path, *values: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def labelled(count: int) -> list[dict[str, str]]:
    return [{"text": f"t{n}", "label": "ab"[n % 2]} for n in range(count)]


def defaults(folder: Path, **config: Any) -> TaskPlan:
    fields: dict[str, Any] = {"num_steps": 10, "learning_rate": 0.5, "init": "vocab"} | config
    return TaskPlan(name="defaults", files=DataFiles(train=folder), config=TrainConfig(**fields))


def plan(path: Path, **config: Any) -> TaskPlan:
    fields: dict[str, Any] = {"num_steps": 10} | config
    return TaskPlan(name="task", files=DataFiles(train=path), config=TrainConfig(**fields))


def test_each_file_of_a_folder_is_a_task_with_its_own_file_of_options(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.test.jsonl", "b.jsonl", "b.validation.jsonl", "c.d.jsonl"):
        write(tmp_path / name)
    (tmp_path / "b.toml").write_text('num_steps = 99\ntemplate = "{text}!"\ntest_share = 0.25\n')

    a, b, c = plan_folder(tmp_path, defaults(tmp_path))

    assert [one.name for one in (a, b, c)] == ["a", "b", "c.d"]
    assert a.files == DataFiles(train=tmp_path / "a.jsonl", test=tmp_path / "a.test.jsonl")
    validation = tmp_path / "b.validation.jsonl"
    assert b.files == DataFiles(train=tmp_path / "b.jsonl", validation=validation, test_share=0.25)
    assert (a.config.num_steps, a.template) == (10, "{text}")
    assert (b.config.num_steps, b.config.learning_rate, b.template) == (99, 0.5, "{text}!")
    assert c.config == a.config


def test_task_of_another_method_has_that_methods_usual_values(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl")
    (tmp_path / "a.toml").write_text('method = "prefix_tuning"\nseed = 3\n')
    (a,) = plan_folder(tmp_path, defaults(tmp_path))
    assert (a.config.method, a.config.seed, a.config.num_steps) == ("prefix_tuning", 3, 10)
    assert (a.config.init, a.config.learning_rate) == (None, None)


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("num_steps = 0", "a.toml: num_steps: input should be greater than or equal to 1"),
        ("epochs = 3", "a.toml: epochs: is not known"),
        ("test_share = 0.9", "a.toml: test_share: must be at least 0 and below 0.5"),
        ('test_share = "x"', "a.toml: test_share: must be a number"),
        ("template = 3", "a.toml: template: must be a text"),
        ('template = "none"', "template: the template must hold {text} exactly once"),
        ("num_steps = ", "a.toml is not valid TOML"),
    ],
)
def test_wrong_file_of_options_is_refused_by_name(tmp_path: Path, toml: str, message: str) -> None:
    write(tmp_path / "a.jsonl")
    (tmp_path / "a.toml").write_text(toml)
    with pytest.raises(PlanError) as caught:
        plan_folder(tmp_path, defaults(tmp_path))
    assert message in str(caught.value)


def test_file_that_belongs_to_no_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"holds no \.jsonl file"):
        plan_folder(tmp_path, defaults(tmp_path))
    write(tmp_path / "a.jsonl")
    for name in ("b.toml", "b.test.jsonl"):
        stray = tmp_path / name
        stray.touch()
        with pytest.raises(PlanError, match=rf"{name} belongs to no task"):
            plan_folder(tmp_path, defaults(tmp_path))
        stray.unlink()
    with pytest.raises(PlanError, match="is not a folder"):
        plan_folder(tmp_path / "nowhere", defaults(tmp_path))


@pytest.mark.parametrize("name", ["", "Upper", "a/b", "../x", "a..b", "x" * 64])
def test_name_that_a_server_would_not_take_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(PlanError, match="is not a task's name"):
        TaskPlan(name=name, files=DataFiles(train=tmp_path), config=TrainConfig(num_steps=1))


def test_two_tasks_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="2 tasks called defaults"):
        check_names([defaults(tmp_path)] * 2)


def test_prepared_task_has_its_labels_tokens_and_held_out_examples(tmp_path: Path) -> None:
    prepared = prepare_task(plan(write(tmp_path / "d.jsonl", *labelled(40))), make_tokenizer())
    tokenizer = make_tokenizer()
    assert prepared.data.labels == ("a", "b")
    assert [list(ids) for ids in prepared.task.label_ids] == [tokenizer(f" {label}")["input_ids"] for label in "ab"]
    assert (len(prepared.task.train), len(prepared.task.validation), len(prepared.held_out)) == (32, 4, 4)
    assert prepared.held_out_part == "test"
    assert len(prepared.held_out_encoded) == 4


def test_without_test_examples_those_that_validate_are_measured_on(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", *labelled(40))
    files = DataFiles(train=path, test_share=0)
    prepared = prepare_task(TaskPlan(name="t", files=files, config=TrainConfig(num_steps=1)), make_tokenizer())
    assert prepared.held_out_part == "validation"
    assert prepared.held_out == prepared.data.validation


def test_configuration_that_does_not_suit_the_data_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", *({"prompt": f"p{n}", "completion": "c"} for n in range(20)))
    with pytest.raises(PlanError, match="task: init: 'labels' needs examples with labels"):
        prepare_task(plan(path, init="labels"), make_tokenizer())
    with pytest.raises(PlanError, match="task: num_virtual_tokens: 30 leave no room for a text"):
        prepare_task(plan(path, num_virtual_tokens=30), make_tokenizer(), max_tokens=31)
    with pytest.raises(DataError, match=r"d\.jsonl:11: has 5 tokens, the backbone takes 4 beside"):
        prepare_task(plan(path, num_virtual_tokens=6), make_tokenizer(), max_tokens=10)
    no_validation = DataFiles(train=path, validation_share=0)
    config = TrainConfig(num_steps=10, patience=2)
    with pytest.raises(PlanError, match="task: patience: needs validation examples"):
        prepare_task(TaskPlan(name="task", files=no_validation, config=config), make_tokenizer())


def test_what_has_no_effect_and_what_was_cut_is_noted(tmp_path: Path) -> None:
    rows = [{"prompt": "p" * n, "completion": "c"} for n in range(1, 13)]
    one = replace(plan(write(tmp_path / "task.jsonl", *rows), num_virtual_tokens=4), template="{text} ->")
    notes = prepare_task(one, make_tokenizer(), max_tokens=15, truncates=True).notes
    assert notes == (
        'the template is not used: it is for {"text", "label"} lines, of which there are none',
        "3 of 12 examples were too long; their prompts lost the beginning",
    )
    assert prepare_task(replace(one, template="{text}"), make_tokenizer()).notes == ()
    untested = replace(one, template="{text}", files=replace(one.files, test_share=0.0))
    (note,) = prepare_task(untested, make_tokenizer()).notes
    assert note.startswith("no test examples: figures are of the validation examples")
