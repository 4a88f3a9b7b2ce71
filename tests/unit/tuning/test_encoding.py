"""Prompt and completion are tokenised apart, the end follows, and what is too long is refused, or cut at its start."""

from typing import Any

import pytest

from tests.factories import make_tokenizer
from tuning.encoding import encode_examples, encode_label
from tuning.examples import DataError, EncodedExample, Example

EOS_ID, BOS_ID = 2, 1


def ids(text: str) -> tuple[int, ...]:
    return tuple(make_tokenizer()(text, add_special_tokens=False)["input_ids"])


def make_tokenizer_with_bos() -> Any:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return tokenizer


def test_a_completion_ends_with_the_end_of_sequence() -> None:
    found = encode_examples([Example("abc", "de"), Example("f", "g")], make_tokenizer())
    assert found == (EncodedExample(ids("abc"), (*ids("de"), EOS_ID)), EncodedExample(ids("f"), (*ids("g"), EOS_ID)))


def test_special_tokens_come_in_front_of_a_prompt_but_not_of_a_completion_or_a_rendered_prompt() -> None:
    tokenizer = make_tokenizer_with_bos()
    plain, rendered = encode_examples([Example("ab", "c"), Example("<bos>ab", "c", is_rendered=True)], tokenizer)
    assert plain == rendered == EncodedExample((BOS_ID, *ids("ab")), (*ids("c"), EOS_ID))
    assert encode_label("good", tokenizer) == ids(" good")


def test_too_long_examples_are_refused_with_their_lines() -> None:
    examples = [Example("a" * n, "bcd", file="f.jsonl", line=n) for n in range(1, 9)]
    with pytest.raises(DataError) as caught:
        encode_examples(examples, make_tokenizer(), max_tokens=10)
    assert [problem.line for problem in caught.value.problems] == [7, 8]
    assert "f.jsonl:7: has 11 tokens, the backbone takes 10 beside its virtual tokens" in str(caught.value)


def test_truncation_keeps_the_end_of_the_prompt_and_the_whole_completion() -> None:
    (found,) = encode_examples([Example("abcdef", "xyz")], make_tokenizer(), max_tokens=7, truncates=True)
    assert found == EncodedExample(ids("def"), (*ids("xyz"), EOS_ID), is_truncated=True)
    with pytest.raises(DataError, match="completion: has 4 tokens, the backbone takes 4 with its prompt"):
        encode_examples([Example("a", "xyz")], make_tokenizer(), max_tokens=4, truncates=True)


def test_tokenizer_without_an_end_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-sequence token"):
        encode_examples([Example("a", "b")], tokenizer)


def test_many_examples_keep_their_order() -> None:
    examples = [Example(chr(97 + n % 26), chr(97 + n // 26 % 26), is_rendered=n % 3 == 0) for n in range(2500)]
    found = encode_examples(examples, make_tokenizer())
    assert (
        found == tuple(EncodedExample(ids(e.prompt), (*ids(e.completion), EOS_ID)) for e in examples[:60]) + found[60:]
    )
    assert found[2499] == EncodedExample(ids(examples[2499].prompt), (*ids(examples[2499].completion), EOS_ID))
