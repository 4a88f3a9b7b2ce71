"""The run-time check of a plan: silent on every healthy plan, and no single damaged index passes it.

Mutations are made systematically: for every index that a plan holds, hypothesis picks an element and a wrong value, in
range or out of it. Each must blame a row that the damage touches, and none may raise: an exception would end every row.
What the ledger and the rows say of shared pages is damaged in `test_isolation_of_shared_pages`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings

from server.engine.isolation import check_plan
from server.engine.pages import PAGE_SIZE
from tests.unit.engine.batches import Batch, World, batches, make_batch, make_claim

thoroughly = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow]
)


@dataclass(frozen=True, slots=True)
class Spot:
    """One number of the plan: how to read and write it, and which entries suffer when it is wrong."""

    get: Callable[[], int]
    put: Callable[[int], None]
    affected: frozenset[int]
    limit: int
    """The largest value that fits its array."""
    redirects: bool = False
    """Whether the value names a token, so that the entry of the token it is changed to suffers as well."""


def owners_of(batch: Batch) -> list[int]:
    """The entry of each token of the packed batch, from the claims alone."""
    return [entry for entry, claim in enumerate(batch.packed) for _ in range(claim.num_tokens)]


def in_array(array: Any, index: int | tuple[int, int], affected: set[int], *, redirects: bool = False) -> Spot:
    def put(value: int) -> None:
        array[index] = value

    limit = int(np.iinfo(array.dtype).max)
    return Spot(lambda: int(array[index]), put, frozenset(affected), limit, redirects)


def spots(batch: Batch, name: str) -> list[Spot]:
    """Every place of the plan that `name` stands for."""
    plan, owner = batch.plan, owners_of(batch)
    everyone = set(range(len(batch.packed)))
    if name in ("token_ids", "token_sources", "positions", "write_slots"):
        return [in_array(getattr(plan, name), token, {owner[token]}) for token in range(plan.num_tokens)]
    if name == "lengths":
        return [in_array(plan.lengths, row, {row}) for row in everyone]
    if name == "query_starts":
        return [in_array(plan.query_starts, i, {i - 1, i} & everyone) for i in range(len(everyone) + 1)]
    if name == "page_table":
        rows, width = plan.page_table.shape
        return [in_array(plan.page_table, (row, page), {row}) for row in range(rows) for page in range(width)]
    if name == "logits_tokens":
        entries = [owner[token] for token in plan.logits_tokens.tolist()]
        return [in_array(plan.logits_tokens, i, {entry}, redirects=True) for i, entry in enumerate(entries)]
    if name == "logits_entries":
        return [in_array(plan.logits_entries, i, {entry}) for i, entry in enumerate(plan.logits_entries.tolist())]
    assert name == "num_decoding"
    return [
        Spot(lambda: plan.num_decoding, lambda v: setattr(plan, "num_decoding", v), frozenset(everyone), 2**62),
    ]


NAMES = (
    "token_ids",
    "token_sources",
    "positions",
    "query_starts",
    "lengths",
    "page_table",
    "write_slots",
    "logits_tokens",
    "logits_entries",
    "num_decoding",
)

wrong_values = st.one_of(
    st.integers(-3, 40), st.integers(-600, 2000), st.sampled_from([2**31 - 1, -(2**31), 2**40, -(2**40), 10**6])
)


@thoroughly
@given(batches())
def test_healthy_plan_has_no_violation(batch: Batch) -> None:
    assert batch.check() == []


@pytest.mark.parametrize("name", NAMES)
@thoroughly
@given(data=st.data())
def test_any_wrong_index_blames_a_row_that_it_touches(name: str, data: st.DataObject) -> None:
    batch = data.draw(batches())
    places = spots(batch, name)
    assume(places)
    spot = data.draw(st.sampled_from(places))
    value = data.draw(st.one_of(wrong_values, st.sampled_from([other.get() for other in places])))
    assume(value != spot.get() and -spot.limit - 1 <= value <= spot.limit)
    owner = owners_of(batch)
    affected = set(spot.affected)
    if spot.redirects and 0 <= value < len(owner):
        affected.add(owner[value])
    spot.put(value)
    assert batch.blamed() & affected


@thoroughly
@given(data=st.data())
def test_two_indices_exchanged_blame_a_row_that_they_touch(data: st.DataObject) -> None:
    """The likeliest fault of all: every value is somebody's, but not this one's."""
    batch = data.draw(batches(min_rows=2))
    places = spots(batch, data.draw(st.sampled_from(NAMES)))
    assume(len(places) > 1)
    one, other = data.draw(st.permutations(places))[:2]
    assume(one.get() != other.get())
    value = one.get()
    one.put(other.get())
    other.put(value)
    assert batch.blamed() & (one.affected | other.affected)


@pytest.mark.parametrize("damage", ["pages", "start_column", "token_ids", "source", "vectors", "exchanged"])
@thoroughly
@given(data=st.data())
def test_wrong_entry_is_blamed(damage: str, data: st.DataObject) -> None:
    """The dense path reads the entries themselves, and the packed one replaces their vectors."""
    batch = data.draw(batches(min_rows=2))
    entries = batch.plan.entries
    one, other = data.draw(st.permutations(range(len(entries))))[:2]
    entry = entries[one]
    if damage == "pages":
        entries[one] = replace(entry, pages=entries[other].pages)
    elif damage == "start_column":
        entries[one] = replace(entry, start_column=entry.start_column + data.draw(st.sampled_from([-1, 1, 40])))
    elif damage == "token_ids":
        entries[one] = replace(entry, token_ids=[*entry.token_ids[:-1], entry.token_ids[-1] + 1])
    elif damage == "source":
        entries[one] = replace(entry, source=0 if entry.source is None else None)
    elif damage == "vectors":
        entries[one] = replace(entry, vectors=torch.zeros(entry.num_tokens, 4))
    else:
        entries[one], entries[other] = entries[other], entries[one]
        assert batch.blamed() == {one, other}
        return
    assert batch.blamed() == {one}


def two_rows() -> Batch:
    """A decoding row and a chunk over a page border; both want their last token's logits."""
    world = World()
    claims = []
    for serial, token_ids in ((1, [7]), (2, [8, 9, 10])):
        pages = world.add_row(serial, prompt=None, tenant="a", texts=[], num_own=2)
        claims.append(make_claim(serial, pages, start_column=14, token_ids=token_ids))
    return make_batch(world.ledger, claims)


