"""The plain torch kernel against scaled dot product attention with explicit masks, in fp64, one row at a time.

It is the oracle of the other kernels, so nothing of its own is used to say what is right.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch.nn.functional import scaled_dot_product_attention

from server.engine.kernels.batch import NO_SLOT, PAGE_SIZE, LayerAttention
from server.engine.kernels.gather import answer_alone, gather_attention, read_columns, write_kv
from tests.unit.engine.kernels.batches import AttentionCase, HeadShape, RowSize, cases, make_case

widely = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])

SHAPE = HeadShape(heads=6, kv_heads=2, key_dim=16, value_dim=24)
MIXED = [RowSize(1, 1), RowSize(1, 17), RowSize(1, 70), RowSize(5, 5), RowSize(20, 33), RowSize(16, 48)]


def expected_answers(case: AttentionCase) -> torch.Tensor:
    """What every token is to be answered: `[T, heads, value_dim]`, fp64, zero for padding."""
    answers = torch.zeros(len(case.query), case.query.shape[1], case.value.shape[2], dtype=torch.float64)
    starts = case.batch.query_starts.tolist()
    for row, length in enumerate(case.batch.lengths.tolist()):
        first, end = starts[row : row + 2]
        past = length - (end - first)
        table = case.batch.page_table[row].tolist()
        keys, values = (
            torch.stack([pages[table[c // PAGE_SIZE], :, c % PAGE_SIZE] for c in range(past)] + list(new[first:end]))
            for pages, new in ((case.key_pages, case.key), (case.value_pages, case.value))
        )  # [length, kv_heads, dim]
        answers[first:end] = expected_row(case.query[first:end], keys, values, case.layer)
    return answers


def expected_row(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, layer: LayerAttention) -> torch.Tensor:
    """One row's tokens, `[n, heads, value_dim]`: its last n columns, of `keys [length, kv_heads, key_dim]`."""
    length, own = len(keys), torch.arange(len(keys) - len(query), len(keys))[:, None]
    columns = torch.arange(length)[None, :]
    mask = columns <= own
    if layer.sliding_window is not None:
        mask &= own - columns < layer.sliding_window
    group = query.shape[1] // keys.shape[1]
    heads = query.double().transpose(0, 1)
    keys, values = (t.double().transpose(0, 1).repeat_interleave(group, dim=0) for t in (keys, values))
    if layer.softcap is None and layer.sinks is None:
        answered = scaled_dot_product_attention(
            heads[None], keys[None], values[None], attn_mask=mask, scale=layer.scaling
        )
        return answered[0].transpose(0, 1)
    scores = torch.einsum("hqd,hkd->hqk", heads, keys) * layer.scaling
    if layer.softcap is not None:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
    weights = scores.exp() * mask
    total = weights.sum(dim=-1, keepdim=True)
    if layer.sinks is not None:
        total = total + layer.sinks.double().exp()[:, None, None]
    return torch.einsum("hqk,hkd->qhd", weights / total, values)


def expected_pages(case: AttentionCase) -> tuple[torch.Tensor, torch.Tensor]:
    """The pools with this step's keys and values in their places and nothing else changed."""
    key_pages, value_pages = case.key_pages.clone(), case.value_pages.clone()
    for token, slot in enumerate(case.batch.write_slots.tolist()):
        if slot != NO_SLOT:
            page, offset = divmod(slot, PAGE_SIZE)
            key_pages[page, :, offset] = case.key[token]
            value_pages[page, :, offset] = case.value[token]
    return key_pages, value_pages


def assert_right(case: AttentionCase, tolerance: float = 2e-5) -> None:
    answers, *pages = case.run(gather_attention)
    assert answers.dtype == case.query.dtype
    torch.testing.assert_close(answers.double(), expected_answers(case), atol=tolerance, rtol=tolerance)
    for found, expected in zip(pages, expected_pages(case), strict=True):
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num(), expected.nan_to_num())


