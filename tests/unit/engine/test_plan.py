"""The plan's index arrays, read back one by one, say of every token exactly what its row meant."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from server.engine.pages import PAGE_SIZE
from server.engine.plan import NO_PAGE, NO_SOURCE, PlanEntry, StepPlan, build_plan
from tests.unit.engine.batches import Batch, batches

quickly = settings(max_examples=40, deadline=None)

Place = tuple[int, int]
"""Page and offset."""


def entry(*pages: int, start: int = 5, tokens: tuple[int, ...] = (9,), logits_from: int = 0) -> PlanEntry:
    return PlanEntry(np.array(pages, dtype=np.int32), start, tokens, logits_from)


def meant(batch: Batch) -> Counter[tuple[int, int, Place, tuple[Place, ...], bool]]:
    """What the rows want, a token: its id and position, where it is written, what it sees, whether it needs logits."""
    wanted: Counter[tuple[int, int, Place, tuple[Place, ...], bool]] = Counter()
    for row in batch.claims:
        for i, token_id in enumerate(row.token_ids):
            column = row.start_column + i
            places = tuple((int(row.pages[c // PAGE_SIZE]), c % PAGE_SIZE) for c in range(column + 1))
            wanted[token_id, column, places[-1], places, i >= row.num_tokens - row.num_logits] += 1
    return wanted


def made(plan: StepPlan) -> Counter[tuple[int, int, Place, tuple[Place, ...], bool]]:
    """The same, read from the arrays alone, by the definitions in `PagedBatch`."""
    found: Counter[tuple[int, int, Place, tuple[Place, ...], bool]] = Counter()
    with_logits = set(plan.logits_tokens.tolist())
    for row, length in enumerate(plan.lengths.tolist()):
        first, end = plan.query_starts[row : row + 2].tolist()
        for token in range(first, end):
            last = length - (end - first) + (token - first)
            places = tuple((int(plan.page_table[row, c // PAGE_SIZE]), c % PAGE_SIZE) for c in range(last + 1))
            written = divmod(int(plan.write_slots[token]), PAGE_SIZE)
            token_id, position = int(plan.token_ids[token]), int(plan.positions[token])
            found[token_id, position, written, places, token in with_logits] += 1
    return found


@quickly
@given(batches())
def test_every_token_reads_and_writes_what_its_row_meant(batch: Batch) -> None:
    assert made(batch.plan) == meant(batch)


@quickly
@given(batches())
def test_entries_follow_each_other_without_gaps_and_logits_name_their_entry(batch: Batch) -> None:
    plan = batch.plan
    owner: list[int] = []
    starts = plan.query_starts.tolist()
    for number, packed in enumerate(plan.entries):
        assert starts[number] == len(owner)
        assert plan.token_ids[starts[number] : starts[number + 1]].tolist() == list(packed.token_ids)
        assert int(plan.lengths[number]) == packed.length
        owner += [number] * packed.num_tokens
    assert starts[-1] == len(owner) == plan.num_tokens
    assert plan.logits_entries.tolist() == [owner[token] for token in plan.logits_tokens.tolist()]
    assert sorted(plan.logits_tokens.tolist()) == plan.logits_tokens.tolist()


@quickly
@given(batches())
def test_token_that_only_the_device_knows_is_the_last_of_its_segment_and_no_other(batch: Batch) -> None:
    plan = batch.plan
    expected = [NO_SOURCE] * plan.num_tokens
    for packed, end in zip(plan.entries, plan.query_starts[1:].tolist(), strict=True):
        if packed.source is not None:
            expected[end - 1] = packed.source
    assert plan.token_sources.tolist() == expected
    assert plan.takes_samples == any(packed.source is not None for packed in plan.entries)


@quickly
@given(batches())
def test_order_maps_packed_entries_to_those_given(batch: Batch) -> None:
    plan, order = build_plan(batch.entries)
    assert sorted(order) == list(range(len(batch.entries)))
    assert all(packed is batch.entries[i] for packed, i in zip(plan.entries, order, strict=True))


@quickly
@given(batches())
def test_page_table_names_no_page_behind_a_rows_last_column(batch: Batch) -> None:
    plan = batch.plan
    for row, packed in enumerate(plan.entries):
        needed = -(-packed.length // PAGE_SIZE)
        assert plan.page_table[row, :needed].tolist() == packed.pages[:needed].tolist()
        assert set(plan.page_table[row, needed:].tolist()) <= {NO_PAGE}
    assert plan.page_table.shape[1] == max(-(-packed.length // PAGE_SIZE) for packed in plan.entries)


@quickly
@given(batches())
def test_batch_of_the_kernels_is_the_plan_itself(batch: Batch) -> None:
    plan = batch.plan
    given_to_kernels = plan.batch(torch.device("cpu"))
    for name, dtype in (
        ("page_table", torch.int32),
        ("lengths", torch.int32),
        ("query_starts", torch.int32),
        ("write_slots", torch.int64),
    ):
        tensor, array = getattr(given_to_kernels, name), getattr(plan, name)
        assert (tensor.dtype, tensor.is_contiguous()) == (dtype, True)
        # What was checked is what is read: no copy lies between them.
        assert np.shares_memory(tensor.numpy(), array)
    assert given_to_kernels.num_decoding == sum(row.num_tokens == 1 for row in batch.claims)
    assert given_to_kernels.max_length == max(row.start_column + row.num_tokens for row in batch.claims)


def test_decoding_rows_come_before_chunks_each_in_the_order_given() -> None:
    plan, order = build_plan([entry(4, tokens=(1, 2, 3)), entry(0), entry(7, tokens=(4, 5)), entry(2)])
    assert order == [1, 3, 0, 2]
    assert plan.num_decoding == 2
    assert plan.query_starts.tolist() == [0, 1, 2, 5, 7]


def test_chunk_over_a_page_border_is_written_to_both_pages() -> None:
    plan, _ = build_plan([entry(8, 3, start=PAGE_SIZE - 2, tokens=(1, 2, 3))])
    assert plan.write_slots.tolist() == [8 * PAGE_SIZE + 14, 8 * PAGE_SIZE + 15, 3 * PAGE_SIZE]
    assert plan.page_table.tolist() == [[8, 3]]


def test_no_logits_are_computed_for_entries_that_want_none() -> None:
    plan, _ = build_plan([entry(0, logits_from=1), entry(1, tokens=(1, 2, 3), logits_from=3)])
    assert plan.logits_tokens.tolist() == []
    assert plan.logits_entries.tolist() == []


def test_dtypes_are_those_of_the_kernels() -> None:
    plan, _ = build_plan([entry(0), entry(3), entry(1, tokens=(1, 2))])
    wide = [plan.token_ids, plan.positions, plan.write_slots, plan.logits_tokens, plan.logits_entries]
    assert {array.dtype for array in wide} == {np.dtype(np.int64)}
    narrow = [plan.query_starts, plan.lengths, plan.page_table]
    assert {array.dtype for array in narrow} == {np.dtype(np.int32)}


def test_arrays_share_memory_neither_with_each_other_nor_with_a_rows_own_pages() -> None:
    # Were two of them one array, damage to it would look consistent to whoever compares the two.
    entries = [entry(0), entry(1, tokens=(1, 2))]
    plan, _ = build_plan(entries)
    arrays = [plan.token_ids, plan.positions, plan.query_starts, plan.lengths, plan.page_table, plan.write_slots]
    arrays += [entry.pages for entry in entries]
    for i, one in enumerate(arrays):
        assert not any(np.shares_memory(one, other) for other in arrays[i + 1 :])


def test_empty_entry_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        build_plan([entry(0), entry(1, tokens=())])


def test_entry_that_fills_its_pages_is_planned_and_one_more_token_is_refused() -> None:
    full = entry(0, 5, start=2 * PAGE_SIZE - 2, tokens=(1, 2))
    build_plan([full])
    with pytest.raises(ValueError, match="33 columns leave 2 pages of 16"):
        build_plan([replace(full, start_column=2 * PAGE_SIZE - 1)])
