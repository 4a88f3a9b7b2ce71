"""A row's own list of its pages: order, generations, what it expects of each, and which of them it holds itself."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from server.engine.pages import NO_CONTENT, PAGE_SIZE, PageLedger
from server.engine.row_pages import RowPages
from tests.unit.engine.batches import allocated


def ids(*contents: int) -> np.ndarray:
    return np.array(contents, dtype=np.int64)


@given(st.integers(0, 3), st.integers(0, 3), st.lists(st.integers(0, 3), max_size=4))
def test_pages_come_in_the_order_in_which_they_were_added(num_prefix: int, num_texts: int, parts: list[int]) -> None:
    ledger = PageLedger(32)
    allocated(ledger, 1, 2)
    pages = RowPages(32 * PAGE_SIZE)
    expected: list[tuple[int, int, int]] = []

    def take(count: int, first_content: int | None) -> tuple[np.ndarray, np.ndarray | None]:
        numbers = allocated(ledger, 9, count)
        contents = None if first_content is None else np.arange(first_content, first_content + count)
        known = [NO_CONTENT] * count if contents is None else contents.tolist()
        expected.extend(zip(numbers.tolist(), ledger.generation[numbers].tolist(), known, strict=True))
        return numbers, contents

    numbers, contents = take(num_prefix, 100)
    assert contents is not None
    pages.append_prefix(numbers, ledger, contents)
    numbers, contents = take(num_texts, 200)
    pages.append(numbers, ledger, contents)
    for count in parts:
        pages.append(take(count, None)[0], ledger)

    found = zip(pages.numbers.tolist(), pages.generations.tolist(), pages.contents.tolist(), strict=True)
    assert list(found) == expected
    assert pages.num_pages == len(expected)
    assert pages.num_columns == len(expected) * PAGE_SIZE
    assert pages.held.tolist() == [number for number, _, _ in expected[num_prefix:]]


def test_generation_is_that_of_the_moment_in_which_the_page_was_got() -> None:
    ledger = PageLedger(1)
    pages = RowPages(PAGE_SIZE)
    pages.append(allocated(ledger, 1, 1), ledger)
    before = int(ledger.generation[0])
    ledger.release([0], 1)
    allocated(ledger, 1, 1)
    assert pages.generations.tolist() == [before] != [int(ledger.generation[0])]


@pytest.mark.parametrize(("max_columns", "num_pages"), [(1, 1), (16, 1), (17, 2), (48, 3)])
def test_more_pages_than_the_row_can_need_are_refused_and_change_nothing(max_columns: int, num_pages: int) -> None:
    ledger = PageLedger(8)
    pages = RowPages(max_columns)
    pages.append(allocated(ledger, 1, num_pages), ledger)
    with pytest.raises(RuntimeError, match="more than the row can ever need"):
        pages.append(allocated(ledger, 1, 1), ledger)
    assert pages.num_pages == num_pages


def test_own_pages_that_became_shared_are_marked_and_the_others_stay_as_they_were() -> None:
    ledger = PageLedger(8)
    pages = RowPages(6 * PAGE_SIZE)
    pages.append_prefix(allocated(ledger, 1, 1), ledger, ids(70))
    pages.append(allocated(ledger, 1, 1), ledger, ids(80))
    pages.append(allocated(ledger, 1, 3), ledger)
    pages.mark_shared(1, ids(NO_CONTENT, 81, NO_CONTENT))
    assert pages.contents.tolist() == [70, 80, 81, NO_CONTENT, NO_CONTENT]
    pages.mark_shared(1, ids(NO_CONTENT, NO_CONTENT, 82))
    assert pages.contents.tolist() == [70, 80, 81, 82, NO_CONTENT]


def test_row_without_a_prefix_holds_all_its_pages() -> None:
    ledger = PageLedger(4)
    pages = RowPages(4 * PAGE_SIZE)
    pages.append(allocated(ledger, 1, 3), ledger)
    assert pages.held.tolist() == pages.numbers.tolist() == [0, 1, 2]
