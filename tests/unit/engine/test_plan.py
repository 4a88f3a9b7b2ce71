"""The plan's index arrays, read back one by one, say of every token exactly what its row meant."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings

from server.engine.plan import MAX_HOLE, DecodeRead, PlanEntry, StepPlan, build_plan
from server.engine.slots import Slot
from tests.unit.engine.batches import Batch, batches

quickly = settings(max_examples=40, deadline=None)

Place = tuple[int, int, int]
"""Slab, slot, column."""


def entry(
    index: int, *, slab: int = 1, start: int = 5, tokens: tuple[int, ...] = (9,), logits_from: int = 0, owner: int = 0
) -> PlanEntry:
    serial = owner or 100 * slab + index + 1
    return PlanEntry(Slot(slab, index, 128, serial, serial), start, tokens, logits_from)


def meant(batch: Batch) -> Counter[tuple[int, Place, tuple[Place, ...], bool]]:
    """What the rows want, a token: its id, where it is written, what it sees, whether its logits are wanted."""
    wanted: Counter[tuple[int, Place, tuple[Place, ...], bool]] = Counter()
    for row in batch.claims:
        for i, token_id in enumerate(row.token_ids):
            column = row.start_column + i
            places = tuple((row.slot.slab, row.slot.index, c) for c in range(column + 1))
            wanted[token_id, places[-1], places, i >= row.num_tokens - row.num_logits] += 1
    return wanted


def written_places(plan: StepPlan) -> dict[int, Place]:
    places: dict[int, Place] = {}
    for write in plan.writes:
        for token, slot, column in zip(
            write.tokens.tolist(), write.slots.tolist(), write.columns.tolist(), strict=True
        ):
            assert token not in places, "a token is written twice"
            places[token] = (write.slab, slot, column)
    return places


def seen_places(plan: StepPlan) -> dict[int, tuple[Place, ...]]:
    """What each token's answer is made of, by the definitions in the plan's docstrings."""
    seen: dict[int, tuple[Place, ...]] = {}
    for read in plan.decode_reads:
        for slot, token in zip(read.result_slots.tolist(), read.result_tokens.tolist(), strict=True):
            assert token not in seen, "a token is answered twice"
            assert int(read.query_tokens[slot]) == token, "another token's question is answered"
            seen[token] = tuple((read.slab, read.first_slot + slot, c) for c in range(int(read.lengths[slot])))
    for prefill in plan.prefill_reads:
        for i in range(prefill.num_tokens):
            assert prefill.first_token + i not in seen, "a token is answered twice"
            columns = range(prefill.start_column + i + 1)
            seen[prefill.first_token + i] = tuple((prefill.slab, prefill.slot, c) for c in columns)
    return seen


@quickly
@given(batches())
def test_every_token_reads_and_writes_what_its_row_meant(batch: Batch) -> None:
    plan = batch.plan
    written, seen = written_places(plan), seen_places(plan)
    with_logits = set(plan.logits_tokens.tolist())
    made = Counter(
        (int(plan.token_ids[token]), written[token], seen[token], token in with_logits)
        for token in range(plan.num_tokens)
    )
    assert made == meant(batch)


@quickly
@given(batches())
def test_position_of_a_token_is_its_column(batch: Batch) -> None:
    written = written_places(batch.plan)
    assert batch.plan.positions.tolist() == [written[token][2] for token in range(batch.plan.num_tokens)]


@quickly
@given(batches())
def test_entries_follow_each_other_without_gaps_and_logits_name_their_entry(batch: Batch) -> None:
    plan = batch.plan
    owner: list[int] = []
    for number, (packed, first, count) in enumerate(
        zip(plan.entries, plan.first_tokens.tolist(), plan.counts.tolist(), strict=True)
    ):
        assert first == len(owner)
        assert count == packed.num_tokens
        assert plan.token_ids[first : first + count].tolist() == list(packed.token_ids)
        owner += [number] * count
    assert len(owner) == plan.num_tokens
    assert plan.logits_entries.tolist() == [owner[token] for token in plan.logits_tokens.tolist()]
    assert sorted(plan.logits_tokens.tolist()) == plan.logits_tokens.tolist()


@quickly
@given(batches())
def test_order_maps_packed_entries_to_those_given(batch: Batch) -> None:
    plan, order = build_plan(batch.entries)
    assert sorted(order) == list(range(len(batch.entries)))
    assert all(packed is batch.entries[i] for packed, i in zip(plan.entries, order, strict=True))


@quickly
@given(batches())
def test_decode_reads_span_no_wide_hole_and_are_dense_exactly_without_holes(batch: Batch) -> None:
    for read in batch.plan.decode_reads:
        used = read.result_slots.tolist()
        assert used[0] == 0
        assert used[-1] == read.num_slots - 1
        assert all(later - earlier <= MAX_HOLE + 1 for earlier, later in pairwise(used))
        assert read.is_dense == (used == list(range(read.num_slots)))
        assert read.result_tokens.tolist() == list(range(read.result_tokens[0], read.result_tokens[0] + len(used)))
        # An unused slot inside the run asks some token of the batch and sees at least one column, else NaN comes out.
        assert int(read.lengths.min()) >= 1
        assert 0 <= int(read.query_tokens.min()) <= int(read.query_tokens.max()) < batch.plan.num_tokens


def decode_reads(*indices: int) -> list[DecodeRead]:
    plan, _ = build_plan([entry(index) for index in indices])
    return plan.decode_reads


def test_hole_of_the_limit_is_spanned_and_a_wider_one_begins_a_new_read() -> None:
    assert [read.num_slots for read in decode_reads(0, MAX_HOLE + 1)] == [MAX_HOLE + 2]
    assert [read.first_slot for read in decode_reads(0, MAX_HOLE + 2)] == [0, MAX_HOLE + 2]


def test_same_slot_index_in_two_slabs_is_read_twice() -> None:
    plan, _ = build_plan([entry(2, slab=2), entry(2, slab=1), entry(3, slab=2)])
    assert [(read.slab, read.first_slot, read.num_slots) for read in plan.decode_reads] == [(1, 2, 1), (2, 2, 2)]
    assert [write.slab for write in plan.writes] == [1, 2]


def test_decoding_rows_come_before_chunks_whatever_their_slots() -> None:
    plan, order = build_plan([entry(0, tokens=(1, 2, 3)), entry(1), entry(0, slab=2, tokens=(4, 5))])
    assert order == [1, 0, 2]
    assert [(read.first_token, read.num_tokens) for read in plan.prefill_reads] == [(1, 3), (4, 2)]


def test_no_logits_are_computed_for_entries_that_want_none() -> None:
    plan, _ = build_plan([entry(0, logits_from=1), entry(1, tokens=(1, 2, 3), logits_from=3)])
    assert plan.logits_tokens.tolist() == []
    assert plan.logits_entries.tolist() == []


def test_index_arrays_are_int64() -> None:
    plan, _ = build_plan([entry(0), entry(3), entry(1, tokens=(1, 2))])
    arrays = [plan.token_ids, plan.positions, plan.first_tokens, plan.counts, plan.logits_tokens, plan.logits_entries]
    for write in plan.writes:
        arrays += [write.tokens, write.slots, write.columns]
    for read in plan.decode_reads:
        arrays += [read.query_tokens, read.lengths, read.result_slots, read.result_tokens]
    assert {array.dtype for array in arrays} == {np.dtype(np.int64)}


def test_positions_and_write_columns_do_not_share_memory() -> None:
    # Were they one array, damage to it would look consistent to whoever compares the two.
    plan, _ = build_plan([entry(0), entry(1, tokens=(1, 2))])
    assert not any(np.shares_memory(plan.positions, write.columns) for write in plan.writes)


def test_empty_entry_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        build_plan([entry(0), entry(1, tokens=())])


def test_entry_that_fills_its_slot_is_planned_and_one_more_token_is_refused() -> None:
    full = entry(0, start=126, tokens=(1, 2))
    build_plan([full])
    with pytest.raises(ValueError, match="leave a slot of 128"):
        build_plan([replace(full, start_column=127)])
