"""The C++ attention kernel against the plain one, and its own promise: a token's bits depend on its own row alone."""

from collections.abc import Iterator
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from server.engine.kernels.batch import PAGE_SIZE, PagedBatch
from server.engine.kernels.gather import gather_attention
from server.engine.kernels.native import NativeUnavailableError, load_native, native_attention
from tests.unit.engine.kernels.batches import LAYOUTS, AttentionCase, HeadShape, RowSize, cases, make_case

# One unit in the last place of an answer, and what rounding the weights makes of answers near zero.
TOLERANCES = {torch.float32: (1e-5, 3e-5), torch.bfloat16: (2**-7, 1e-2), torch.float16: (2**-10, 2e-3)}
DTYPES = list(TOLERANCES)
LLAMA = HeadShape(heads=9, kv_heads=3, key_dim=64, value_dim=64)
MANY_HEADS = HeadShape(heads=16, kv_heads=1, key_dim=72, value_dim=40)


@pytest.fixture(scope="module", autouse=True)
def _library() -> None:
    try:
        load_native()
    except NativeUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture
def _restored_threads() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


def check_answers(answers: torch.Tensor, wanted: torch.Tensor) -> None:
    rtol, atol = TOLERANCES[answers.dtype]
    torch.testing.assert_close(answers, wanted, rtol=rtol, atol=atol)


