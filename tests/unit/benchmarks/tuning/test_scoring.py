"""Scores are those of the whole texts, and of what the model itself finds likeliest."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.training_peers import load_model
from benchmarks.tuning import scoring
from benchmarks.tuning.scoring import score
from tuning.evaluation import score_labels
from tuning.examples import Example
from tuning.prefixes import Prefix

LABELS = ("red", "blue")
ITEMS = [
    Example(f"tell me a colour of {word} ->", f" {LABELS[index % 2]}", label=LABELS[index % 2])
    for index, word in enumerate(("sky", "blood", "the sea", "a rose", "ink"))
]


@pytest.fixture(scope="module")
def model(chat_backbone_folder: Path) -> PreTrainedModel:
    return load_model(str(chat_backbone_folder), torch.float32, frozen=True)


@pytest.fixture(scope="module")
def tokenizer(chat_backbone_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(chat_backbone_folder)


def test_reading_the_shared_beginning_once_changes_no_score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = score(model, tokenizer, ITEMS, LABELS)
    monkeypatch.setattr(scoring, "MIN_SHARED_TOKENS", 10_000)
    whole = score(model, tokenizer, ITEMS, LABELS)

    assert shared.exact_match == whole.exact_match
    assert shared.label_accuracy == whole.label_accuracy
    assert shared.loss == pytest.approx(whole.loss, abs=1e-5)


@pytest.mark.parametrize("is_rendered", [False, True])
@torch.inference_mode()
def test_label_accuracy_is_by_the_likelihood_of_the_label_as_it_stands_in_the_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, is_rendered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Sequence[Sequence[int]]] = []

    def listen(
        model: PreTrainedModel, prefix: Prefix | None, prompts: Sequence[Sequence[int]], ids: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        asked.append(ids)
        return score_labels(model, prefix, prompts, ids)

    monkeypatch.setattr(scoring, "score_labels", listen)
    space = "" if is_rendered else " "
    items = [Example(item.prompt, f"{space}{item.label}", label=item.label, is_rendered=is_rendered) for item in ITEMS]
    num_right = 0
    for item in items:
        likelihoods = []
        for label in LABELS:
            prompt, answer = (
                tokenizer(text, add_special_tokens=False)["input_ids"] for text in (item.prompt, f"{space}{label}")
            )
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            likelihoods.append(sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)))
        num_right += LABELS[likelihoods.index(max(likelihoods))] == item.label

    assert score(model, tokenizer, items, LABELS).label_accuracy == num_right / len(items)
    assert asked == [[tokenizer(f"{space}{label}")["input_ids"] for label in LABELS]]


def test_answers_are_compared_without_case_quotation_marks_and_what_follows_the_first_line(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = ['"Red".', " BLUE\nand more", "red, I think", "", "blue"]
    monkeypatch.setattr(scoring, "generate_greedily", lambda *args, **kwargs: answers)

    # Red, blue, red, blue and red were right.
    assert score(model, tokenizer, ITEMS, ()).exact_match == 2 / 5


def test_free_text_has_no_label_accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    found = score(model, tokenizer, ITEMS, ())

    assert found.label_accuracy is None
    assert found.loss > 0
