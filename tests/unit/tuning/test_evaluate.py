"""Figures come from the same tokens that the model would give one item at a time."""

import random

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tuning.data import Dataset, Method
from tuning.evaluate import evaluate_instruction, evaluate_prompt, generate_greedily, normalise
from tuning.train import attach_prompt

from .conftest import make_spec

CHAT_TEMPLATE = "{% for turn in messages %}{{ turn['role'][0] }}:{{ turn['content'] }};{% endfor %}"


def test_batched_answers_equal_a_loop_of_argmax_without_a_cache(
    backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    texts = [tokenizer(text)["input_ids"] for text in ("abc", "de", "xyz", "a", "b", "fgh", "zz")]
    wanted = []
    for text in texts:
        ids = list(text)
        for _ in range(8):
            with torch.no_grad():
                ids.append(int(backbone(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id or tokenizer.decode(ids[-1]) == "\n":
                break
        wanted.append(tokenizer.decode(ids[len(text) :], skip_special_tokens=True))
    assert generate_greedily(backbone, tokenizer, texts, max_new_tokens=8) == wanted


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_batched_answers_with_a_prompt_equal_those_of_one_item_at_a_time(
    method: Method, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, dataset: Dataset
) -> None:
    spec = make_spec(method)
    model = attach_prompt(spec, dataset, backbone, tokenizer, base_model_name="tiny", rng=random.Random(0)).eval()
    assert isinstance(model, PeftModel)
    texts = [tokenizer(text)["input_ids"] for text in ("abc", "de", "xyz", "a", "b", "fgh", "zz")]
    wanted = []
    for text in texts:
        ids = list(text)
        for _ in range(8):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id or tokenizer.decode(ids[-1]) == "\n":
                break
        wanted.append(tokenizer.decode(ids[len(text) :], skip_special_tokens=True))
    assert len(set(wanted)) > 1
    assert generate_greedily(model, tokenizer, texts, max_new_tokens=8) == wanted


def test_answers_are_compared_leniently_but_not_more() -> None:
    assert normalise(' "Paris".\nIt is') == normalise("paris") == "paris"
    assert normalise(" The capital is Paris.") != normalise("Paris")
    assert normalise("1987-05-07") == "1987-05-07"
    assert normalise("") == ""


def test_score_counts_right_answers(
    backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, dataset: Dataset
) -> None:
    score = evaluate_prompt(backbone, tokenizer, make_spec(), dataset.heldout)
    right = [normalise(a) == normalise(e.target) for a, e in zip(score.answers, dataset.heldout, strict=True)]
    assert score.exact_match == sum(right) / len(dataset.heldout)


def test_instruction_is_tried_in_the_chat_template_only_where_there_is_one(
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    dataset: Dataset,
) -> None:
    assert set(evaluate_instruction(backbone, tokenizer, make_spec(), dataset, seed=0)) == {"plain-examples"}
    tokenizer.chat_template = CHAT_TEMPLATE
    try:
        forms = evaluate_instruction(backbone, tokenizer, make_spec(), dataset, seed=0)
    finally:
        tokenizer.chat_template = None
    assert set(forms) == {"plain-examples", "chat", "chat-examples"}
