"""What ledger and rows say of pages: owners, generations, contents and copied tails, each damaged by itself.

The plan is built from what the rows hold and agrees with them: only the ledger, or what a row's request expects, knows
better.
"""

from collections.abc import Callable
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings

from server.engine.isolation import Claim
from server.engine.pages import FREE, NO_CONTENT, PAGE_SIZE, SHARED
from server.engine.row_pages import RowPages
from tests.unit.engine.batches import (
    NUM_PAGES,
    Batch,
    World,
    allocated,
    batches,
    free_for_good,
    make_batch,
    make_claim,
    used_pages,
)

thoroughly = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow]
)


def set_owner(batch: Batch, page: int, value: int) -> None:
    batch.ledger.owner[page] = value


def set_generation(batch: Batch, page: int, value: int) -> None:
    batch.ledger.generation[page] = value


def set_content(batch: Batch, page: int, value: int) -> None:
    assume(batch.ledger.owner[page] == SHARED)
    batch.ledger.content[page] = value


def set_tail(batch: Batch, page: int, value: int) -> None:
    assume(batch.ledger.owner[page] != SHARED)
    batch.ledger.tail_uid[page] = value


@pytest.mark.parametrize("damage", [set_owner, set_generation, set_content, set_tail])
@thoroughly
@given(data=st.data())
def test_ledger_that_changes_under_a_page_blames_the_rows_that_read_it_and_no_other(
    damage: Callable[[Batch, int, int], None], data: st.DataObject
) -> None:
    batch = data.draw(batches())
    entry = data.draw(st.integers(0, len(batch.packed) - 1))
    page = data.draw(st.sampled_from(used_pages(batch.packed[entry])))
    ledger = batch.ledger
    truth = [int(array[page]) for array in (ledger.owner, ledger.generation, ledger.content, ledger.tail_uid)]
    damage(batch, page, data.draw(st.integers(FREE, NUM_PAGES).filter(lambda value: value not in truth)))
    assert batch.blamed() == batch.holders_of(page)


@thoroughly
@given(data=st.data())
def test_page_freed_and_given_away_blames_the_rows_that_lost_it(data: st.DataObject) -> None:
    batch = data.draw(batches())
    ledger = batch.ledger
    entry = data.draw(st.integers(0, len(batch.packed) - 1))
    page = data.draw(st.sampled_from(used_pages(batch.packed[entry])))
    owner, content, tail_uid = int(ledger.owner[page]), int(ledger.content[page]), int(ledger.tail_uid[page])
    losers = batch.holders_of(page)
    free_for_good(ledger, page)
    assert batch.blamed() == losers
    serial = owner if owner != SHARED else 7777
    assert allocated(ledger, serial, 1).tolist() == [page]
    if owner == SHARED:
        ledger.share(page, serial, content)
    else:
        ledger.stamp_tail(page, serial, tail_uid)
    assert batch.blamed() == losers, "the generation tells the page's second life from its first"


def check_alone(world: World, claim: Claim) -> list[str]:
    return [violation.reason for violation in make_batch(world.ledger, [claim]).check()]


def claim_after(pages: RowPages, serial: int, prompt: str | None = None) -> Claim:
    """The row computes one token in the first column of its last page."""
    return make_claim(serial, pages, start_column=(pages.num_pages - 1) * PAGE_SIZE, token_ids=[7], prompt=prompt)


ANOTHER = "its shared page holds another text or prompt"
FOREIGN_TAIL = "its page begins with another prefix"


@pytest.mark.parametrize(
    ("whose", "page"),
    [
        ({"tenant": "b", "prompt": "r", "texts": [1, 2]}, 1),
        ({"tenant": "a", "prompt": "q", "texts": [1, 2]}, 1),
        ({"tenant": "a", "prompt": None, "texts": [1, 2]}, 1),
        ({"tenant": "a", "prompt": "r", "texts": [3, 2]}, 1),
        ({"tenant": "a", "prompt": "r", "texts": [3, 2]}, 2),
        ({"tenant": "a", "prompt": "q", "texts": []}, 0),
    ],
    ids=["tenant", "prompt", "bare backbone", "text", "the same tokens behind another text", "prefix"],
)
def test_shared_page_of_another_is_caught_by_its_content(whose: dict[str, object], page: int) -> None:
    """Everything agrees but what the request expects: the row was given the page when it was admitted."""
    world = World()
    theirs = world.add_row(2, num_own=1, **whose)  # type: ignore[arg-type]
    mine = world.add_row(1, prompt="r", tenant="a", texts=[1, 2], num_own=1)
    sound = claim_after(mine, 1, "r")
    assert check_alone(world, sound) == []
    source = page if whose["prompt"] is not None or page == 0 else page - 1
    source = source + 1 if whose["prompt"] == "q" and page > 0 else source
    assert theirs.numbers[source] != mine.numbers[page]
    pages, generations = sound.pages.copy(), sound.generations.copy()
    pages[page], generations[page] = theirs.numbers[source], theirs.generations[source]
    assert check_alone(world, replace(sound, pages=pages, generations=generations)) == [ANOTHER]