@widely
@given(cases(max_rows=8, max_length=120, max_dim=64))
def test_every_token_is_answered_over_the_columns_that_it_may_see(case: AttentionCase) -> None:
    assert_right(case, 1e-4)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"sliding_window": 1},
        {"sliding_window": 9},
        {"sliding_window": PAGE_SIZE},
        {"softcap": 2.0},
        {"with_sinks": True},
        {"num_padding": 3},
        {"num_shared_pages": 2},
        {"layout": "heads first"},
        {"layout": "fused projection"},
        {"sliding_window": 20, "softcap": 3.0, "with_sinks": True, "num_padding": 2, "num_shared_pages": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixed_batch_in_both_precisions(fields: dict[str, object], dtype: torch.dtype) -> None:
    # The pools are in the serving dtype as well, so that what is compared is the arithmetic alone.
    case = make_case(SHAPE, MIXED, dtype=dtype, **fields).to(dtype)  # type: ignore[arg-type]
    assert_right(case, 2e-5 if dtype is torch.float32 else 2e-2)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (8, 1), (7, 7), (9, 3)])
def test_query_heads_are_grouped_over_key_heads_in_their_order(heads: int, kv_heads: int) -> None:
    assert_right(make_case(HeadShape(heads, kv_heads, 16, 16), MIXED))


@widely
@given(cases(max_rows=6, max_length=80, max_dim=40))
def test_row_in_a_batch_is_the_row_alone_to_the_bit(case: AttentionCase) -> None:
    together, *_ = case.run(gather_attention)
    starts = case.batch.query_starts.tolist()
    for row in range(len(case.batch.lengths)):
        alone, *_ = case.only(row).run(gather_attention)
        assert torch.equal(together[starts[row] : starts[row + 1]], alone)


@pytest.mark.parametrize("window", [1, 5, PAGE_SIZE])
def test_what_no_token_sees_may_hold_anything(window: int) -> None:
    case = make_case(SHAPE, [RowSize(1, 60), RowSize(4, 40)], sliding_window=window)
    expected = expected_answers(case)
    starts = case.batch.query_starts.tolist()
    for row, length in enumerate(case.batch.lengths.tolist()):
        past = length - (starts[row + 1] - starts[row])
        for column in range(max(0, past - window + 1)):
            page = int(case.batch.page_table[row, column // PAGE_SIZE])
            case.key_pages[page, :, column % PAGE_SIZE] = float("nan")
            case.value_pages[page, :, column % PAGE_SIZE] = float("nan")
    answers, *_ = case.run(gather_attention)
    torch.testing.assert_close(answers.double(), expected, atol=2e-5, rtol=2e-5)


def test_token_that_reads_a_page_of_nobody_shows_it() -> None:
    """The poison works: were a wrong page read, NaN would come out."""
    case = make_case(SHAPE, [RowSize(1, 40)])
    table = case.batch.page_table.clone()
    table[0, 1] = next(page for page in range(len(case.key_pages)) if page not in table[0].tolist())
    answers, *_ = replace(case, batch=replace(case.batch, page_table=table)).run(gather_attention)
    assert bool(answers.isnan().all())


def test_padding_is_written_nowhere_and_answered_with_zero() -> None:
    case = make_case(SHAPE, MIXED, num_padding=4)
    answers, *_ = case.run(gather_attention)
    assert bool((answers[-4:] == 0).all())
    key_pages, value_pages = torch.zeros(3, 2, PAGE_SIZE, 16), torch.zeros(3, 2, PAGE_SIZE, 24)
    write_kv(torch.ones(2, 2, 16), torch.ones(2, 2, 24), key_pages, value_pages, torch.tensor([NO_SLOT, NO_SLOT]))
    assert not key_pages.any()
    assert not value_pages.any()


def test_columns_are_read_in_the_order_of_the_pages() -> None:
    pool = torch.arange(4 * 2 * PAGE_SIZE * 3).reshape(4, 2, PAGE_SIZE, 3).float()
    read = read_columns(pool, torch.tensor([3, 0]), PAGE_SIZE + 2)
    assert read.shape == (2, PAGE_SIZE + 2, 3)
    assert torch.equal(read[:, :PAGE_SIZE], pool[3])
    assert torch.equal(read[:, PAGE_SIZE:], pool[0, :, :2])


@pytest.mark.parametrize("window", [None, 3])
def test_row_without_a_pool_is_answered_causally(window: int | None) -> None:
    case = make_case(SHAPE, [RowSize(20, 20)])
    layer = LayerAttention(scaling=0.25, sliding_window=window)
    found = answer_alone(case.query, case.key, case.value, layer)
    torch.testing.assert_close(
        found.double(), expected_row(case.query, case.key, case.value, layer), atol=2e-5, rtol=2e-5
    )
