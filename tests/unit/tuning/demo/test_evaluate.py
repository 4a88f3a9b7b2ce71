"""Answers are compared leniently, and an instruction is tried in every form that the backbone has."""

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tuning.demo.data import Dataset
from tuning.demo.evaluate import evaluate_instruction, evaluate_prompt, normalise

from .conftest import make_spec

CHAT_TEMPLATE = "{% for turn in messages %}{{ turn['role'][0] }}:{{ turn['content'] }};{% endfor %}"


def test_answers_are_compared_leniently_but_not_more() -> None:
    assert normalise(' "Paris".\nIt is') == normalise("paris") == "paris"
    assert normalise(" The capital is Paris.") != normalise("Paris")
    assert normalise("1987-05-07") == "1987-05-07"
    assert normalise("") == ""


def test_score_counts_right_answers(
    backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, dataset: Dataset
) -> None:
    score = evaluate_prompt(backbone, tokenizer, None, make_spec(), dataset.heldout)
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
