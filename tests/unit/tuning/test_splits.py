"""Splits depend on content and seed alone, hold nothing out that is trained on, and say what is odd."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuning.examples import DataError, Example
from tuning.splits import DataFiles, LoadedTask, data_digest, load_task

TRAIN, VALIDATION, TEST = Path("train"), Path("validation"), Path("test")


def load(
    train: Sequence[Example],
    validation: Sequence[Example] | None = None,
    test: Sequence[Example] | None = None,
    *,
    seed: int = 0,
    validation_share: float = 0.1,
    test_share: float = 0.1,
) -> LoadedTask:
    given = {TRAIN: train, VALIDATION: validation, TEST: test}
    files = DataFiles(
        train=TRAIN,
        validation=None if validation is None else VALIDATION,
        test=None if test is None else TEST,
        validation_share=validation_share,
        test_share=test_share,
    )
    return load_task("task", files, lambda path: given[path] or (), seed=seed)


def make(count: int, *, labels: Sequence[str | None] = (None,)) -> list[Example]:
    return [Example(f"p{n}", f" c{n}", label=labels[n % len(labels)], file="f", line=n + 1) for n in range(count)]


@given(st.sets(st.integers(0, 10_000), min_size=6, max_size=40), st.integers(0, 3), st.randoms(use_true_random=False))
def test_order_of_lines_changes_nothing(numbers: set[int], seed: int, rng: random.Random) -> None:
    examples = [Example(f"p{n}", f" c{n % 3}") for n in sorted(numbers)]
    shuffled = rng.sample(examples, len(examples))

    assert load(examples, seed=seed).data == load(shuffled, seed=seed).data


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 2)), min_size=30, max_size=60))
def test_nothing_is_held_out_that_is_trained_on_and_nothing_is_lost(pairs: list[tuple[int, int]]) -> None:
    examples = [Example(f"p{prompt}", f" c{completion}") for prompt, completion in pairs]
    if len({example.prompt for example in examples}) < 6:
        return
    data = load(examples).data
    prompts = [{example.prompt for example in part} for part in (data.train, data.validation, data.test)]
    assert len(set().union(*prompts)) == sum(map(len, prompts))
    assert {*data.train, *data.validation, *data.test} == set(examples)


def test_shares_are_of_the_prompts() -> None:
    data = load(make(100), validation_share=0.05, test_share=0.2).data
    assert (len(data.train), len(data.validation), len(data.test)) == (75, 5, 20)
    whole = load(make(7), validation_share=0, test_share=0).data
    assert (len(whole.train), whole.validation, whole.test) == (7, (), ())


def test_another_seed_gives_another_split_and_another_digest() -> None:
    one, other = load(make(50), seed=0).data, load(make(50), seed=1).data
    assert set(one.test) != set(other.test)
    assert one.digest != other.digest


def test_digest_changes_with_any_example() -> None:
    examples = make(20)
    changed = [*examples[:-1], Example(examples[-1].prompt, " other")]
    assert load(examples).data.digest != load(changed).data.digest
    assert load(examples, [], make(3)).data.digest != load(examples, make(3), []).data.digest


def test_digest_does_not_depend_on_the_order_of_examples_but_on_their_part() -> None:
    examples = make(5)
    assert data_digest({"train": examples}) == data_digest({"train": examples[::-1]})
    assert data_digest({"train": examples}) != data_digest({"test": examples})


def test_given_files_are_taken_whole() -> None:
    train, validation, test = make(10), [Example("v", " v")], [Example("t", " t")]
    data = load(train, validation, test).data
    assert set(data.train) == set(train)
    assert (data.validation, data.test) == (tuple(validation), tuple(test))


def test_too_few_prompts_to_hold_some_out_is_an_error() -> None:
    with pytest.raises(DataError, match="train: holds 2 different prompts, too few to hold 2 of them out"):
        load([*make(2), Example("p0", " again")])
    assert len(load(make(3)).data.train) == 1


def test_labels_are_those_of_all_parts() -> None:
    loaded = load(make(30, labels=("b", "a")), test=[Example("x", " c", label="c", file="f", line=1)])
    assert loaded.data.labels == ("a", "b", "c")
    assert loaded.notes == ("labels of the test examples that no training example has: c",)
    assert load(make(10)).data.labels == ()


def test_repetitions_contradictions_and_leaks_are_noted() -> None:
    train = [*make(8), make(1)[0], Example("p1", " other", file="f", line=99)]
    loaded = load(train, make(2), [Example("p5", " c5", file="t", line=3), Example("new", " n", file="t", line=4)])

    assert len(loaded.data.train) == 9
    assert loaded.notes == (
        "1 of 10 training examples repeat another one; each is used once",
        "1 training examples give a prompt another completion than an earlier example does (first: f:99)",
        "2 of 2 validation prompts are in the training data too (first: f:1): figures on them say little",
        "1 of 2 test prompts are in the training data too (first: t:3): figures on them say little",
    )


def test_test_examples_that_choose_the_prompt_too_are_noted() -> None:
    (note,) = load(make(8), [Example("v", " v")], [Example("v", " v", file="t", line=3), Example("w", " w")]).notes
    assert note == (
        "1 of 2 test prompts are among the validation examples too (first: t:3), "
        "by which the prompt that is kept is chosen"
    )


@pytest.mark.parametrize("share", [-0.1, 0.5, float("nan")])
def test_share_out_of_bounds_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="test_share: must be at least 0 and below"):
        DataFiles(train=TRAIN, test_share=share)
