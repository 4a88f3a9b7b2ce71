"""Where a prompt starts: token ids whose embeddings, or whose keys and values, its virtual tokens first are.

Lester et al. 2021 (section 3.2) start from random vectors, from tokens sampled among the most common, or from the class
labels. A text does too: what one would write to the model, or worked examples.
"""

import random
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from tuning.records import TrainTask, TrainTaskError

NUM_COMMON = 5000
"""The paper samples from the 5,000 most common tokens."""


def common_token_ids(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[int]:
    """The most common tokens, special ones left out.

    By the order of the vocabulary: byte pairs are numbered as they were merged, the most frequent first, and pieces by
    their likelihood. A vocabulary that is ordered otherwise gives just some tokens, which is no harm.
    """
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    limit = min(vocab_size, len(tokenizer))
    ordinary = [token_id for token_id in range(limit) if token_id not in special]
    return ordinary[:NUM_COMMON]


def sample_common(tokenizer: PreTrainedTokenizerBase, vocab_size: int, count: int, seed: int) -> list[int]:
    """Token ids drawn from the most common, each at most once where there are enough."""
    rng = random.Random(f"{seed}:vocabulary")  # noqa: S311 - reproducible, not a secret
    common = common_token_ids(tokenizer, vocab_size)
    drawn: list[int] = []
    while len(drawn) < count:
        drawn += rng.sample(common, min(len(common), count - len(drawn)))
    return drawn


def label_pieces(task: TrainTask) -> list[Sequence[int]]:
    """The token ids of a label for each virtual token, labels taken in turn. The paper fills up from the vocabulary
    where there are fewer labels than virtual tokens; here they come again.
    """
    labels = [label for label in task.label_ids if label]
    if not labels:
        raise TrainTaskError("starting from the labels needs a task with labels", task=task.name, field="init")
    return [labels[index % len(labels)] for index in range(task.config.num_virtual_tokens)]


def text_ids(task: TrainTask, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of the configured text, or of worked training examples: at least as many as virtual tokens."""
    count = task.config.num_virtual_tokens
    ids: list[int] = []
    if task.config.init_text is not None:
        ids = list(tokenizer(task.config.init_text)["input_ids"])
        if not ids:
            raise TrainTaskError("has no tokens", task=task.name, field="init_text")
    else:
        rng = random.Random(f"{task.config.seed}:text")  # noqa: S311 - reproducible, not a secret
        for example in rng.sample(list(task.train), len(task.train)):
            if len(ids) >= count:
                break
            ids += [*example.prompt_ids, *example.completion_ids]
    # Too short a text comes again, as in PEFT.
    return ids * -(-count // len(ids))
