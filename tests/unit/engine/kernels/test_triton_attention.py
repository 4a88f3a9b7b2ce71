"""The Triton kernel against the plain one, under Triton's interpreter."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from server.engine.kernels.batch import NO_SLOT, PAGE_SIZE
from server.engine.kernels.gather import gather_attention
from server.engine.kernels.triton_attention import (
    MAX_DECODE_COLUMNS,
    MAX_SPLITS,
    MIN_SPLIT_COLUMNS,
    choose_splits,
    divide,
)
from tests.unit.engine.kernels.batches import AttentionCase, HeadShape, RowSize, cases, make_case
from tests.unit.engine.kernels.families import FAMILIES, Family
from tests.unit.engine.kernels.interpreter import Interpreter, Outcome, started_interpreter

SMALL = HeadShape(3, 1, 24, 16)
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    with started_interpreter() as started:
        yield started


def assert_same(found: Outcome, case: AttentionCase) -> None:
    """The pages must be the plain kernel's bit by bit, NaN included; the answers within the dtype's tolerance."""
    answers, *pages = found
    expected, *expected_pages = case.to(torch.float32).run(gather_attention)
    for page, expected_page in zip(pages, expected_pages, strict=True):
        torch.testing.assert_close(page.float(), expected_page, rtol=0, atol=0, equal_nan=True)
    tolerance = TOLERANCES[case.query.dtype]
    torch.testing.assert_close(answers.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_every_family_is_answered_as_the_plain_kernel_does(interpreter: Interpreter, family: Family) -> None:
    # The interpreter takes its time for every head; from 20 on they only repeat.
    case = make_case(
        family.with_fewer_heads(20),
        [RowSize(1, 37), RowSize(3, 21)],
        sliding_window=family.sliding_window,
        softcap=family.softcap,
        with_sinks=family.has_sinks,
        layout="heads first",
        num_shared_pages=1,
        num_padding=1,
    )
    assert_same(interpreter.run(case), case)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases(max_rows=4, max_length=100, max_dim=96))
def test_any_ragged_batch_is_answered_as_the_plain_kernel_does(interpreter: Interpreter, case: AttentionCase) -> None:
    assert_same(interpreter.run(case), case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", [FAMILIES[0], FAMILIES[10], FAMILIES[27]], ids=str)
def test_half_precision_stays_near_the_answers_of_fp32(
    interpreter: Interpreter, family: Family, dtype: torch.dtype
) -> None:
    case = make_case(
        family.shape,
        [RowSize(1, 200), RowSize(33, 70)],
        dtype=dtype,
        sliding_window=family.sliding_window,
        softcap=family.softcap,
        with_sinks=family.has_sinks,
    )
    assert_same(interpreter.run(case), case)


@pytest.mark.parametrize("num_splits", [2, 8])
@pytest.mark.parametrize(
    ("sliding_window", "has_sinks"), [(None, False), (None, True), (300, True), (20, False)], ids=str
)
def test_split_rows_are_answered_as_whole_ones(
    interpreter: Interpreter, num_splits: int, sliding_window: int | None, has_sinks: bool
) -> None:
    # One row fills every split, one a few of them, one a single one; so do chunks.
    case = make_case(
        SMALL,
        [RowSize(1, 8 * MIN_SPLIT_COLUMNS + 5), RowSize(1, 3), RowSize(1, 300), RowSize(4, 700), RowSize(2, 2)],
        sliding_window=sliding_window,
        with_sinks=has_sinks,
        num_padding=2,
    )
    assert_same(interpreter.run(case, num_splits), case)


@pytest.mark.parametrize("num_splits", [1, 4])
def test_a_decoding_rows_bits_do_not_depend_on_its_neighbours(interpreter: Interpreter, num_splits: int) -> None:
    case = make_case(SMALL, [RowSize(1, 530), RowSize(1, 40), RowSize(9, 60)])
    together = interpreter.run(case, num_splits)[0]
    for row in range(case.batch.num_decoding):
        alone = interpreter.run(case.only(row), num_splits)[0]
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("num_splits", [1, 4])
def test_rows_without_tokens_pad_a_batch_and_are_left_alone(interpreter: Interpreter, num_splits: int) -> None:
    case = make_case(SMALL, [RowSize(1, 530), RowSize(1, 40)])
    batch, num_padding = case.batch, 3
    blank = torch.full((num_padding, *case.query.shape[1:]), float("nan"))
    padded = replace(
        case,
        query=torch.cat([case.query, blank]),
        key=torch.cat([case.key, blank[:, : SMALL.kv_heads]]),
        value=torch.cat([case.value, blank[:, : SMALL.kv_heads, : SMALL.value_dim]]),
        batch=replace(
            batch,
            page_table=torch.cat([batch.page_table, torch.full((num_padding, batch.page_table.shape[1]), -1).int()]),
            lengths=torch.cat([batch.lengths, torch.zeros(num_padding, dtype=torch.int32)]),
            query_starts=torch.cat([batch.query_starts, batch.query_starts[-1:].repeat(num_padding)]),
            write_slots=torch.cat([batch.write_slots, torch.full((num_padding,), NO_SLOT)]),
            num_decoding=batch.num_decoding + num_padding,
        ),
    )
    expected = interpreter.run(case, num_splits)
    answers, *pages = interpreter.run(padded, num_splits)
    assert torch.equal(answers[:2], expected[0])
    assert torch.equal(answers[2:], torch.zeros_like(answers[2:]))
    for page, expected_page in zip(pages, expected[1:], strict=True):
        torch.testing.assert_close(page, expected_page, rtol=0, atol=0, equal_nan=True)


def test_columns_before_every_window_are_not_read(interpreter: Interpreter) -> None:
    window = 10
    case = make_case(SMALL, [RowSize(1, 90), RowSize(4, 60)], sliding_window=window)
    for row, length in enumerate(case.batch.lengths.tolist()):
        count = int(case.batch.query_starts[row + 1] - case.batch.query_starts[row])
        for column in range(length - count - window + 1):
            page = int(case.batch.page_table[row, column // PAGE_SIZE])
            for pool in (case.key_pages, case.value_pages):
                pool[page, :, column % PAGE_SIZE] = float("nan")
    assert_same(interpreter.run(case), case)


def test_pages_beyond_two_to_the_31_elements_are_found(interpreter: Interpreter) -> None:
    answers, expected = interpreter.run_in_huge_pool()
    torch.testing.assert_close(answers, expected, rtol=4e-3, atol=4e-3)


def test_importing_the_kernel_does_not_import_triton() -> None:
    code = "import sys, server.engine.kernels.triton_attention; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_rows_are_split_only_while_processors_are_idle() -> None:
    assert choose_splits(8, 4096, 132, is_decoding=True) == 32
    assert choose_splits(64, 4096, 132, is_decoding=True) == 4
    assert choose_splits(256, 4096, 132, is_decoding=True) == 1
    assert choose_splits(8, 4096, 132, is_decoding=False) == 32


def test_short_rows_are_not_split() -> None:
    assert choose_splits(1, MIN_SPLIT_COLUMNS, 132, is_decoding=True) == 1
    assert choose_splits(1, 3 * MIN_SPLIT_COLUMNS, 132, is_decoding=True) == 2


def test_a_long_decoding_row_is_split_even_in_a_full_batch() -> None:
    assert choose_splits(1024, 4 * MAX_DECODE_COLUMNS, 132, is_decoding=True) == 4
    assert choose_splits(1024, 4 * MAX_DECODE_COLUMNS, 132, is_decoding=False) == 1
    assert choose_splits(1024, 1000 * MAX_DECODE_COLUMNS, 132, is_decoding=True) == MAX_SPLITS


@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_a_block_holds_whole_groups_and_a_tile_whole_pages(family: Family, element_size: int) -> None:
    group = family.shape.heads // family.shape.kv_heads
    for is_decoding in (True, False):
        division = divide(group, family.shape.key_dim, family.shape.value_dim, element_size, is_decoding=is_decoding)
        assert 1 <= division.block_tokens * group <= division.block_queries
        assert division.tile % PAGE_SIZE == 0
