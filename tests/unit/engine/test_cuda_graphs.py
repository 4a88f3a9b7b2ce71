"""Captured decode steps: buckets, buffers and padding. The capture calls the model again where a GPU would replay."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch

from server.engine.cuda_graphs import DecodeBuffers, DecodeGraphs, Pass, row_buckets
from server.engine.kernels.batch import NO_SLOT, PAGE_SIZE
from server.engine.plan import build_plan
from tests.unit.engine.decoding import TinyDecoder, dealer, gather_rows_with_tokens
from tests.unit.engine.no_waiting import no_waiting

NUM_PAGES = 200
MAX_ROWS = 12
MAX_COLUMNS = 100
CPU = torch.device("cpu")


@dataclass(slots=True)
class CallAgain:
    """Captures by keeping the pass, after one warm-up; the number of passes captured is counted."""

    num_captured: int = 0

    def __call__(self, run: Pass) -> Pass:
        run()
        self.num_captured += 1
        return run


@dataclass(slots=True)
class Recorder:
    """A forward pass that notes where its inputs lie and what they are."""

    forward: Callable[[DecodeBuffers], torch.Tensor]
    places: list[tuple[int, ...]] = field(default_factory=list)
    seen: list[DecodeBuffers] = field(default_factory=list)

    def __call__(self, buffers: DecodeBuffers) -> torch.Tensor:
        tensors = (buffers.token_ids, buffers.positions, *_tensors(buffers))
        self.places.append(tuple(tensor.data_ptr() for tensor in tensors))
        self.seen.append(
            replace(
                buffers,
                token_ids=buffers.token_ids.clone(),
                batch=replace(
                    buffers.batch,
                    page_table=buffers.batch.page_table.clone(),
                    lengths=buffers.batch.lengths.clone(),
                    query_starts=buffers.batch.query_starts.clone(),
                    write_slots=buffers.batch.write_slots.clone(),
                ),
            )
        )
        return self.forward(buffers)


def _tensors(buffers: DecodeBuffers) -> tuple[torch.Tensor, ...]:
    batch = buffers.batch
    return batch.page_table, batch.lengths, batch.query_starts, batch.write_slots


def make_graphs(forward: Callable[[DecodeBuffers], torch.Tensor], capture: CallAgain | None = None) -> DecodeGraphs:
    return DecodeGraphs(forward, device=CPU, max_rows=MAX_ROWS, max_columns=MAX_COLUMNS, capture=capture or CallAgain())


@pytest.fixture
def model() -> TinyDecoder:
    return TinyDecoder(NUM_PAGES, gather_rows_with_tokens)


def test_buckets_are_few_and_end_with_the_limit() -> None:
    assert row_buckets(32) == (1, 2, 4, 8, 16, 24, 32)
    assert row_buckets(12) == (1, 2, 4, 8, 12)
    assert row_buckets(1) == (1,)
    assert row_buckets(4) == (1, 2, 4)


@pytest.mark.parametrize("num_rows", range(1, MAX_ROWS + 1))
def test_a_replayed_step_gives_the_logits_and_pages_of_an_eager_one(model: TinyDecoder, num_rows: int) -> None:
    plan = dealer(NUM_PAGES).plan([1 + (13 * row) % MAX_COLUMNS for row in range(num_rows)])
    logits = make_graphs(model.forward).replay(plan)
    eager = TinyDecoder(NUM_PAGES, gather_rows_with_tokens)
    torch.testing.assert_close(logits, eager.eager(plan))
    torch.testing.assert_close(model.key_pages, eager.key_pages)
    torch.testing.assert_close(model.value_pages, eager.value_pages)


def test_steps_of_changing_rows_and_lengths_leave_nothing_behind(model: TinyDecoder) -> None:
    graphs = make_graphs(model.forward)
    eager = TinyDecoder(NUM_PAGES, gather_rows_with_tokens)
    for step, lengths in enumerate([[90] * 8, [3], [100, 1, 17], [16, 33, 2, 5, 70], [64] * 7, [1] * 12, [12]]):
        plan = dealer(NUM_PAGES, seed=step).plan(lengths)
        torch.testing.assert_close(graphs.replay(plan), eager.eager(plan))
        torch.testing.assert_close(model.key_pages, eager.key_pages)


def test_replays_read_the_same_memory_and_no_plan(model: TinyDecoder) -> None:
    recorder = Recorder(model.forward)
    graphs = make_graphs(recorder)
    for step in range(3):
        graphs.replay(dealer(NUM_PAGES, seed=step).plan([20, 30, 40]))
    assert len(set(recorder.places)) == 1


def test_rows_that_pad_have_no_tokens_no_pages_and_write_nowhere(model: TinyDecoder) -> None:
    recorder = Recorder(model.forward)
    graphs = make_graphs(recorder)
    for lengths in ([99] * 8, [98] * 8, [20, 30, 40, 50, 60]):
        plan = dealer(NUM_PAGES).plan(lengths)
        graphs.replay(plan)
    batch = recorder.seen[-1].batch
    assert batch.lengths.tolist() == [20, 30, 40, 50, 60, 0, 0, 0]
    assert batch.query_starts.tolist() == [0, 1, 2, 3, 4, 5, 5, 5, 5]
    assert batch.write_slots[5:].tolist() == [NO_SLOT] * 3
    for row, length in enumerate(batch.lengths.tolist()):
        num_pages = -(-length // PAGE_SIZE)
        expected = plan.page_table[row, :num_pages].tolist() if num_pages else []
        assert batch.page_table[row, :num_pages].tolist() == expected
        assert bool((batch.page_table[row, num_pages:] == -1).all())


def test_a_bucket_is_captured_once_and_warm_up_captures_all(model: TinyDecoder) -> None:
    capture = CallAgain()
    graphs = make_graphs(model.forward, capture)
    for rows in (3, 4, 3):
        graphs.replay(dealer(NUM_PAGES).plan([10] * rows))
    assert capture.num_captured == 1
    graphs.warm_up()
    assert capture.num_captured == len(graphs.buckets)


def test_capturing_a_bucket_writes_no_row_again(model: TinyDecoder) -> None:
    graphs = make_graphs(model.forward)
    plan = dealer(NUM_PAGES).plan([20, 30])
    graphs.replay(plan)
    # The rows are gone, their pages are another's.
    model.key_pages.fill_(7.0)
    model.value_pages.fill_(7.0)
    graphs.warm_up()
    assert bool((model.key_pages == 7.0).all())
    assert bool((model.value_pages == 7.0).all())


def test_only_steps_of_decoding_rows_that_fit_can_be_replayed(model: TinyDecoder) -> None:
    graphs = make_graphs(model.forward)
    pages = dealer(10 * NUM_PAGES)
    decoding = pages.entry(20, 1)
    assert graphs.can_replay(build_plan([decoding])[0])
    assert graphs.can_replay(pages.plan([MAX_COLUMNS] * MAX_ROWS))
    assert not graphs.can_replay(pages.plan([20] * (MAX_ROWS + 1)))
    assert not graphs.can_replay(pages.plan([MAX_COLUMNS + PAGE_SIZE]))
    assert not graphs.can_replay(build_plan([decoding, pages.entry(20, 5)])[0])
    assert not graphs.can_replay(build_plan([decoding, replace(pages.entry(20, 1), logits_from=1)])[0])
    assert not graphs.can_replay(build_plan([replace(pages.entry(20, 1), vectors=torch.zeros(1, 4))])[0])


def test_tokens_that_the_host_does_not_know_are_taken_from_the_sample(model: TinyDecoder) -> None:
    known = dealer(NUM_PAGES).plan([20, 30, 40, 50, 60])
    entries = [replace(entry, token_ids=[0], source=4 - i) for i, entry in enumerate(known.entries)]
    entries[2] = known.entries[2]
    sampled = torch.from_numpy(known.token_ids[::-1].copy())
    graphs = make_graphs(model.forward)
    eager = TinyDecoder(NUM_PAGES, gather_rows_with_tokens)
    torch.testing.assert_close(graphs.replay(build_plan(entries)[0], sampled), eager.eager(known))
    torch.testing.assert_close(model.key_pages, eager.key_pages)
    # The next step's tokens are all known: nothing is left of the sources.
    after = dealer(NUM_PAGES, seed=1).plan([21, 31, 41])
    torch.testing.assert_close(graphs.replay(after, sampled), eager.eager(after))


def test_replay_asks_nothing_of_the_device(model: TinyDecoder) -> None:
    logits = torch.zeros(MAX_ROWS, 4)
    graphs = make_graphs(lambda buffers: logits[: len(buffers.token_ids)])
    graphs.warm_up()
    entries = [replace(entry, source=i) for i, entry in enumerate(dealer(NUM_PAGES).plan([20, 30, 40]).entries)]
    plan, _ = build_plan(entries)
    sampled = torch.tensor([3, 4, 5])
    with no_waiting(numpy_of_the_host=True):
        graphs.replay(plan, sampled)


def test_plan_that_takes_tokens_from_no_sample_is_refused(model: TinyDecoder) -> None:
    entry = replace(dealer(NUM_PAGES).entry(20, 1), source=0)
    with pytest.raises(RuntimeError, match="there is none"):
        make_graphs(model.forward).replay(build_plan([entry])[0])