def test_rows_of_one_tenant_prompt_and_text_share_pages_and_another_tenant_shares_the_prefix_alone() -> None:
    world = World()
    one = world.add_row(1, prompt="r", tenant="a", texts=[1, 2], num_own=1)
    same = world.add_row(2, prompt="r", tenant="a", texts=[1, 2], num_own=1)
    other = world.add_row(3, prompt="r", tenant="b", texts=[1, 2], num_own=1)
    assert one.numbers[:3].tolist() == same.numbers[:3].tolist()
    assert (one.numbers == other.numbers).tolist() == [True, False, False, False]
    batch = make_batch(world.ledger, [claim_after(pages, i, "r") for i, pages in enumerate((one, same, other), 1)])
    assert batch.check() == []


@pytest.mark.parametrize("start_column", [0, PAGE_SIZE - 1])
def test_writing_into_a_shared_page_is_caught(start_column: int) -> None:
    world = World()
    pages = world.add_row(1, prompt=None, tenant="a", texts=[1], num_own=1)
    claim = make_claim(1, pages, start_column=start_column, token_ids=[7])
    assert check_alone(world, claim) == ["it would write into a shared page"]


def test_chunk_that_begins_in_a_shared_page_is_caught_although_it_ends_in_its_own() -> None:
    world = World()
    pages = world.add_row(1, prompt=None, tenant="a", texts=[1], num_own=1)
    claim = make_claim(1, pages, start_column=PAGE_SIZE - 1, token_ids=[7, 8])
    assert check_alone(world, claim) == ["it would write into a shared page"]


def test_row_that_takes_a_shared_page_for_its_own_is_caught() -> None:
    world = World()
    pages = world.add_row(1, prompt=None, tenant="a", texts=[1], num_own=1)
    claim = make_claim(1, pages, start_column=3, token_ids=[7])
    assert check_alone(world, replace(claim, contents=np.full(2, NO_CONTENT))) == ["its page belongs to another row"]


def test_row_that_takes_its_own_page_for_a_shared_one_is_caught() -> None:
    world = World()
    pages = world.add_row(1, prompt=None, tenant="a", texts=[], num_own=2)
    claim = make_claim(1, pages, start_column=PAGE_SIZE, token_ids=[7])
    contents = np.array([99, NO_CONTENT])
    assert check_alone(world, replace(claim, contents=contents)) == ["its shared page is shared no more"]


def test_tail_of_another_prefix_is_caught() -> None:
    world = World()
    pages = world.add_row(1, prompt="r", tenant="a", texts=[], num_own=2)
    claim = claim_after(pages, 1, "r")
    assert check_alone(world, claim) == []
    assert check_alone(world, replace(claim, prefix_uid=claim.prefix_uid + 1)) == [FOREIGN_TAIL]


def test_tail_that_was_never_copied_is_caught() -> None:
    world = World()
    pages = world.add_row(1, prompt=None, tenant="a", texts=[], num_own=1)
    claim = make_claim(1, pages, start_column=5, token_ids=[7], prompt="p")
    assert check_alone(world, claim) == [FOREIGN_TAIL]


def test_tail_in_the_page_of_a_row_without_a_prompt_is_caught() -> None:
    world = World()
    pages = world.add_row(1, prompt="p", tenant="a", texts=[], num_own=1)
    assert check_alone(world, make_claim(1, pages, start_column=5, token_ids=[7])) == [FOREIGN_TAIL]


def test_tail_within_a_shared_page_is_vouched_for_by_its_content() -> None:
    world = World()
    pages = world.add_row(1, prompt="p", tenant="a", texts=[4], num_own=1)
    claim = claim_after(pages, 1, "p")
    assert int(world.ledger.tail_uid[pages.numbers[0]]) != claim.prefix_uid
    assert check_alone(world, claim) == []