def two_rows_that_await_their_tokens() -> Batch:
    batch = two_rows()
    return make_batch(batch.ledger, [replace(claim, awaits_token=True) for claim in batch.claims])


def test_rows_that_take_each_others_tokens_are_both_blamed() -> None:
    batch = two_rows_that_await_their_tokens()
    assert batch.check() == []
    sources, places = batch.plan.token_sources, [0, 3]
    sources[places] = sources[places[::-1]]
    assert [(v.entry, v.reason) for v in batch.check()] == [(i, "it would take another row's token") for i in (0, 1)]


def test_token_that_was_sampled_for_another_row_is_not_taken_although_plan_and_row_agree() -> None:
    """The sample lies in another order than the one that the rows were told of."""
    batch = two_rows_that_await_their_tokens()
    batch.sampled_for = batch.sampled_for[::-1].copy()
    assert batch.blamed() == {0, 1}


@pytest.mark.parametrize("place", [-2, 4, 10**9])
def test_token_that_was_not_sampled_is_not_taken(place: int) -> None:
    batch = two_rows_that_await_their_tokens()
    batch.plan.token_sources[0] = place
    assert [(v.entry, v.reason) for v in batch.check()] == [(0, "it would take a token that was not sampled")]


def test_row_that_awaits_its_token_when_nothing_was_sampled_is_blamed() -> None:
    batch = two_rows_that_await_their_tokens()
    assert {v.entry for v in check_plan(batch.plan, batch.packed, batch.ledger)} == {0, 1}


def test_prefix_that_the_request_did_not_name_blames_its_row() -> None:
    batch = two_rows()
    batch.packed[1] = replace(batch.packed[1], prefix_matches=False)
    assert [(v.entry, v.reason) for v in batch.check()] == [
        (1, "its prefix is not the one that its request named"),
    ]


