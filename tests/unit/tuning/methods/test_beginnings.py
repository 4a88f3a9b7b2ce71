"""Where prompts start: random, common tokens, labels in turn, a text."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from tests.factories import VOCAB_SIZE, make_tokenizer
from tests.unit.tuning.tiny import load_tiny, make_task
from tuning.forward import PackedPass
from tuning.methods import PromptBuilder, beginnings
from tuning.methods.beginnings import common_token_ids, sample_common, text_ids
from tuning.records import TrainTask, TrainTaskError

LABELS = ((10,), (20, 21), (30, 31, 32))


@pytest.fixture
def model(tmp_path: Path) -> PreTrainedModel:
    return load_tiny("llama", tmp_path)


def start_of(model: PreTrainedModel, task: TrainTask) -> torch.Tensor:
    return PromptBuilder(PackedPass(model), make_tokenizer()).build(task).tensors()["prompt_embeddings"]


def embeddings(model: PreTrainedModel) -> torch.Tensor:
    table: Any = model.get_input_embeddings().weight
    return table.detach()


def test_random_vectors_are_uniform_and_those_of_their_seed(model: PreTrainedModel) -> None:
    first, again, other = (
        start_of(model, make_task("a", init="random", num_virtual_tokens=200, seed=seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.abs().max() <= 0.5
    assert first.std().item() == pytest.approx(1 / 12**0.5, rel=0.02)


def test_vocabulary_gives_embeddings_of_different_common_tokens(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beginnings, "NUM_COMMON", 30)
    start = start_of(model, make_task("a", init="vocab", num_virtual_tokens=20))
    same = (start[:, None] == embeddings(model)[None]).all(dim=2)
    assert same.sum(dim=1).tolist() == [1] * 20
    ids = set(same.nonzero()[:, 1].tolist())
    assert len(ids) == 20
    # Four special tokens come first in this vocabulary.
    assert ids <= set(range(4, 34))


def test_special_tokens_are_not_common() -> None:
    tokenizer = make_tokenizer()
    ids = common_token_ids(tokenizer, VOCAB_SIZE)
    assert not {*tokenizer.all_special_ids} & {*ids}
    assert ids == sorted(ids)
    assert len(sample_common(tokenizer, VOCAB_SIZE, 3 * VOCAB_SIZE, seed=0)) == 3 * VOCAB_SIZE


def test_labels_come_in_turn_and_long_ones_are_averaged(model: PreTrainedModel) -> None:
    start = start_of(model, make_task("a", init="labels", label_ids=LABELS, num_virtual_tokens=7))
    table = embeddings(model)
    means = [table[list(label)].mean(dim=0) for label in LABELS]
    torch.testing.assert_close(start, torch.stack([means[index % 3] for index in range(7)]))


def test_labels_without_labels_are_refused(model: PreTrainedModel) -> None:
    builder = PromptBuilder(PackedPass(model), make_tokenizer())
    with pytest.raises(TrainTaskError, match=r"a: init: .* needs a task with labels") as caught:
        builder.check(make_task("a", init="labels"))
    assert (caught.value.task, caught.value.field) == ("a", "init")


def test_text_gives_the_embeddings_of_its_tokens(model: PreTrainedModel) -> None:
    task = make_task("a", init="text", init_text="abcdef", num_virtual_tokens=4)
    ids = make_tokenizer()("abcdef")["input_ids"]
    assert torch.equal(start_of(model, task), embeddings(model)[ids[:4]])


def test_short_text_comes_again(model: PreTrainedModel) -> None:
    ids = make_tokenizer()("ab")["input_ids"]
    assert text_ids(make_task("a", init="text", init_text="ab", num_virtual_tokens=5), make_tokenizer()) == ids * 3


def test_text_is_of_worked_examples_where_none_is_given() -> None:
    task = make_task("a", "p_tuning_v2", num_virtual_tokens=9)
    ids = text_ids(task, make_tokenizer())
    first = next(e for e in task.train if (*e.prompt_ids, *e.completion_ids) == tuple(ids[: e.num_tokens]))
    assert len(ids) >= 9
    assert first in task.train


@pytest.mark.parametrize("method", ["p_tuning_v2", "cartridge"])
def test_deep_prompts_start_as_the_texts_keys_and_values(model: PreTrainedModel, method: Any) -> None:
    text = "the first tokens of this"
    task = make_task("a", method, init="text", init_text=text, num_virtual_tokens=6)
    prompt: Any = PromptBuilder(PackedPass(model), make_tokenizer()).build(task)
    ids = torch.tensor([make_tokenizer()(text)["input_ids"][:6]])
    cache = DynamicCache()
    stock: Any = model
    stock(input_ids=ids, past_key_values=cache, use_cache=True)
    layers: list[Any] = cache.layers
    for (keys, values), layer in zip(prompt.values(prompt().detach(), torch.float32), layers, strict=True):
        torch.testing.assert_close(keys, layer.keys[0])
        torch.testing.assert_close(values, layer.values[0])


@pytest.mark.parametrize("init", ["vocab", "labels", "random"])
def test_deep_prompts_start_from_all_that_vectors_do(model: PreTrainedModel, init: str) -> None:
    task = make_task("a", "p_tuning_v2", init=init, label_ids=LABELS, num_virtual_tokens=5)
    start = start_of(model, task)
    assert start.shape == (5, 3 * 2 * 2 * 8)
    assert torch.isfinite(start).all()


@pytest.mark.parametrize(("text", "message"), [(None, "is made of a text"), ("abc", "has 3 tokens, fewer than")])
def test_a_cartridge_needs_a_text_that_is_longer(model: PreTrainedModel, text: str | None, message: str) -> None:
    builder = PromptBuilder(PackedPass(model), make_tokenizer())
    with pytest.raises(TrainTaskError, match=f"a: init_text: .*{message}"):
        builder.check(make_task("a", "cartridge", init_text=text, num_virtual_tokens=4))
