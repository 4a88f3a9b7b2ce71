"""Figures equal those of PEFT's own model, one text at a time and without a cache, for every kind of prompt."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from tests.factories import VOCAB_SIZE, load_model, make_tokenizer, save_prompt, save_tiny_backbone
from tuning.evaluation import (
    completion_loss,
    evaluate,
    find_label,
    generate_greedily,
    is_expected,
    score_labels,
)
from tuning.examples import EncodedExample, Example
from tuning.prefixes import Prefix, load_prefix

# Grouped queries; learned positions; a sliding window of 6 tokens; windows in every other layer and soft caps.
FAMILIES = ("llama", "gpt2", "mistral", "gemma2")
KINDS = (None, "prompt_tuning", "p_tuning", "prefix", "prefix_projection", "cartridge")
EOS_ID, FIRST_ID, K = 2, 5, 5

each_case = pytest.mark.parametrize(("family", "kind"), [(f, k) for f in FAMILIES for k in KINDS])


@dataclass(frozen=True)
class Case:
    """The stock model with the prefix of a saved prompt, and PEFT's model with the same files."""

    model: PreTrainedModel
    prefix: Prefix | None
    peft: Any

    def logprobs(self, ids: Sequence[int]) -> torch.Tensor:
        """By PEFT, of what follows each of the ids: `[len(ids), vocabulary]`."""
        with torch.no_grad():
            logits: torch.Tensor = self.peft(input_ids=torch.tensor([list(ids)])).logits[0, -len(ids) :]
        return logits.log_softmax(-1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("backbones")
    return {family: save_tiny_backbone(family, root / family) for family in FAMILIES}


@pytest.fixture
def case(family: str, kind: str | None, folders: dict[str, Path], tmp_path: Path) -> Iterator[Case]:
    model = load_model(folders[family])
    if kind is None:
        yield Case(model, None, model)
        return
    save_prompt(folders[family], kind, K, tmp_path / "prompt", seed=7, base=load_model(folders[family]))
    prefix = load_prefix(tmp_path / "prompt", model, base_model_name=family)
    peft_model = PeftModel.from_pretrained(load_model(folders[family]), str(tmp_path / "prompt")).eval()
    yield Case(model, prefix, peft_model)


def texts(count: int, *, seed: int = 0) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    return [tuple(rng.randrange(FIRST_ID, VOCAB_SIZE) for _ in range(rng.randrange(1, 14))) for _ in range(count)]


@each_case
def test_loss_is_that_of_the_completions_one_at_a_time(case: Case) -> None:
    examples = [EncodedExample(one, (*two[:3], EOS_ID)) for one, two in zip(texts(9), texts(9, seed=1), strict=True)]
    total, count = 0.0, 0
    for example in examples:
        ids = example.prompt_ids + example.completion_ids
        wanted = case.logprobs(ids[:-1])[-len(example.completion_ids) :]
        total -= wanted.gather(1, torch.tensor(example.completion_ids)[:, None]).sum().item()
        count += len(example.completion_ids)

    assert completion_loss(case.model, case.prefix, examples) == pytest.approx(total / count, abs=1e-4)


@each_case
def test_answers_are_those_of_argmax_without_a_cache(case: Case) -> None:
    prompts, tokenizer = texts(7), make_tokenizer()
    wanted = []
    for prompt in prompts:
        ids = list(prompt)
        while len(ids) < len(prompt) + 6 and (len(ids) == len(prompt) or ids[-1] != EOS_ID):
            ids.append(int(case.logprobs(ids)[-1].argmax()))
        wanted.append(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True))

    assert generate_greedily(case.model, tokenizer, case.prefix, prompts, max_new_tokens=6) == wanted