def test_rows_that_decode_must_come_first() -> None:
    batch = two_rows()
    chunk_first = make_batch(batch.ledger, batch.claims)
    plan = chunk_first.plan
    # Everything else agrees with this order.
    plan.entries.reverse()
    for name in ("token_ids", "token_sources", "positions", "write_slots"):
        array = getattr(plan, name)
        setattr(plan, name, np.concatenate([array[1:], array[:1]]))
    plan.query_starts = np.array([0, 3, 4], dtype=np.int32)
    plan.lengths, plan.page_table = plan.lengths[::-1].copy(), np.ascontiguousarray(plan.page_table[::-1])
    plan.logits_tokens = np.array([2, 3])
    reasons = [v.reason for v in check_plan(plan, batch.packed[::-1], batch.ledger)]
    assert reasons == ["decoding rows and chunks are mixed up"] * 2


def test_plan_of_another_number_of_rows_blames_all() -> None:
    batch = two_rows()
    third = batch.packed[0]
    assert [v.entry for v in check_plan(batch.plan, [*batch.packed, third], batch.ledger)] == [0, 1, 2]


@pytest.mark.parametrize("change", [lambda array: array[:-1], lambda array: np.append(array, array[-1:], axis=0)])
@pytest.mark.parametrize(
    "name", ["token_ids", "token_sources", "positions", "write_slots", "query_starts", "lengths", "page_table"]
)
def test_array_of_another_length_blames_all(name: str, change: Callable[[Any], Any]) -> None:
    batch = two_rows()
    setattr(batch.plan, name, change(getattr(batch.plan, name)))
    assert batch.blamed() == {0, 1}


@pytest.mark.parametrize("name", ["logits_tokens", "logits_entries"])
def test_logits_of_another_number_than_their_entries_blame_all(name: str) -> None:
    batch = two_rows()
    setattr(batch.plan, name, getattr(batch.plan, name)[:-1])
    assert batch.blamed() == {0, 1}


def test_row_that_wants_logits_and_gets_none_is_blamed() -> None:
    batch = two_rows()
    batch.plan.logits_tokens = batch.plan.logits_tokens[:-1]
    batch.plan.logits_entries = batch.plan.logits_entries[:-1]
    assert batch.blamed() == {1}


def test_logits_asked_for_twice_blame_all() -> None:
    batch = two_rows()
    batch.plan.logits_tokens = np.append(batch.plan.logits_tokens, batch.plan.logits_tokens[-1])
    batch.plan.logits_entries = np.append(batch.plan.logits_entries, batch.plan.logits_entries[-1])
    assert batch.blamed() == {0, 1}


def test_page_table_that_is_too_narrow_blames_all() -> None:
    batch = two_rows()
    batch.plan.page_table = batch.plan.page_table[:, :1]
    assert batch.blamed() == {0, 1}


def test_page_named_behind_a_rows_last_is_caught_and_room_behind_it_is_not() -> None:
    batch = two_rows()
    wider = np.pad(batch.plan.page_table, ((0, 0), (0, 1)), constant_values=-1)
    batch.plan.page_table = wider
    assert batch.blamed() == set()
    # Not even a page of the row's own: nothing of this step belongs there.
    wider[0, 2] = batch.packed[0].pages[1]
    assert batch.blamed() == {0}


@pytest.mark.parametrize("pages", [[0, 10**6], [-1, 1], [0]])
def test_row_that_claims_pages_which_are_not_there_is_blamed_alone(pages: list[int]) -> None:
    batch = two_rows()
    batch.packed[1] = replace(batch.packed[1], pages=np.array(pages, dtype=np.int32), tail_page=1)
    assert batch.blamed() == {1}


def test_row_that_lies_in_the_last_column_of_its_last_page_is_healthy() -> None:
    world = World()
    pages = world.add_row(1, prompt=None, tenant="a", texts=[], num_own=2)
    batch = make_batch(world.ledger, [make_claim(1, pages, start_column=2 * PAGE_SIZE - 1, token_ids=[7])])
    assert batch.check() == []
