"""The tasks of the comparison and their fixed splits, as JSON-lines files that the trainer's own readers read.

Owns the split: one seed for all runs, so that every method and every training seed sees the same items. The items
are those of the demo tasks; the demo's held-out items come first among the test items here, so that no prompt that is
trained here has seen them.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from tuning.demo.data import Example, TaskSpec, build_dataset
from tuning.demo.tasks import TASKS as SPECS
from tuning.examples import ChatTemplate, TaskData, read_examples
from tuning.plans import SUFFIX, TEST_SUFFIX, VALIDATION_SUFFIX
from tuning.splits import DataFiles, load_task

SPLIT_SEED = 0
MAX_TEST, TEST_SHARE = 200, 0.25
MAX_VALIDATION, VALIDATION_SHARE = 64, 0.1

ALL_TASKS = tuple(sorted(SPECS))
DEFAULT_TASKS = (
    "word-sentiment",
    "number-words",
    "language-id",
    "past-tense",
    "country-continent",
    "country-capital",
)
"""Three of classification (2, 12 and 7 labels), two of form, and one of knowledge."""


def spec_of(task: str) -> TaskSpec:
    """Raises KeyError for a task that does not exist."""
    return SPECS[task]


def input_of(spec: TaskSpec, prompt: str) -> str:
    """The bare input of an item's prompt, for texts that put it into other words."""
    before, _, after = spec.template.partition("{input}")
    return prompt.removeprefix(before).removesuffix(after)


def write_tasks(folder: Path, tasks: Sequence[str]) -> None:
    """Write each split's file as `promptmux train --tasks FOLDER` reads them, the same bytes every time as long as the
    data packages have the same versions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        spec = spec_of(task)
        for path, examples in zip(_paths(folder, task), _split(spec), strict=True):
            lines = [json.dumps(_line(spec, example), ensure_ascii=False) + "\n" for example in examples]
            path.write_text("".join(lines), encoding="utf-8")


def read_task(folder: Path, task: str, tokenizer: ChatTemplate) -> TaskData:
    """The splits that `write_tasks` wrote. Raises `tuning.examples.DataError`."""
    train, validation, test = _paths(folder, task)
    files = DataFiles(train=train, validation=validation, test=test)
    return load_task(
        task, files, lambda path: read_examples(path, tokenizer=tokenizer, name=path.name), seed=SPLIT_SEED
    ).data


def _paths(folder: Path, task: str) -> tuple[Path, Path, Path]:
    """Of training, validation and test items."""
    return folder / f"{task}{SUFFIX}", folder / f"{task}{VALIDATION_SUFFIX}", folder / f"{task}{TEST_SUFFIX}"


def _split(spec: TaskSpec) -> tuple[Sequence[Example], Sequence[Example], Sequence[Example]]:
    dataset = build_dataset(spec, seed=SPLIT_SEED)
    items = (*dataset.heldout, *dataset.train)
    num_test = max(len(dataset.heldout), min(MAX_TEST, round(len(items) * TEST_SHARE)))
    num_validation = min(MAX_VALIDATION, round(len(items) * VALIDATION_SHARE))
    rest = items[num_test:]
    return rest[num_validation:], rest[:num_validation], items[:num_test]


def _line(spec: TaskSpec, example: Example) -> dict[str, str]:
    if spec.labels is not None:
        return {"text": spec.prompt_text(example), "label": example.target}
    return {"prompt": spec.prompt_text(example), "completion": spec.completion_text(example)}
