"""A task small enough to be learnt by a tiny backbone."""

import itertools
from collections.abc import Iterator

import pytest

from tuning.demo.data import Dataset, Example, Method, TaskSpec, build_dataset


def vowel_examples() -> Iterator[Example]:
    for letters in itertools.product("abcde", "xyz", "uvw"):
        yield Example("".join(letters), "v" if letters[0] in "ae" else "c")


def make_spec(method: Method = "prompt_tuning", **changes: object) -> TaskSpec:
    fields: dict[str, object] = {
        "name": "vowel",
        "description": "Whether a word starts with a vowel",
        "template": "{input} ->",
        "instruction": "v or c?",
        "method": method,
        "k": 6,
        "init": "vocab" if method == "prompt_tuning" else "text",
        "examples": vowel_examples,
        "labels": ("v", "c"),
        "num_steps": 30,
    }
    return TaskSpec(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.fixture
def dataset() -> Dataset:
    return build_dataset(make_spec(), seed=0)
