"""The run-time check of a plan: silent on every healthy plan, and no single damaged index passes it.

Mutations are made systematically: for every index that a plan holds, hypothesis picks an element and a wrong value, in
range or out of it. Each must blame a row that the damage touches, and none may raise: an exception would end every row.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings

from server.engine.isolation import Claim, check_plan
from server.engine.slots import FREE, SlotLedger
from tests.unit.engine.batches import LONGEST_ROW, Batch, batches, make_batch

thoroughly = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow]
)


@dataclass(frozen=True, slots=True)
class Spot:
    """One number of the plan: how to read and write it, and which entries suffer when it is wrong.

    `harmless` are other values that change nobody's result (what an unused slot inside a read asks and sees).
    """

    get: Callable[[], int]
    put: Callable[[int], None]
    affected: frozenset[int]
    harmless: range = range(0)
    redirects: bool = False
    """Whether the value names a token, so that the entry of the token it is changed to suffers as well."""


def owners_of(batch: Batch) -> list[int]:
    """The entry of each token of the packed batch, from the claims alone."""
    return [entry for entry, claim in enumerate(batch.packed) for _ in range(claim.num_tokens)]


def in_array(array: Any, index: int, affected: set[int], **fields: Any) -> Spot:
    def put(value: int) -> None:
        array[index] = value

    return Spot(lambda: int(array[index]), put, frozenset(affected), **fields)


def in_field(holder: Any, name: str, affected: set[int]) -> Spot:
    return Spot(lambda: int(getattr(holder, name)), lambda v: setattr(holder, name, v), frozenset(affected))


def spots(batch: Batch, name: str) -> list[Spot]:
    """Every place of the plan that `name` stands for."""
    plan, owner = batch.plan, owners_of(batch)
    part, _, attribute = name.partition(".")
    if part in ("token_ids", "positions"):
        return [in_array(getattr(plan, part), token, {owner[token]}) for token in range(plan.num_tokens)]
    if part in ("first_tokens", "counts"):
        return [in_array(getattr(plan, part), entry, {entry}) for entry in range(len(plan.entries))]
    if part == "logits_tokens":
        entries = [owner[token] for token in plan.logits_tokens.tolist()]
        return [in_array(plan.logits_tokens, i, {entry}, redirects=True) for i, entry in enumerate(entries)]
    if part == "logits_entries":
        entries = plan.logits_entries.tolist()
        return [in_array(plan.logits_entries, i, {entry}) for i, entry in enumerate(entries)]
    found: list[Spot] = []
    for write in plan.writes if part == "writes" else []:
        entries = [owner[token] for token in write.tokens.tolist()]
        if attribute == "slab":
            found.append(in_field(write, attribute, set(entries)))
        else:
            array = getattr(write, attribute)
            found += [in_array(array, i, {entry}, redirects=attribute == "tokens") for i, entry in enumerate(entries)]
    for read in plan.decode_reads if part == "decode_reads" else []:
        entry_of_slot = {
            slot: owner[token]
            for slot, token in zip(read.result_slots.tolist(), read.result_tokens.tolist(), strict=True)
        }
        if attribute in ("slab", "first_slot"):
            found.append(in_field(read, attribute, set(entry_of_slot.values())))
        elif attribute in ("result_slots", "result_tokens"):
            array, redirects = getattr(read, attribute), attribute == "result_tokens"
            found += [
                in_array(array, i, {entry}, redirects=redirects) for i, entry in enumerate(entry_of_slot.values())
            ]
        else:
            array = getattr(read, attribute)
            unused = range(plan.num_tokens) if attribute == "query_tokens" else range(1, LONGEST_ROW + 1)
            for slot in range(read.num_slots):
                if slot in entry_of_slot:
                    found.append(in_array(array, slot, {entry_of_slot[slot]}))
                else:
                    found.append(in_array(array, slot, set(entry_of_slot.values()), harmless=unused))
    for prefill in plan.prefill_reads if part == "prefill_reads" else []:
        found.append(in_field(prefill, attribute, {owner[prefill.first_token]}))
    return found


NAMES = (
    "token_ids",
    "positions",
    "first_tokens",
    "counts",
    "writes.slab",
    "writes.tokens",
    "writes.slots",
    "writes.columns",
    "decode_reads.slab",
    "decode_reads.first_slot",
    "decode_reads.query_tokens",
    "decode_reads.lengths",
    "decode_reads.result_slots",
    "decode_reads.result_tokens",
    "prefill_reads.slab",
    "prefill_reads.slot",
    "prefill_reads.first_token",
    "prefill_reads.num_tokens",
    "prefill_reads.start_column",
    "logits_tokens",
    "logits_entries",
)

wrong_values = st.one_of(st.integers(-3, 40), st.integers(-600, 600), st.sampled_from([2**40, -(2**40), 10**6]))


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
    assume(value != spot.get())
    owner = owners_of(batch)
    affected = set(spot.affected)
    if spot.redirects and 0 <= value < len(owner):
        affected.add(owner[value])
    spot.put(value)
    for read in batch.plan.prefill_reads if name.startswith("prefill_reads") else []:
        # A read that has grown or moved answers the tokens of its neighbours.
        affected.update(owner[max(0, read.first_token) : max(0, read.first_token + read.num_tokens)])
    blamed = batch.blamed()
    if value not in spot.harmless:
        assert blamed & affected


@thoroughly
@given(data=st.data())
def test_two_indices_exchanged_blame_a_row_that_they_touch(data: st.DataObject) -> None:
    """The likeliest fault of all: every value is somebody's, but not this one's."""
    batch = data.draw(batches(min_rows=2))
    name = data.draw(st.sampled_from(NAMES))
    places = [spot for spot in spots(batch, name) if not spot.harmless]
    assume(len(places) > 1)
    one, other = data.draw(st.permutations(places))[:2]
    assume(one.get() != other.get())
    value = one.get()
    one.put(other.get())
    other.put(value)
    owner = owners_of(batch)
    if name == "logits_tokens" and owner[one.get()] == owner[other.get()]:
        # Rows of logits exchanged within one entry: it would be sampled from the wrong position.
        assert owner[one.get()] in batch.blamed()
    assert batch.blamed() & (one.affected | other.affected)


@thoroughly
@given(batches())
def test_read_with_holes_that_claims_to_be_dense_blames_its_rows(batch: Batch) -> None:
    owner = owners_of(batch)
    for read in batch.plan.decode_reads:
        if not read.is_dense:
            read.is_dense = True
            assert {owner[token] for token in read.result_tokens.tolist()} <= batch.blamed()
            read.is_dense = False
    assert batch.check() == []


@pytest.mark.parametrize("part", ["writes", "decode_reads", "prefill_reads"])
@pytest.mark.parametrize("damage", ["lost", "doubled"])
@thoroughly
@given(data=st.data())
def test_lost_or_doubled_read_or_write_blames_its_rows(part: str, damage: str, data: st.DataObject) -> None:
    batch = data.draw(batches())
    items = getattr(batch.plan, part)
    assume(items)
    index = data.draw(st.integers(0, len(items) - 1))
    owner, item = owners_of(batch), items[index]
    if part == "prefill_reads":
        affected = {owner[item.first_token]}
    else:
        tokens = item.tokens if part == "writes" else item.result_tokens
        affected = {owner[token] for token in tokens.tolist()}
    if damage == "lost":
        del items[index]
    else:
        items.append(item)
    assert batch.blamed() == affected


@pytest.mark.parametrize("damage", ["slot", "generation", "start_column", "token_ids", "exchanged"])
@thoroughly
@given(data=st.data())
def test_wrong_entry_is_blamed(damage: str, data: st.DataObject) -> None:
    """The dense path reads the entries themselves, and the packed one replaces their vectors."""
    batch = data.draw(batches(min_rows=2))
    entries = batch.plan.entries
    one, other = data.draw(st.permutations(range(len(entries))))[:2]
    entry = entries[one]
    if damage == "slot":
        entries[one] = replace(entry, slot=entries[other].slot)
    elif damage == "generation":
        entries[one] = replace(entry, slot=replace(entry.slot, generation=entry.slot.generation + 1))
    elif damage == "start_column":
        entries[one] = replace(entry, start_column=entry.start_column + data.draw(st.sampled_from([-1, 1, 40])))
    elif damage == "token_ids":
        entries[one] = replace(entry, token_ids=[*entry.token_ids[:-1], entry.token_ids[-1] + 1])
    else:
        entries[one], entries[other] = entries[other], entries[one]
        assert batch.blamed() == {one, other}
        return
    assert batch.blamed() == {one}


@pytest.mark.parametrize("name", ["lengths", "query_tokens"])
@pytest.mark.parametrize("value", [2**40, 10**6, 129, -1, -(2**40)])
def test_unused_slot_inside_a_read_that_asks_or_sees_what_does_not_exist_is_caught(name: str, value: int) -> None:
    """Nobody takes its answer, but the pass itself would fail, and with it every row of the step."""
    ledger = SlotLedger(max_tokens=LONGEST_ROW, budget_tokens=2048, slab_tokens=1024, max_slots_per_slab=8)
    slots = [ledger.allocate(serial, 100) for serial in (1, 2, 3)]
    claims = [
        Claim(slot.owner, slot, start_column=4, token_ids=[7], num_logits=1)
        for slot in (slots[0], slots[2])
        if slot is not None
    ]
    batch = make_batch(ledger, claims)
    (read,) = batch.plan.decode_reads
    assert batch.check() == []
    getattr(read, name)[1] = value
    assert batch.blamed() == {0, 1}


def set_owner(batch: Batch, claim: Claim, value: int) -> None:
    batch.ledger.slabs[claim.slot.slab].owner[claim.slot.index] = value


def set_generation(batch: Batch, claim: Claim, value: int) -> None:
    batch.ledger.slabs[claim.slot.slab].generation[claim.slot.index] = value


def set_prefix(batch: Batch, claim: Claim, value: int) -> None:
    batch.ledger.slabs[claim.slot.slab].prefix_uid[claim.slot.index] = value


@pytest.mark.parametrize("damage", [set_owner, set_generation, set_prefix])
@thoroughly
@given(data=st.data())
def test_ledger_that_changes_under_a_row_blames_it_and_no_other(
    damage: Callable[[Batch, Claim, int], None], data: st.DataObject
) -> None:
    batch = data.draw(batches())
    entry = data.draw(st.integers(0, len(batch.packed) - 1))
    claim = batch.packed[entry]
    truth = (claim.serial, claim.slot.generation, claim.prefix_uid)
    damage(batch, claim, data.draw(st.integers(FREE, 120).filter(lambda value: value not in truth)))
    assert batch.blamed() == {entry}


@thoroughly
@given(data=st.data())
def test_slot_freed_and_given_to_another_blames_the_row_that_lost_it(data: st.DataObject) -> None:
    batch = data.draw(batches())
    entry = data.draw(st.integers(0, len(batch.packed) - 1))
    claim = batch.packed[entry]
    batch.ledger.free(claim.slot)
    assert batch.blamed() == {entry}
    same_owner_again = batch.ledger.allocate(claim.serial, claim.slot.capacity)
    assert same_owner_again is not None
    batch.ledger.stamp_prefix(same_owner_again, claim.prefix_uid)
    assert batch.blamed() == {entry}, "the generation tells the row's second life from its first"


def test_slab_that_is_gone_blames_its_rows() -> None:
    batch = two_rows()
    batch.ledger.slabs.clear()
    assert batch.blamed() == {0, 1}


def test_prefix_that_the_request_did_not_name_blames_its_row() -> None:
    batch = two_rows()
    batch.packed[1] = replace(batch.packed[1], prefix_matches=False)
    assert [(v.entry, v.reason) for v in batch.check()] == [
        (1, "its prefix is not the one that its request named"),
    ]


def test_plan_of_another_number_of_rows_blames_all() -> None:
    batch = two_rows()
    third = batch.packed[0]
    assert [v.entry for v in check_plan(batch.plan, [*batch.packed, third], batch.ledger.slabs)] == [0, 1, 2]


@pytest.mark.parametrize("name", ["token_ids", "positions"])
def test_batch_of_another_length_blames_all(name: str) -> None:
    batch = two_rows()
    setattr(batch.plan, name, np.append(getattr(batch.plan, name), 1))
    assert batch.blamed() == {0, 1}


def test_row_that_wants_logits_and_gets_none_is_blamed() -> None:
    batch = two_rows()
    batch.plan.logits_tokens = batch.plan.logits_tokens[:-1]
    batch.plan.logits_entries = batch.plan.logits_entries[:-1]
    assert batch.blamed() == {1}


def two_rows() -> Batch:
    """A decoding row and a chunk, neighbours in one slab; both want their last token's logits."""
    ledger = SlotLedger(max_tokens=LONGEST_ROW, budget_tokens=2048, slab_tokens=1024, max_slots_per_slab=8)
    claims = []
    for serial, token_ids in ((1, [7]), (2, [8, 9, 10])):
        slot = ledger.allocate(serial, 100)
        assert slot is not None
        claims.append(Claim(serial, slot, start_column=4, token_ids=token_ids, num_logits=1))
    return make_batch(ledger, claims)
