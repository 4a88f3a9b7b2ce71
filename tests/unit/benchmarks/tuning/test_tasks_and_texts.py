"""The splits are fixed and apart, and each form of text holds what it says."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.tuning.cells import TEXTS
from benchmarks.tuning.scoring import describe
from benchmarks.tuning.tasks import DEFAULT_TASKS, read_task, spec_of, write_tasks
from benchmarks.tuning.texts import in_form
from tuning.demo.data import build_dataset
from tuning.examples import Example, TaskData
from tuning.plans import TaskPlan, plan_folder
from tuning.splits import DataFiles

TASK = "country-continent"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("splits")
    write_tasks(folder, DEFAULT_TASKS)
    return folder


@pytest.fixture(scope="module")
def tokenizer(chat_backbone_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(chat_backbone_folder)


@pytest.fixture(scope="module")
def data(folder: Path, tokenizer: PreTrainedTokenizerBase) -> TaskData:
    return read_task(folder, TASK, tokenizer)


@pytest.mark.parametrize("task", DEFAULT_TASKS)
def test_splits_are_apart_and_whole(folder: Path, tokenizer: PreTrainedTokenizerBase, task: str) -> None:
    spec, data = spec_of(task), read_task(folder, task, tokenizer)
    parts = [{item.prompt for item in part} for part in (data.train, data.validation, data.test)]
    dataset = build_dataset(spec, seed=0)

    assert sum(map(len, parts)) == len(parts[0] | parts[1] | parts[2]) == len(dataset.train) + len(dataset.heldout)
    assert {spec.prompt_text(item) for item in dataset.heldout} <= parts[2]
    assert not {spec.prompt_text(item) for item in dataset.showcase} & (parts[0] | parts[1] | parts[2])
    assert len(parts[1]) >= 8
    assert bool(data.labels) == (spec.labels is not None)


def test_splits_are_the_same_every_time(folder: Path, tmp_path: Path) -> None:
    write_tasks(tmp_path, [TASK])
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes()


def test_folder_is_one_that_promptmux_train_reads(folder: Path) -> None:
    from tuning.config import make_train_config

    defaults = TaskPlan(
        name="x", files=DataFiles(train=Path("x")), config=make_train_config({"num_steps": 1})
    )  # fmt: skip
    assert [plan.name for plan in plan_folder(folder, defaults)] == sorted(DEFAULT_TASKS)


def test_majority_share_is_what_one_answer_scores(data: TaskData) -> None:
    answers = [item.completion for item in data.test]
    assert describe(data).majority_share == max(answers.count(answer) for answer in answers) / len(answers)


@pytest.mark.parametrize("form", TEXTS)
def test_a_form_changes_the_text_and_not_the_answer(
    form: str, data: TaskData, tokenizer: PreTrainedTokenizerBase
) -> None:
    items = texts_of(form, data, tokenizer, seed=0)

    assert [item.completion.strip() for item in items] == [item.completion.strip() for item in data.test]
    assert all(item.is_rendered == form.endswith("-chat") for item in items)
    instruction = spec_of(TASK).instruction
    if form == "none":
        assert items == list(data.test)
    elif form.endswith("-plain"):
        for item, own in zip(items, data.test, strict=True):
            assert item.prompt.startswith(f"{instruction}\n\n")
            assert item.prompt.endswith(own.prompt)
    else:
        for item, own in zip(items, data.test, strict=True):
            bare = own.prompt.removesuffix(" ->")
            assert item.prompt.endswith(f"user: {instruction}\n\n{bare}\nassistant: ")


def test_few_shot_texts_show_training_items_drawn_by_the_seed(
    data: TaskData, tokenizer: PreTrainedTokenizerBase
) -> None:
    one, again, other = (texts_of("few-shot-plain", data, tokenizer, seed=seed)[0].prompt for seed in (0, 0, 1))
    shown = one.split("\n")[2:-1]

    assert one == again
    assert one != other
    assert len(shown) == 3
    assert set(shown) <= {item.prompt + item.completion for item in data.train}


def texts_of(form: str, data: TaskData, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> list[Example]:
    return in_form(form, spec_of(TASK), data, tokenizer=tokenizer, num_shots=3, seed=seed)
