"""How good a model's answers to a task's test items are, by the trainer's own evaluation.

Owns what a right answer is here: leniently compared, and alike for all methods, else what is written in words would
lose to a prompt on punctuation. Refuses to know how the model, the prompt or the text came about.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.tuning.ledger import DataFacts, Scores
from tuning.demo.evaluate import normalise
from tuning.encoding import encode_examples
from tuning.evaluation import NUM_SPARE_TOKENS, completion_loss, generate_greedily, score_labels
from tuning.examples import EncodedExample, Example, TaskData, label_completion
from tuning.prefixes import Prefix

MIN_SHARED_TOKENS = 8
"""A beginning that all texts share and that is shorter is not worth a pass of its own."""


def describe(data: TaskData) -> DataFacts:
    """What the tables say of a task's data."""
    answers = Counter(example.completion for example in data.test)
    return DataFacts(
        digest=data.digest,
        num_train=len(data.train),
        num_validation=len(data.validation),
        num_test=len(data.test),
        num_labels=len(data.labels),
        majority_share=max(answers.values()) / len(data.test),
    )


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    labels: Sequence[str],
    *,
    prefix: Prefix | None = None,
) -> Scores:
    """Scores of `model` with a prompt's prefix, or with what stands in the examples' texts."""
    encoded: Sequence[EncodedExample] = encode_examples(examples, tokenizer)
    if prefix is None:
        prefix, encoded = _share_beginning(model, encoded)
    prompts = [example.prompt_ids for example in encoded]
    longest = max(len(example.completion_ids) for example in encoded)
    answers = generate_greedily(model, tokenizer, prefix, prompts, max_new_tokens=longest + NUM_SPARE_TOKENS)
    num_right = sum(
        normalise(answer) == normalise(example.completion) for answer, example in zip(answers, examples, strict=True)
    )
    return Scores(
        exact_match=num_right / len(examples),
        label_accuracy=_label_accuracy(model, tokenizer, prefix, examples, prompts, labels) if labels else None,
        loss=completion_loss(model, prefix, encoded),
    )


def _label_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prefix: Prefix | None,
    examples: Sequence[Example],
    prompts: Sequence[Sequence[int]],
    labels: Sequence[str],
) -> float:
    # As the label stands in these texts: a chat's answer begins without a space.
    texts = [label.strip() if examples[0].is_rendered else label_completion(label) for label in labels]
    label_ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    likeliest: list[int] = score_labels(model, prefix, prompts, label_ids).argmax(dim=1).tolist()
    wanted = [example.completion.strip() for example in examples]
    return sum(labels[place] == label for place, label in zip(likeliest, wanted, strict=True)) / len(examples)


@torch.inference_mode()
def _share_beginning(
    model: PreTrainedModel, encoded: Sequence[EncodedExample]
) -> tuple[Prefix | None, Sequence[EncodedExample]]:
    """What all texts begin with, read once; and the texts without it. The answers are those of the whole texts."""
    shortest = min(len(example.prompt_ids) for example in encoded)
    columns = zip(*(example.prompt_ids[: shortest - 1] for example in encoded), strict=True)
    shared = [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]
    if len(encoded) == 1 or len(shared) < MIN_SHARED_TOKENS:
        return None, encoded
    cache = DynamicCache()
    run: Any = model
    run(input_ids=torch.tensor([shared], device=model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    layers: list[Any] = cache.layers
    rest = [EncodedExample(example.prompt_ids[len(shared) :], example.completion_ids) for example in encoded]
    return Prefix(tuple((layer.keys, layer.values) for layer in layers), len(shared)), rest
