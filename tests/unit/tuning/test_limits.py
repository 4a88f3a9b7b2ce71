"""A task that cannot be trained is refused when it is given, by its name and the field at fault."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from tests.factories import CONTEXT_LENGTH, VOCAB_SIZE, make_tokenizer
from tuning.examples import EncodedExample
from tuning.limits import context_length
from tuning.records import TrainTask, TrainTaskError
from tuning.trainer import Trainer

from .tiny import load_tiny, make_run, make_task

LONG = EncodedExample((5,) * (CONTEXT_LENGTH - 4), (6, 2))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return load_tiny("llama", tmp_path_factory.mktemp("model"))


def give(model: PreTrainedModel, tmp_path: Path, task: TrainTask) -> None:
    Trainer(model, make_tokenizer(), [task], run=make_run(), folder=tmp_path)


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"name": "../up"}, "name", "must match"),
        ({"name": ""}, "name", "must match"),
        ({"name": "a" * 129}, "name", "must match"),
        ({"train": ()}, "train", "there are no examples"),
        ({"train": (EncodedExample((), (2,)),)}, "train", "example 1 has an empty prompt"),
        ({"validation": (EncodedExample((5,), ()),)}, "validation", "example 1 has an empty completion"),
        ({"train": (EncodedExample((VOCAB_SIZE,), (2,)),)}, "train", "outside of the vocabulary of 128"),
        ({"train": (EncodedExample((5,), (-1,)),)}, "train", "outside of the vocabulary of 128"),
        ({"label_ids": ((5, VOCAB_SIZE),)}, "label_ids", "outside of the vocabulary"),
        ({"train": (LONG,)}, "num_virtual_tokens", "are more than the 512 positions"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    model: PreTrainedModel, tmp_path: Path, changes: dict[str, Any], field: str, message: str
) -> None:
    with pytest.raises(TrainTaskError, match=message) as caught:
        give(model, tmp_path, replace(make_task("a"), **changes))
    assert caught.value.field == field


def test_the_longest_that_fits_is_taken(model: PreTrainedModel, tmp_path: Path) -> None:
    task = make_task("a", num_virtual_tokens=2)
    give(model, tmp_path, replace(task, train=(EncodedExample(LONG.prompt_ids, (6, 2)),)))


def test_a_cartridges_text_must_fit_with_the_examples(model: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(TrainTaskError, match="tokens of the text and the longest example's") as caught:
        give(model, tmp_path, make_task("a", "cartridge", init_text="x" * 508))
    assert caught.value.field == "init_text"


def test_rows_stay_below_the_position_where_frequencies_are_switched(tmp_path: Path) -> None:
    model = load_tiny("llama", tmp_path)
    assert context_length(model) == CONTEXT_LENGTH
    model.config.rope_parameters = {"rope_type": "dynamic", "original_max_position_embeddings": 64}
    assert context_length(model) == 64


def test_two_tasks_of_one_name_are_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    tasks = [make_task("a"), make_task("a", data_seed=1)]
    with pytest.raises(TrainTaskError, match="a: name: another task"):
        Trainer(model, make_tokenizer(), tasks, run=make_run(), folder=tmp_path)