def test_texts_that_fill_the_context_are_answered_as_far_as_there_is_room(tmp_path: Path) -> None:
    model, tokenizer = load_model(save_tiny_backbone("gpt2", tmp_path)), make_tokenizer()
    limit = int(model.config.max_position_embeddings)
    label, longer = "x", "y" * 9
    prompts = [tuple(texts(1, seed=n)[0] * limit)[:length] for n, length in enumerate((limit - 3, 5))]
    examples = [Example("", f" {label}", label=label) for _ in prompts]
    encoded = [EncodedExample(prompt, (8, 9, EOS_ID)) for prompt in prompts]

    found = evaluate(model, tokenizer, None, examples, encoded, labels=(label, longer), max_positions=limit)

    def answer(place: int, num_tokens: int) -> str:
        (alone,) = generate_greedily(model, tokenizer, None, [prompts[place]], max_new_tokens=num_tokens)
        return alone

    assert found.answers == (answer(0, 3), answer(1, 7))


@each_case
def test_labels_are_scored_as_if_each_were_read_alone(case: Case) -> None:
    prompts, labels = texts(5), [(40,), (40, 41), (9, 8, 7)]
    wanted = torch.zeros(len(prompts), len(labels))
    for row, prompt in enumerate(prompts):
        for column, label in enumerate(labels):
            logprobs = case.logprobs((*prompt, *label))[len(prompt) - 1 : -1]
            wanted[row, column] = logprobs.gather(1, torch.tensor(label)[:, None]).sum()

    torch.testing.assert_close(score_labels(case.model, case.prefix, prompts, labels), wanted, atol=1e-4, rtol=0)


def test_figures_are_shares_of_the_examples(folders: dict[str, Path]) -> None:
    model, tokenizer = load_model(folders["llama"]), make_tokenizer()
    prompts = ["abc", "defg", "h", "ij"]
    ids = [tuple(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    answers = generate_greedily(model, tokenizer, None, ids, max_new_tokens=3 + 4)
    # Two labels that are the beginnings of two answers, and two examples whose completion is the whole answer.
    labels = sorted({answers[0][:1], answers[1][:1], "zz"})
    assert len(labels) == 3
    completions = [answers[0], answers[1], "no", "no"]
    given = [answers[0][:1], "zz", answers[2][:1], "zz"]
    examples = [Example(p, c, label=g) for p, c, g in zip(prompts, completions, given, strict=True)]
    encoded = [EncodedExample(i, (FIRST_ID, FIRST_ID, EOS_ID)) for i in ids]
    done: list[int] = []

    found = evaluate(model, tokenizer, None, examples, encoded, labels=labels, progress=done.append)

    assert found.answers == tuple(answers)
    assert found.exact_match == 0.5
    assert found.label_match == sum(find_label(a, labels) == g for a, g in zip(answers, given, strict=True)) / 4
    scores = score_labels(model, None, ids, [tuple(tokenizer(f" {label}")["input_ids"]) for label in labels])
    likeliest = [labels[place] for place in scores.argmax(1)]
    assert found.label_accuracy == sum(a == b for a, b in zip(likeliest, given, strict=True)) / 4
    assert found.loss == completion_loss(model, None, encoded)
    assert done[-1] == found.num_examples == found.num_scored == 4


def test_free_text_has_no_figures_of_labels(folders: dict[str, Path]) -> None:
    model, tokenizer = load_model(folders["llama"]), make_tokenizer()
    found = evaluate(model, tokenizer, None, [Example("a", "b")], [EncodedExample((9,), (8, EOS_ID))], labels=())
    assert set(found.figures()) == {"num_examples", "loss", "exact_match"}
    assert replace(found, loss=float("inf")).figures()["loss"] is None
    with pytest.raises(ValueError, match="no examples"):
        evaluate(model, tokenizer, None, [], [])


def test_answer_is_compared_as_a_gate_does() -> None:
    from server.runtime import answers

    pairs = [(" Paris\nand more", " Paris"), ("Paris", "paris"), ("a\nb ", "a\nb"), ("", "x"), ("Paris.", "Paris")]
    assert [is_expected(*pair) for pair in pairs] == [answers.is_expected(*pair) for pair in pairs]
    assert is_expected(*pairs[0])


def test_longest_label_that_an_answer_begins_with_counts() -> None:
    assert find_label(" very good indeed", ["very", "very good", "good"]) == "very good"
    assert find_label("bad", ["good"]) is None