def check_against_gather(case: AttentionCase) -> None:
    answers, key_pages, value_pages = case.run(native_attention)
    wanted, wanted_key_pages, wanted_value_pages = case.run(gather_attention)
    torch.testing.assert_close(key_pages, wanted_key_pages, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(value_pages, wanted_value_pages, rtol=0, atol=0, equal_nan=True)
    check_answers(answers, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_batches_are_answered_as_by_the_plain_kernel(dtype: torch.dtype, data: st.DataObject) -> None:
    check_against_gather(data.draw(cases(dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sliding_window", [None, 700])
def test_long_rows_are_answered_as_by_the_plain_kernel(dtype: torch.dtype, sliding_window: int | None) -> None:
    rows = [RowSize(1, 2100), RowSize(1, 513), RowSize(1, 512), RowSize(1, 30), RowSize(7, 1030), RowSize(200, 1500)]

    check_against_gather(make_case(LLAMA, rows, dtype=dtype, sliding_window=sliding_window, with_sinks=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [LLAMA, MANY_HEADS, HeadShape(4, 2, 17, 33), HeadShape(2, 2, 576, 512)])
def test_any_strides_and_dims_are_answered_as_by_the_plain_kernel(layout: str, shape: HeadShape) -> None:
    rows = [RowSize(1, 77), RowSize(1, 1), RowSize(9, 9), RowSize(40, 90)]

    for dtype in DTYPES:
        check_against_gather(make_case(shape, rows, dtype=dtype, layout=layout, num_padding=2))


@settings(max_examples=40, deadline=None)
@given(dtype=st.sampled_from(DTYPES), data=st.data())
def test_row_has_the_same_bits_alone_and_in_any_batch(dtype: torch.dtype, data: st.DataObject) -> None:
    case = data.draw(cases(dtype, max_rows=8, max_length=700))

    answers, _, _ = case.run(native_attention)

    starts = case.batch.query_starts.tolist()
    for row in range(len(starts) - 1):
        alone, _, _ = case.only(row).run(native_attention)
        assert torch.equal(alone, answers[starts[row] : starts[row + 1]])


@pytest.mark.parametrize("shape", [LLAMA, MANY_HEADS, HeadShape(10, 1, 24, 24)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sliding_window", "softcap", "with_sinks"), [(None, None, False), (100, 5.0, True)])
def test_token_has_the_same_bits_alone_and_within_a_chunk(
    shape: HeadShape, dtype: torch.dtype, sliding_window: int | None, softcap: float | None, with_sinks: bool
) -> None:
    for row in (RowSize(70, 70), RowSize(30, 530), RowSize(150, 1100)):
        case = make_case(
            shape, [row], dtype=dtype, sliding_window=sliding_window, softcap=softcap, with_sinks=with_sinks
        )
        answers, _, _ = case.run(native_attention)

        key_pages, value_pages = case.key_pages.clone(), case.value_pages.clone()
        for i in range(row.count):
            length = row.length - row.count + i + 1
            batch = PagedBatch(
                page_table=case.batch.page_table,
                lengths=torch.tensor([length], dtype=torch.int32),
                query_starts=torch.tensor([0, 1], dtype=torch.int32),
                write_slots=case.batch.write_slots[i : i + 1],
                num_decoding=1,
                max_length=length,
            )
            token = slice(i, i + 1)
            alone = native_attention(
                case.query[token], case.key[token], case.value[token], key_pages, value_pages, batch, case.layer
            )
            assert torch.equal(alone, answers[token]), f"token {i} of {row}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("_restored_threads")
def test_bits_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    rows = [RowSize(1, 2100), *[RowSize(1, 50 + 3 * i) for i in range(20)], RowSize(20, 900), RowSize(300, 700)]
    case = make_case(LLAMA, rows, dtype=dtype)

    torch.set_num_threads(1)
    answers, key_pages, _ = case.run(native_attention)

    for num_threads in (2, 3, 7):
        torch.set_num_threads(num_threads)
        for _ in range(3):
            again, key_pages_again, _ = case.run(native_attention)
            assert torch.equal(again, answers)
            torch.testing.assert_close(key_pages_again, key_pages, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_nan_stays_by_itself(dtype: torch.dtype) -> None:
    case = make_case(LLAMA, [RowSize(1, 40), RowSize(1, 50), RowSize(20, 60)], dtype=dtype)
    clean, _, _ = case.run(native_attention)
    case.query[1] = float("nan")

    answers, _, _ = case.run(native_attention)

    assert answers[1].isnan().all()
    assert torch.equal(answers[0], clean[0])
    assert torch.equal(answers[2:], clean[2:])


def test_batch_of_padding_alone_is_answered_with_zeros() -> None:
    case = make_case(LLAMA, [RowSize(1, 5)], num_padding=3)
    nobody = PagedBatch(
        page_table=torch.empty((0, 1), dtype=torch.int32),
        lengths=torch.empty(0, dtype=torch.int32),
        query_starts=torch.zeros(1, dtype=torch.int32),
        write_slots=torch.full((4,), -1),
        num_decoding=0,
        max_length=0,
    )

    answers, key_pages, _ = replace(case, batch=nobody).run(native_attention)

    assert torch.equal(answers, torch.zeros_like(answers))
    torch.testing.assert_close(key_pages, case.key_pages, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rows", [[RowSize(1, 20), RowSize(1, 700)], [RowSize(1, 20), RowSize(30, 60)]])
def test_rows_without_tokens_that_pad_a_batch_are_left_alone(rows: list[RowSize]) -> None:
    case = make_case(LLAMA, rows, num_padding=2)
    expected, expected_key_pages, _ = case.run(native_attention)
    batch, num_pages = case.batch, case.batch.page_table.shape[1]
    padded = replace(
        batch,
        page_table=torch.cat([batch.page_table, torch.full((3, num_pages), -1, dtype=torch.int32)]),
        lengths=torch.cat([batch.lengths, torch.zeros(3, dtype=torch.int32)]),
        query_starts=torch.cat([batch.query_starts, batch.query_starts[-1:].expand(3)]),
    )

    answers, key_pages, _ = replace(case, batch=padded).run(native_attention)

    assert torch.equal(answers, expected)
    torch.testing.assert_close(key_pages, expected_key_pages, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("count", "length"), [(0, 5), (3, 2)])
def test_row_with_columns_that_its_tokens_do_not_fit_is_refused(count: int, length: int) -> None:
    case = make_case(LLAMA, [RowSize(3, 20)])
    case.batch.query_starts[1] = count
    case.batch.lengths[0] = length

    with pytest.raises(RuntimeError, match=f"row 0 has {count} tokens and {length} columns"):
        case.run(native_attention)


def test_a_long_row_takes_no_more_room_for_each_of_its_parts_than_it_has_queries() -> None:
    """The wide row alone has items of many queries; the long one must not pay for them in each of its segments."""
    shape = HeadShape(heads=1, kv_heads=1, key_dim=16, value_dim=16)
    long, wide = RowSize(1, 100_000), RowSize(96, 96)
    case = make_case(shape, [long, wide])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        native_attention(
            case.query, case.key, case.value, case.key_pages, case.value_pages, case.batch, case.layer
        )  # fmt: skip
    taken = sum(event.cpu_memory_usage for event in profile.events() if event.name == "aten::empty")
    num_segments = -(-100_000 // 512)
    assert taken < 4 * (num_segments * (16 + 2) + (96 + 1) * 16) + 4096


def test_slot_beside_the_row_s_own_last_column_is_still_written_before_anything_is_read() -> None:
    case = make_case(LLAMA, [RowSize(1, 20), RowSize(1, 37)])
    # The second row writes where the first reads.
    case.batch.write_slots[1] = int(case.batch.page_table[0, 0]) * PAGE_SIZE + 3

    answers, _, _ = case.run(native_attention)

    wanted, _, _ = case.run(gather_attention)
    check_answers(answers[0], wanted[0])


def with_page(case: AttentionCase, page: int) -> AttentionCase:
    case.batch.page_table[0, 0] = page
    return case


def with_slot(case: AttentionCase, slot: int) -> AttentionCase:
    case.batch.write_slots[0] = slot
    return case


@pytest.mark.parametrize("page", [-1, 10_000])
def test_page_outside_the_pool_is_refused(page: int) -> None:
    case = with_page(make_case(LLAMA, [RowSize(1, 20)]), page)

    with pytest.raises(RuntimeError, match=f"row 0: page {page} is not in the pool"):
        case.run(native_attention)


@pytest.mark.parametrize("slot", [-1, 10_000 * PAGE_SIZE])
def test_slot_outside_the_pool_is_refused(slot: int) -> None:
    case = with_slot(make_case(LLAMA, [RowSize(1, 20)]), slot)

    with pytest.raises(RuntimeError, match=f"token 0: slot {slot} is not in the pool"):
        case.run(native_attention)


def test_tensors_that_do_not_fit_together_are_refused() -> None:
    case = make_case(LLAMA, [RowSize(1, 20), RowSize(3, 9)])
    refused = {
        "differ in dtype": replace(case, key=case.key.half()),
        "differ in tokens": replace(case, value=case.value[1:]),
        "query heads": replace(case, query=case.query[:, :7]),
        "differ in dim": replace(case, query=case.query[..., :32], key=case.key[..., :32]),
        "differ in heads": replace(case, key=case.key[:, :2]),
        "takes float32": case.to(torch.float64),
        "int32": replace(case, batch=replace(case.batch, lengths=case.batch.lengths.long())),
        "int64": replace(case, batch=replace(case.batch, write_slots=case.batch.write_slots.int())),
        "more columns than pages": replace(case, batch=replace(case.batch, lengths=case.batch.lengths + 1000)),
        "has 3 tokens and 2 columns": replace(case, batch=replace(case.batch, lengths=case.batch.lengths * 0 + 2)),
        "sinks": replace(case, layer=replace(case.layer, sinks=torch.zeros(4))),
    }
    for message, broken in refused.items():
        with pytest.raises(RuntimeError, match=message):
            broken.run(native_attention)
