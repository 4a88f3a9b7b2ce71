"""Decode steps as CUDA graphs: one recording a bucket of batch sizes, replayed over buffers that never move.

A decode step of a small model is hundreds of kernels of a few microseconds each, and launching them from Python takes
longer than running them; a replayed graph is launched once. Owns the buffers, the choice of bucket, and the padding;
refuses to know the model (a callable) and the plan's meaning (checked before it gets here). The buckets are vLLM's.

A step with fewer rows than its bucket is padded with rows of no tokens: they read nothing, write nowhere, and their
tokens' answers are zero. A graph's page table has room for the longest row, since kernels read no further than a row's
length; so a graph serves all lengths. Nothing in a replay waits for the device: the step's numbers go from pinned
memory, of which there are two pieces, so that one can be filled while the other is still being copied. Tokens that the
host does not know yet are put into the buffers on the device, between that copy and the replay.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from server.engine.kernels.batch import NO_SLOT, PAGE_SIZE, PagedBatch
from server.engine.plan import NO_PAGE, NO_SOURCE, StepPlan

Pass = Callable[[], torch.Tensor]
"""One forward pass over fixed buffers; returns its logits `[bucket, vocab_size]`."""

Capture = Callable[[Pass], Pass]
"""Runs the pass, as often as it likes, and returns what runs it again over the same memory."""

_NUM_STAGES = 2
_NUM_WARM_UPS = 2
_ALIGNMENT = 4  # int32 numbers: the 16 bytes that kernels read at once


def row_buckets(max_rows: int) -> tuple[int, ...]:
    """The batch sizes that are captured, ascending: 1, 2, 4, then every eighth, and `max_rows` itself."""
    return tuple(sorted({size for size in (1, 2, 4, *range(8, max_rows, 8)) if size < max_rows} | {max_rows}))


@dataclass(frozen=True, slots=True)
class DecodeBuffers:
    """The inputs of a captured step, on the device: views of memory that stays in place.

    `logits_tokens` is 0, 1, ..., bucket - 1: the logits of every row are wanted. Rows without tokens pad `batch`.
    """

    token_ids: torch.Tensor  # [bucket], int64
    positions: torch.Tensor  # [bucket], int64
    logits_tokens: torch.Tensor  # [bucket], int64
    batch: PagedBatch


class CudaCapture:
    """Records passes as CUDA graphs, which share one memory pool: they must not run at the same time."""

    def __init__(self) -> None:
        self._memory = torch.cuda.graph_pool_handle()

    def __call__(self, run: Pass) -> Pass:
        # What is done once (compiling kernels, allocating workspaces) must be done before, and off the main stream.
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_NUM_WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile.
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            logits = run()

        def replay() -> torch.Tensor:
            graph.replay()
            return logits

        return replay


class DecodeGraphs:
    """Runs steps of decoding rows alone. One thread uses it, the one that owns the device."""

    def __init__(
        self,
        forward: Callable[[DecodeBuffers], torch.Tensor],
        *,
        device: torch.device,
        max_rows: int,
        max_columns: int,
        capture: Capture | None = None,
    ) -> None:
        """`forward` runs the model over the buffers, reading nothing else that changes from step to step, and returns
        logits `[bucket, vocab_size]`. No step has more than `max_rows` rows, no row more than `max_columns` columns.

        `capture` is `CudaCapture()` by default.
        """
        self.buckets = row_buckets(max_rows)
        self._forward = forward
        self._capture = CudaCapture() if capture is None else capture
        self._max_columns = max_columns
        self._inputs = _Inputs(max_rows, -(-max_columns // PAGE_SIZE), device, is_pinned=False)
        self._stages = [_Stage(self._inputs, device) for _ in range(_NUM_STAGES)]
        self._num_steps = 0
        self._logits_tokens = torch.arange(max_rows, device=device)
        self._replays: dict[int, Pass] = {}

    def can_replay(self, plan: StepPlan) -> bool:
        """Whether the step is one of decoding rows alone, whose logits are all wanted, and fits into the buffers."""
        num_rows = len(plan.entries)
        return (
            plan.num_decoding == num_rows == len(plan.logits_tokens)
            and num_rows <= self.buckets[-1]
            and plan.page_table.shape[1] <= self._inputs.page_table.shape[1]
            and all(entry.vectors is None for entry in plan.entries)
        )

    def replay(self, plan: StepPlan, sampled: torch.Tensor | None = None) -> torch.Tensor:
        """The logits `[rows, vocab_size]` of a plan that `can_replay`; they last until the next call.

        `sampled` are the tokens that the plan's sources name. The first call for a bucket captures it, which takes long
        and waits for the device: see `warm_up`.
        """
        num_rows = len(plan.entries)
        bucket = next(size for size in self.buckets if size >= num_rows)
        run = self._replays.get(bucket) or self._captured(bucket)
        stage = self._stages[self._num_steps % _NUM_STAGES]
        self._num_steps += 1
        stage.fill(plan)
        stage.copy_to(self._inputs, bucket)
        if plan.takes_samples:
            token_ids = self._inputs.token_ids[:num_rows]
            token_ids.copy_(take_sampled(token_ids, self._inputs.token_sources[:num_rows], sampled))
        return run()[:num_rows]

    def warm_up(self) -> None:
        """Capture every bucket, the largest first: the others then find room in its memory."""
        for bucket in reversed(self.buckets):
            if bucket not in self._replays:
                self._captured(bucket)

    def _captured(self, bucket: int) -> Pass:
        # Capturing runs the pass: it must not write the last step's keys and values once more, to pages that may be
        # another row's by now.
        self._inputs.blank()
        buffers = self._buffers(bucket)
        self._replays[bucket] = self._capture(lambda: self._forward(buffers))
        return self._replays[bucket]

    def _buffers(self, bucket: int) -> DecodeBuffers:
        inputs = self._inputs
        return DecodeBuffers(
            token_ids=inputs.token_ids[:bucket],
            positions=inputs.positions[:bucket],
            logits_tokens=self._logits_tokens[:bucket],
            batch=PagedBatch(
                page_table=inputs.page_table[:bucket],
                lengths=inputs.lengths[:bucket],
                query_starts=inputs.query_starts[: bucket + 1],
                write_slots=inputs.write_slots[:bucket],
                num_decoding=bucket,
                max_length=self._max_columns,
            ),
        )


class _Inputs:
    """A decode step's numbers in two pieces of memory, so that two copies bring them to the device.

    The page table comes last in its piece: what a smaller bucket needs of it is a beginning of the piece.
    """

    def __init__(self, max_rows: int, max_pages: int, device: torch.device, *, is_pinned: bool) -> None:
        self.longs = torch.empty((4, max_rows), dtype=torch.int64, device=device, pin_memory=is_pinned)
        self.token_ids, self.token_sources, self.positions, self.write_slots = self.longs
        starts_at = _aligned(max_rows)
        self.table_at = starts_at + _aligned(max_rows + 1)
        size = self.table_at + max_rows * max_pages
        self.ints = torch.empty(size, dtype=torch.int32, device=device, pin_memory=is_pinned)
        self.lengths = self.ints[:max_rows]
        self.query_starts = self.ints[starts_at : starts_at + max_rows + 1]
        self.page_table = self.ints[self.table_at :].view(max_rows, max_pages)
        self.blank()

    def blank(self) -> None:
        """Make every row one without tokens."""
        self.longs.zero_()
        self.token_sources.fill_(NO_SOURCE)
        self.write_slots.fill_(NO_SLOT)
        self.ints.zero_()
        self.page_table.fill_(NO_PAGE)


class _Stage:
    """Host memory where one step's numbers are put together."""

    def __init__(self, inputs: _Inputs, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        max_rows, max_pages = inputs.page_table.shape
        self._host = _Inputs(max_rows, max_pages, torch.device("cpu"), is_pinned=is_cuda)
        self._copied = torch.cuda.Event() if is_cuda else None  # type: ignore[no-untyped-call]
        self._written = (0, 0)  # rows and pages of the table that are not blank

    def fill(self, plan: StepPlan) -> None:
        """Put the plan's rows in, and rows without tokens behind them."""
        if self._copied is not None:
            # Two steps ago: this has long happened.
            self._copied.synchronize()
        num_rows, num_pages = plan.page_table.shape
        for held, given, padding in (
            (self._host.token_ids, plan.token_ids, 0),
            (self._host.token_sources, plan.token_sources, NO_SOURCE),
            (self._host.positions, plan.positions, 0),
            (self._host.write_slots, plan.write_slots, NO_SLOT),
            (self._host.lengths, plan.lengths, 0),
            (self._host.query_starts, plan.query_starts, num_rows),
        ):
            numbers = held.numpy()
            numbers[: len(given)] = given
            numbers[len(given) :] = padding
        table: np.ndarray = self._host.page_table.numpy()
        table[: self._written[0], : self._written[1]] = NO_PAGE
        table[:num_rows, :num_pages] = plan.page_table
        self._written = (num_rows, num_pages)

    def copy_to(self, inputs: _Inputs, bucket: int) -> None:
        """Bring what the bucket reads to the device, without waiting for it."""
        inputs.longs.copy_(self._host.longs, non_blocking=True)
        size = inputs.table_at + bucket * inputs.page_table.shape[1]
        inputs.ints[:size].copy_(self._host.ints[:size], non_blocking=True)
        if self._copied is not None:
            self._copied.record()


def take_sampled(token_ids: torch.Tensor, sources: torch.Tensor, sampled: torch.Tensor | None) -> torch.Tensor:
    """The step's tokens `[T]`: where `sources [T]` names a place of `sampled`, the token that lies there."""
    if sampled is None:
        raise RuntimeError("the plan takes tokens from a sample, and there is none")
    return torch.where(sources == NO_SOURCE, token_ids, sampled[sources.clamp_min(0)])


def _aligned(number: int) -> int:
    return -(-number // _ALIGNMENT) * _ALIGNMENT
