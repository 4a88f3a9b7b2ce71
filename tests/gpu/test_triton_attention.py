"""The compiled Triton kernel against the plain one, and captured decode steps, on a real CUDA device."""

from functools import partial

import pytest
import torch

from server.engine.cuda_graphs import DecodeGraphs
from server.engine.kernels.gather import gather_attention
from server.engine.kernels.triton_attention import triton_attention
from tests.unit.engine.decoding import TinyDecoder, dealer
from tests.unit.engine.kernels.batches import AttentionCase, HeadShape, RowSize, make_case
from tests.unit.engine.kernels.families import FAMILIES, Family

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
ROWS = [RowSize(1, 37), RowSize(1, 1), RowSize(1, 3000), RowSize(9, 41), RowSize(200, 900)]
NUM_PAGES = 500


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_every_family_is_answered_as_the_plain_kernel_does(family: Family, dtype: torch.dtype) -> None:
    case = make_case(
        family.shape,
        ROWS,
        sliding_window=family.sliding_window,
        softcap=family.softcap,
        with_sinks=family.has_sinks,
        layout="heads first",
        num_shared_pages=1,
        num_padding=3,
    )
    assert_same(case.to(dtype, "cuda"), None)


@pytest.mark.parametrize("num_splits", [1, 4, 32])
@pytest.mark.parametrize("sliding_window", [None, 700])
def test_split_rows_are_answered_as_whole_ones(num_splits: int, sliding_window: int | None) -> None:
    case = make_case(HeadShape(12, 4, 80, 64), ROWS, sliding_window=sliding_window, with_sinks=True, num_padding=3)
    assert_same(case.to(torch.bfloat16, "cuda"), num_splits)


def test_a_launch_does_not_wait_for_the_device() -> None:
    case = make_case(HeadShape(12, 4, 64, 64), ROWS).to(torch.bfloat16, "cuda")
    case.run(triton_attention)
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.run(triton_attention)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_replayed_graphs_give_the_logits_and_pages_of_eager_steps() -> None:
    model, eager = (TinyDecoder(NUM_PAGES, kernel, "cuda") for kernel in (triton_attention, gather_attention))
    graphs = DecodeGraphs(model.forward, device=torch.device("cuda"), max_rows=12, max_columns=500)
    graphs.warm_up()
    for step, lengths in enumerate([[90] * 8, [3], [500, 1, 17], [16, 33, 2, 5, 70], [64] * 7, [1] * 12, [12]]):
        plan = dealer(NUM_PAGES, seed=step).plan(lengths)
        torch.testing.assert_close(graphs.replay(plan), eager.eager(plan), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.key_pages, eager.key_pages, rtol=1e-4, atol=1e-4)


def assert_same(case: AttentionCase, num_splits: int | None) -> None:
    answers, *pages = case.run(partial(triton_attention, num_splits=num_splits))
    expected, *expected_pages = case.to(torch.float32, "cuda").run(gather_attention)
    for page, expected_page in zip(pages, expected_pages, strict=True):
        torch.testing.assert_close(page.float(), expected_page, rtol=0, atol=0, equal_nan=True)
    tolerance = TOLERANCES[case.query.dtype]
    torch.testing.assert_close(answers.float(), expected, rtol=tolerance, atol=tolerance)
