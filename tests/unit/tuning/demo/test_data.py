"""Splits are disjoint and reproducible, and bad specifications are refused."""

import subprocess
import sys
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuning.demo.data import MAX_HELDOUT, Example, TaskDataError, TaskSpec, build_dataset
from tuning.demo.tasks import TASKS

from .conftest import make_spec


def inputs(examples: Iterable[Example]) -> set[str]:
    return {example.input.strip().casefold() for example in examples}


@pytest.mark.parametrize("spec", TASKS.values(), ids=TASKS.keys())
def test_no_heldout_or_shown_input_is_trained_on(spec: TaskSpec) -> None:
    dataset = build_dataset(spec, seed=0)
    parts = [inputs(dataset.train), inputs(dataset.heldout), inputs(dataset.showcase)]
    assert len(set().union(*parts)) == sum(map(len, parts))
    assert tuple(example.input for example in dataset.showcase) == spec.showcase
    assert 50 <= len(dataset.heldout) <= MAX_HELDOUT
    assert len(dataset.train) >= 150


def test_items_are_the_same_in_another_process_with_another_hash_seed() -> None:
    script = (
        "from tuning.demo.data import build_dataset\nfrom tuning.demo.tasks import TASKS\n"
        "print([build_dataset(s, seed=0).digest for s in TASKS.values()])"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", script], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert digests == {str([build_dataset(spec, seed=0).digest for spec in TASKS.values()]) + "\n"}


def test_another_seed_gives_another_split_of_the_same_items() -> None:
    one, other = (build_dataset(TASKS["plural"], seed=seed) for seed in (0, 1))
    assert one.heldout != other.heldout
    assert one.digest != other.digest
    assert {*one.train, *one.heldout} == {*other.train, *other.heldout}


@pytest.mark.parametrize(
    ("task", "text", "target"),
    [
        ("country-capital", "France", "Paris"),
        ("country-continent", "Kenya", "Africa"),
        ("country-german", "Hungary", "Ungarn"),
        ("number-words", "77", "seventy-seven"),
        ("word-sentiment", "terrible", "negative"),
        ("plural", "mouse", "mice"),
        ("past-tense", "teach", "taught"),
        ("iso-date", "May 7, 1987", "1987-05-07"),
        ("language-id", "miércoles", "Spanish"),
        ("roman-numerals", "1987", "MCMLXXXVII"),
    ],
)
def test_answers_are_right(task: str, text: str, target: str) -> None:
    assert target in [example.target for example in TASKS[task].examples() if example.input == text]


def test_roman_numerals_read_back_as_their_number() -> None:
    values = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100, "D": 500, "M": 1000}
    for example in TASKS["roman-numerals"].examples():
        digits = [values[letter] for letter in example.target]
        # A smaller digit before a larger one is subtracted.
        read = sum(-d if d < max(digits[i:]) else d for i, d in enumerate(digits))
        assert read == int(example.input)


def test_input_with_two_different_answers_is_dropped_and_with_the_same_one_counted_once() -> None:
    def examples() -> list[Example]:
        pairs = [(f"w{i}", "v") for i in range(20)] + [("Both", "v"), ("both ", "c"), ("both", "v"), ("W3", "v")]
        return [Example(*pair) for pair in pairs]

    dataset = build_dataset(make_spec(examples=examples), seed=0)
    assert inputs(dataset.train) | inputs(dataset.heldout) == {f"w{i}" for i in range(20)}
    assert len(dataset.train) + len(dataset.heldout) == 20


@given(st.sets(st.text("abcXYZ ", min_size=1).filter(str.strip), min_size=30), st.integers(0, 5))
def test_any_items_are_split_without_overlap_or_loss(texts: set[str], seed: int) -> None:
    spec = make_spec(examples=lambda: [Example(text, "v") for text in sorted(texts)])
    dataset = build_dataset(spec, seed=seed) if len({t.strip().casefold() for t in texts}) >= 8 else None
    if dataset is not None:
        assert not inputs(dataset.train) & inputs(dataset.heldout)
        assert inputs(dataset.train) | inputs(dataset.heldout) == {t.strip().casefold() for t in texts}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_spec(name="Upper"), "name must match"),
        (lambda: make_spec(name="a/b"), "name must match"),
        (lambda: make_spec(name="vowel\n"), "name must match"),
        (lambda: make_spec(template="no hole"), "template must hold {input} exactly once"),
        (lambda: make_spec(k=0), "k must be at least 1"),
    ],
)
def test_wrong_specification_is_refused_with_its_field(make: Callable[[], TaskSpec], message: str) -> None:
    with pytest.raises(TaskDataError, match=message):
        make()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": ("v",)}, "labels do not hold the answer 'c'"),
        ({"showcase": ("nowhere",)}, "showcase: 'nowhere'"),
        ({"examples": lambda: [Example("a", "v")]}, "only 1 usable items"),
        ({"examples": lambda: [Example(" ", "v")]}, "empty input"),
    ],
)
def test_unusable_items_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(TaskDataError, match=message):
        build_dataset(make_spec(**changes), seed=0)
