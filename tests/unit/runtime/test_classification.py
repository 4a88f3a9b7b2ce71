"""Which tokens of input and label are scored, with tokenizers whose tokens grow together at the seam."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from server.engine.request import TokenLogprob
from server.errors import InvalidRequestError
from server.runtime.classification import join, labels_of_metadata, score, softmax, tokenize_inputs
from server.runtime.tokens import TokenCodec
from tests.fakes import VOCAB_SIZE, ByteTokenizer


def make_merging(*merges: tuple[str, str]) -> TokenCodec:
    """A byte-level BPE without a first special token, which joins these pairs and no others."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return TokenCodec(PreTrainedTokenizerFast(tokenizer_object=tokenizer), len(vocabulary))


def scored_texts(codec: TokenCodec, text: str, labels: list[str], separator: str | None = None) -> list[str]:
    [scored] = tokenize_inputs(
        [text], labels, codec, separator=separator, add_special_tokens=True, max_model_len=10_000, max_tokens=10_000
    )
    return [codec.decode(row[scored.start :]) for row in scored.rows]


def test_the_labels_own_tokens_are_scored() -> None:
    assert scored_texts(make_merging(), "it is", ["up", "down"]) == [" up", " down"]


def test_the_space_before_a_label_is_scored_with_it() -> None:
    assert scored_texts(make_merging(("Ġ", "u")), "it is ", ["up", "us"]) == [" up", " us"]


def test_labels_of_one_input_are_scored_from_the_same_token() -> None:
    """One label grows together with the input's last token, the other does not: both are scored from there on."""
    assert scored_texts(make_merging(("s", "u")), "it is", ["up", "down"], separator="") == ["sup", "sdown"]


def test_an_input_swallowed_by_its_labels_is_refused() -> None:
    with pytest.raises(InvalidRequestError) as refused:
        scored_texts(make_merging(("a", "b")), "a", ["b", "c"], separator="")
    assert refused.value.param == "input"


def test_a_first_token_that_all_labels_share_may_be_swallowed() -> None:
    assert scored_texts(make_merging(("a", "b")), "a", ["bx", "by"], separator="") == ["x", "y"]
    with pytest.raises(InvalidRequestError) as refused:
        scored_texts(make_merging(("a", "b")), "a", ["b", "by"], separator="")
    assert refused.value.param == "labels.0"


def test_tokens_are_counted_before_they_are_made() -> None:
    class Counting(ByteTokenizer):
        calls = 0

        def __call__(self, text: str, **arguments: bool):  # type: ignore[no-untyped-def]
            Counting.calls += 1
            return super().__call__(text, **arguments)

    with pytest.raises(InvalidRequestError) as refused:
        tokenize_inputs(
            ["a" * 9, "b" * 9],
            ["x", "y"],
            TokenCodec(Counting(), VOCAB_SIZE),
            separator=None,
            add_special_tokens=True,
            max_model_len=100,
            max_tokens=39,
        )
    assert refused.value.param == "input.1"
    assert Counting.calls == 4


@given(st.text(min_size=1, max_size=8), st.text(min_size=1, max_size=8))
def test_a_space_is_put_only_where_there_is_none(text: str, label: str) -> None:
    joined = join(text, label, None)

    has_space = text[-1].isspace() or label[0].isspace()
    assert joined == (text + label if has_space else f"{text} {label}")
    assert join(text, label, "|") == f"{text}|{label}"


def test_score_leaves_out_what_comes_before() -> None:
    entries = (None, TokenLogprob(1, -9.0), TokenLogprob(2, -0.25), TokenLogprob(3, -0.5))

    assert score(entries, 2) == -0.75


@given(st.lists(st.floats(-1e6, 0), min_size=2, max_size=20))
def test_softmax_is_a_distribution_in_the_order_of_the_scores(scores: list[float]) -> None:
    probs = softmax(scores)

    assert math.fsum(probs) == pytest.approx(1)
    assert all(0 <= p <= 1 for p in probs)
    assert probs[scores.index(max(scores))] == max(probs)


def test_metadata_must_name_labels_that_can_be_used() -> None:
    assert labels_of_metadata({"labels": ["a", "b"]}) == ("a", "b")
    for labels in (None, "ab", [], ["a"], ["a", "a"], ["a", ""], ["a", None], ["a", "b" * 257], [["a"], ["b"]]):
        assert labels_of_metadata({"labels": labels}) is None
    assert labels_of_metadata({}) is None
