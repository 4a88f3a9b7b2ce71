"""Warnings before a training begins: where soft prompts are known to fail, and what to try instead.

Each text begins with a stable code and a colon, like the store's warnings of finished prompts, whose words are used
where there are some. Refuses nothing. The signs of structured output and of reasoning are simple ones, looked for in a
sample of the completions: they ask somebody to look, and no more.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Final

from prompt_store.cautions import few_virtual_tokens, small_backbone
from tuning.config import TrainConfig
from tuning.examples import EncodedExample, Example

# Prompts at the input alone, whose limits the store's warnings are about.
_SHALLOW: Final = ("prompt_tuning", "p_tuning")
_SAMPLE: Final = 200
_SHARE: Final = 0.2
# An answer of one line rarely has more; a chain of thought rarely has fewer.
LONG_COMPLETION_TOKENS: Final = 128
FEW_EXAMPLES: Final = 32

_CODE = re.compile(
    r"^\s*(?:def \w+\(|class \w+[:({]|(?:const|let|var) \w+ ?=|function \w*\(|#include"
    r"|from [\w.]+ import|SELECT\s.+\sFROM\s|</?\w+[^>]*>|```)",
    re.MULTILINE,
)
_REASONING = re.compile(
    r"step by step|let'?s think|(?:^|\n)\s*step \d|(?:^|\n)\s*(?:therefore|hence|thus)\b|<think>|\n####",
    re.IGNORECASE,
)


def find_cautions(
    config: TrainConfig,
    *,
    num_parameters: int | None,
    train: Sequence[Example],
    encoded: Sequence[EncodedExample],
) -> tuple[str, ...]:
    """Warnings of one task; `encoded` are the training examples' token ids, `num_parameters` the backbone's."""
    found: list[str] = []
    if config.method in _SHALLOW:
        found += [f"{text} Try --method p_tuning_v2." for text in small_backbone(num_parameters)]
        found += [f"{text} Try --k 20 or more." for text in few_virtual_tokens(config.num_virtual_tokens)]
    sample = train[:_SAMPLE]
    if _is_common(_is_structured, sample):
        found.append(
            "structured_output: Many completions look like JSON, markup or code: a soft prompt steers what is said, "
            "and promises no syntax. Try short fields, one a task, that your code puts together, and check each answer."
        )
    longest = [len(example.completion_ids) > LONG_COMPLETION_TOKENS for example in encoded[:_SAMPLE]]
    if _is_common(_is_reasoning, sample) or sum(longest) > _SHARE * len(longest):
        found.append(
            "long_reasoning: Many completions are long or reason step by step: soft prompts find what a backbone can "
            "do already, and teach it no new reasoning. Try a larger backbone, or completions of the answer alone."
        )
    if len(train) < FEW_EXAMPLES:
        found.append(
            f"few_examples: {len(train)} training examples are few: figures on so few say little, and more virtual "
            "tokens only learn them by heart. Try --method p_tuning_v2 with few virtual tokens, or more examples."
        )
    return tuple(found)


def _is_common(is_so: Callable[[str], bool], examples: Sequence[Example]) -> bool:
    return sum(is_so(example.completion) for example in examples) > _SHARE * len(examples)


def _is_structured(completion: str) -> bool:
    text = completion.strip()
    if text[:1] in "{[" and text[-1:] in "}]":
        try:
            json.loads(text)
        except ValueError:
            # Cut off, or a dialect of it: it looks like it all the same when there is a key.
            return ":" in text
        return True
    return _CODE.search(text) is not None


def _is_reasoning(completion: str) -> bool:
    return _REASONING.search(completion.strip()) is not None
