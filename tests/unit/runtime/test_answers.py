"""When an answer counts as expected, and how many questions are asked at a time."""

import pytest

from server.errors import InvalidRequestError
from server.runtime.answers import MAX_SLICE_ROWS, is_expected, slices, tokenize_questions
from server.runtime.tokens import TokenCodec
from server.settings import Settings
from tests.fakes import BOS_ID, VOCAB_SIZE, ByteTokenizer


@pytest.mark.parametrize(
    ("answer", "completion", "expected"),
    [
        ("Paris", "Paris", True),
        (" Paris", "Paris", True),
        ("Paris", " Paris\n", True),
        ("Paris\nGermany ->", "Paris", True),
        ("\n Paris \nmore", "Paris", True),
        ("Paris.", "Paris", False),
        ("paris", "Paris", False),
        ("", "Paris", False),
        ("Paris is", "Paris", False),
        ("one\ntwo", "one\ntwo", True),
        ("one\ntwo\n", "one\ntwo", True),
        ("one\ntwo\nthree", "one\ntwo", False),
        ("one", "one\ntwo", False),
        ("", " ", True),
    ],
)
def test_answer_counts_up_to_the_end_of_its_first_line_unless_several_are_expected(
    answer: str, completion: str, expected: bool
) -> None:
    assert is_expected(answer, completion) is expected


@pytest.mark.parametrize(("num_items", "rows_each"), [(1, 1), (MAX_SLICE_ROWS, 1), (100, 2), (5, 1000)])
def test_slices_hold_every_item_once_and_few_rows(num_items: int, rows_each: int) -> None:
    found = list(slices(num_items, rows_each=rows_each, max_tokens=8, settings=Settings()))

    assert [place for places in found for place in places] == list(range(num_items))
    assert all(len(places) == 1 or len(places) * rows_each <= MAX_SLICE_ROWS for places in found)


@pytest.mark.parametrize("limits", [{"max_waiting_rows": 3}, {"max_request_tokens": 39}])
def test_slices_are_no_larger_than_one_request_may_be(limits: dict[str, int]) -> None:
    found = slices(8, rows_each=1, max_tokens=10, settings=Settings(**limits))

    assert [len(places) for places in found] == [3, 3, 2]


def test_completions_are_tokenised_apart_as_in_training() -> None:
    (question,) = tokenize_questions(
        [("ab", "c")], TokenCodec(ByteTokenizer(), VOCAB_SIZE), max_model_len=4096, param="inputs"
    )

    assert question.prompt_ids == (BOS_ID, *b"ab")
    assert question.completion_ids == tuple(b"c")


def test_tokens_without_embedding_are_refused_by_name() -> None:
    codec = TokenCodec(ByteTokenizer(), VOCAB_SIZE - 2)

    with pytest.raises(InvalidRequestError) as raised:
        tokenize_questions([("ab", "c")], codec, max_model_len=4096, param="inputs")

    assert raised.value.param == "inputs.0.prompt"
