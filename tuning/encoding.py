"""Examples as token ids, and what becomes of one that is too long for the backbone.

Prompt and completion are tokenised apart: a server sees the prompt alone, and then makes tokens one by one. Refuses to
know where examples come from and what is done with their tokens.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from tuning.examples import DataError, EncodedExample, Example, Problem, label_completion, list_problems

# Bounds what the tokenizer holds at once.
_CHUNK = 1000


def encode_examples(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int | None = None,
    truncates: bool = False,
) -> tuple[EncodedExample, ...]:
    """The examples' token ids, in order.

    `max_tokens` bounds prompt and completion together. What is longer is refused, or with `truncates` loses the
    beginning of its prompt, for the end is what the answer follows; a completion is never cut.

    Raises DataError, which names the lines.
    """
    encoded: list[EncodedExample] = []
    problems: list[Problem] = []
    for start in range(0, len(examples), _CHUNK):
        chunk = examples[start : start + _CHUNK]
        for example, prompt, completion in zip(chunk, *_token_ids(chunk, tokenizer), strict=True):
            found = _fit(EncodedExample(prompt, completion), max_tokens, truncates)
            if isinstance(found, EncodedExample):
                encoded.append(found)
                continue
            problems.append(example.problem(*found))
    if problems:
        raise list_problems(problems)
    return tuple(encoded)


def encode_label(label: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """A label's token ids as it stands in a completion, without the end-of-sequence token."""
    return tuple(tokenizer(label_completion(label), add_special_tokens=False)["input_ids"])


def end_of_sequence(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an answer. Raises DataError when the tokenizer has none."""
    if not isinstance(tokenizer.eos_token_id, int):
        message = "the backbone's tokenizer has no end-of-sequence token, so no answer could end"
        raise DataError([Problem("tokenizer", None, None, message)])
    return tokenizer.eos_token_id


def _token_ids(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Of each example its prompt's and its completion's."""
    end = end_of_sequence(tokenizer)
    prompts: list[tuple[int, ...]] = [()] * len(examples)
    for is_rendered in (False, True):
        places = [place for place, example in enumerate(examples) if example.is_rendered == is_rendered]
        if places:
            ids = _call(tokenizer, [examples[place].prompt for place in places], add_special_tokens=not is_rendered)
            for place, found in zip(places, ids, strict=True):
                prompts[place] = found
    completions = _call(tokenizer, [example.completion for example in examples], add_special_tokens=False)
    return prompts, [(*ids, end) for ids in completions]


def _call(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, add_special_tokens: bool) -> list[tuple[int, ...]]:
    # Not `verbose`: a text over the model's length is this module's to report.
    ids = tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
    return [tuple(found) for found in ids]


def _fit(example: EncodedExample, max_tokens: int | None, truncates: bool) -> EncodedExample | tuple[str | None, str]:
    """The example, cut where it may be; else the field that is wrong and why."""
    if not example.prompt_ids:
        return "prompt", "gives no token"
    if len(example.completion_ids) < 2:
        return "completion", "gives no token"
    if max_tokens is None or example.num_tokens <= max_tokens:
        return example
    room = max_tokens - len(example.completion_ids)
    if room < 1:
        return (
            "completion",
            f"has {len(example.completion_ids)} tokens, the backbone takes {max_tokens} with its prompt",
        )
    if not truncates:
        return None, (
            f"has {example.num_tokens} tokens, the backbone takes {max_tokens} beside its virtual tokens; shorten it, "
            "or let it be truncated (--truncate)"
        )
    return EncodedExample(example.prompt_ids[-room:], example.completion_ids, is_truncated=True)
