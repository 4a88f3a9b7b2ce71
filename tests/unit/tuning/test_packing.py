"""Every token of a packed pass is its row's, wherever it lies."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tuning.examples import EncodedExample
from tuning.packing import PackedBatch, PromptSlot, Row, example_row, pack, split_rows

CPU = torch.device("cpu")

slots = st.lists(st.builds(PromptSlot, st.integers(0, 5), st.booleans()), min_size=1, max_size=4)


@st.composite
def rows_and_slots(draw: st.DrawFn) -> tuple[list[Row], list[PromptSlot]]:
    prompts = draw(slots)
    rows = []
    for number in range(draw(st.integers(1, 9))):
        length = draw(st.integers(1, 30))
        # Ids that say whose they are.
        ids = tuple(1000 * number + place for place in range(length))
        targets = tuple(500_000 + token_id for token_id in ids[-draw(st.integers(1, length)) :])
        rows.append(Row(draw(st.integers(0, len(prompts) - 1)), ids, targets))
    return rows, prompts


def tokens_of_groups(batch: PackedBatch, prompts: Sequence[PromptSlot]) -> list[int | None]:
    """The packed token ids in order, None for virtual tokens."""
    num_virtual = sum(prompts[prompt].num_virtual_tokens for prompt in batch.vector_prompts)
    return [None] * num_virtual + batch.token_ids.tolist()


@given(rows_and_slots())
def test_each_target_is_predicted_by_its_own_token_of_its_own_row(case: tuple[list[Row], list[PromptSlot]]) -> None:
    rows, prompts = case
    batch = pack(rows, prompts, CPU)
    packed = tokens_of_groups(batch, prompts)
    assert len(packed) == batch.num_tokens
    fields = (batch.target_tokens, batch.target_ids, batch.target_rows, batch.target_prompts)
    targets = list(zip(*(tensor.tolist() for tensor in fields), strict=True))
    for token, target, row, prompt in targets:
        assert target == 500_000 + (packed[token] or 0)
        assert target in rows[row].target_ids
        assert prompt == rows[row].prompt
    assert sorted(target for _, target, _, _ in targets) == sorted(id_ for row in rows for id_ in row.target_ids)


@given(rows_and_slots())
def test_groups_hold_whole_rows_of_prompts_of_one_length(case: tuple[list[Row], list[PromptSlot]]) -> None:
    rows, prompts = case
    batch = pack(rows, prompts, CPU)
    packed, positions = tokens_of_groups(batch, prompts), batch.positions.tolist()
    starts = [0, *itertools.accumulate(group.num_tokens for group in batch.groups)]
    assert starts[-1] == batch.num_tokens
    seen = []
    for group, start in zip(batch.groups, starts, strict=False):
        places = range(group.num_tokens) if group.slots is None else group.slots.tolist()
        by_row: dict[int, list[tuple[int | None, int]]] = {}
        for offset, place in enumerate(places):
            row, column = divmod(place, group.max_length)
            assert column == len(by_row.setdefault(row, []))
            by_row[row].append((packed[start + offset], positions[start + offset]))
        assert len(by_row) == group.num_rows
        if group.virtual_prompts:
            assert {prompts[prompt].num_virtual_tokens for prompt in group.virtual_prompts} == {group.max_length}
            assert all(found == [(None, i) for i in range(group.max_length)] for found in by_row.values())
            continue
        owners = [prompt for prompt, count in group.prompt_runs for _ in range(count)]
        for number, owner in enumerate(owners):
            first = by_row[number][0][0]
            assert first is not None
            row = rows[first // 1000]
            seen.append(first // 1000)
            assert row.prompt == owner
            assert prompts[owner].num_virtual_tokens == group.num_prefix
            assert by_row[number] == [(id_, group.num_prefix + i) for i, id_ in enumerate(row.token_ids)]
    assert sorted(seen) == list(range(len(rows)))


@given(rows_and_slots(), st.integers(1, 60), st.integers(1, 40))
def test_passes_hold_all_rows_in_order_and_keep_to_their_limits(
    case: tuple[list[Row], list[PromptSlot]], max_tokens: int, max_targets: int
) -> None:
    rows, prompts = case
    passes = list(split_rows(rows, prompts, max_tokens=max_tokens, max_targets=max_targets))
    assert [index for members in passes for index in members] == list(range(len(rows)))
    for members in passes:
        batch = pack([rows[index] for index in members], prompts, CPU)
        assert len(members) == 1 or (batch.num_tokens <= max_tokens and len(batch.target_ids) <= max_targets)


def test_a_prompt_lies_in_the_pass_once_however_many_rows_have_it() -> None:
    rows = [Row(0, (1, 2, 3), (9,))] * 10
    assert pack(rows, [PromptSlot(50, in_pass=True)], CPU).num_tokens == 50 + 30
    assert pack(rows, [PromptSlot(50, in_pass=False)], CPU).num_tokens == 30


def test_the_last_token_of_an_example_is_not_run() -> None:
    assert example_row(3, EncodedExample((1, 2), (7, 8, 9))) == Row(3, (1, 2, 7, 8), (7, 8, 9))


@pytest.mark.parametrize(("window", "seen"), [(None, [3, 4, 5]), (2, [2, 2, 2])])
def test_a_window_counts_virtual_tokens(window: int | None, seen: list[int]) -> None:
    group = pack([Row(0, (1, 2, 3), (4,))], [PromptSlot(2, in_pass=False)], CPU).groups[0]
    visible = group.visible(window, CPU)
    assert visible.sum(dim=1).tolist() == seen
    assert [int(row.nonzero().max()) for row in visible] == [2, 3, 4]
