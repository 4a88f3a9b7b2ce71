"""The plan: the index tensors of one step. They are made here and nowhere else.

A step computes a packed batch of T tokens: one segment of consecutive tokens a row, no padding between. Rows with one
token (decoding) come first, chunks of clients' prompts follow. The column of a token in its row is also its position:
the prefix fills columns 0 to k-1, and the client's tokens start at k. A row's page table says where each of its
columns lies.

All index arrays are numpy; the tensors that the forward pass uses share their memory (`torch.from_numpy`), so what
`isolation.check_plan` reads is what the pass will read. On a device with memory of its own the checked arrays are
copied there afterwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from server.engine.kernels.batch import NO_SLOT, PagedBatch
from server.engine.pages import PAGE_SIZE, PageNumbers
from server.engine.transfers import upload

IntArray = npt.NDArray[np.int64]

NO_PAGE = -1
"""What stands in a page table behind a row's last page."""

NO_SOURCE = -1
"""The `token_sources` entry of a token that the host knows."""


@dataclass(frozen=True, slots=True)
class PlanEntry:
    """One segment: the tokens of one row (or the vectors of one prompt being compiled) in this step.

    Computes `token_ids` at columns `start_column, start_column + 1, ...` of the row whose pages are `pages`. With
    `vectors` (`[n, hidden_size]`) the token ids are placeholders and the vectors take the place of the embeddings.
    `logits_from` is the index within the segment of the first token whose logits are wanted (`len(token_ids)`: none).
    `source` is set when only the device knows the segment's last token yet: its place in the sample of the step before.
    Its token id is a placeholder then.
    """

    pages: PageNumbers
    start_column: int
    token_ids: Sequence[int]
    logits_from: int
    vectors: torch.Tensor | None = None
    source: int | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def length(self) -> int:
        """The row's columns when the step is done."""
        return self.start_column + len(self.token_ids)


@dataclass(slots=True)
class StepPlan:
    """Everything that a forward pass needs to know about who is who.

    `entries` is in packed order; entry r is row r of the batch and owns tokens `query_starts[r] .. query_starts[r+1]
    - 1`. `logits_tokens[i]` is the token whose logits are row i of the result, and belongs to entry
    `logits_entries[i]`. Token t is `token_ids[t]`, unless `token_sources[t]` says at which place of the last sample the
    device finds it. The meaning of the other arrays is that of `PagedBatch`.
    """

    entries: list[PlanEntry]
    token_ids: IntArray  # [T]
    token_sources: IntArray  # [T]
    positions: IntArray  # [T]
    query_starts: npt.NDArray[np.int32]  # [R + 1]
    lengths: npt.NDArray[np.int32]  # [R]
    page_table: npt.NDArray[np.int32]  # [R, P]
    write_slots: IntArray  # [T]
    logits_tokens: IntArray  # [L]
    logits_entries: IntArray  # [L]
    num_decoding: int

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def takes_samples(self) -> bool:
        """Whether there are tokens that only the device knows yet."""
        return bool((self.token_sources != NO_SOURCE).any())

    def batch(self, device: torch.device, num_padding: int = 0) -> PagedBatch:
        """The plan as the attention kernels take it, on `device`, with so many padding tokens behind its own.

        Shares memory with the plan where the device is the CPU.
        """
        write_slots = self.write_slots
        if num_padding:
            write_slots = np.pad(write_slots, (0, num_padding), constant_values=NO_SLOT)
        page_table, lengths, query_starts, slots = upload(
            [self.page_table, self.lengths, self.query_starts, write_slots], device
        )
        return PagedBatch(
            page_table=page_table,
            lengths=lengths,
            query_starts=query_starts,
            write_slots=slots,
            num_decoding=self.num_decoding,
            max_length=int(self.lengths.max()),
        )


def build_plan(entries: Sequence[PlanEntry]) -> tuple[StepPlan, list[int]]:
    """Pack the entries. Returns the plan and, for each of its entries, its index in `entries`.

    Raises ValueError when an entry is empty or would leave its pages.
    """
    for entry in entries:
        if entry.num_tokens < 1:
            raise ValueError("an entry needs at least one token")
        if entry.length > len(entry.pages) * PAGE_SIZE:
            raise ValueError(f"{entry.length} columns leave {len(entry.pages)} pages of {PAGE_SIZE}")
    order = sorted(range(len(entries)), key=lambda i: entries[i].num_tokens > 1)
    packed = [entries[i] for i in order]
    counts = np.array([entry.num_tokens for entry in packed], dtype=np.int64)
    query_starts = np.zeros(len(packed) + 1, dtype=np.int32)
    np.cumsum(counts, out=query_starts[1:])
    token_entries = np.repeat(np.arange(len(packed), dtype=np.int64), counts)
    starts = np.array([entry.start_column for entry in packed], dtype=np.int64)
    offsets = np.arange(int(counts.sum()), dtype=np.int64) - query_starts[:-1][token_entries]
    columns = offsets + starts[token_entries]
    page_table = _page_table(packed)
    pages = page_table[token_entries, columns // PAGE_SIZE].astype(np.int64)
    logits_from = np.array([entry.logits_from for entry in packed], dtype=np.int64)
    logits_tokens = np.flatnonzero(offsets >= logits_from[token_entries])
    token_sources = np.full(len(columns), NO_SOURCE, dtype=np.int64)
    token_sources[query_starts[1:] - 1] = [NO_SOURCE if entry.source is None else entry.source for entry in packed]
    plan = StepPlan(
        entries=packed,
        token_ids=np.concatenate([np.asarray(entry.token_ids, dtype=np.int64) for entry in packed]),
        token_sources=token_sources,
        positions=columns,
        query_starts=query_starts,
        lengths=(starts + counts).astype(np.int32),
        page_table=page_table,
        write_slots=pages * PAGE_SIZE + columns % PAGE_SIZE,
        logits_tokens=logits_tokens,
        logits_entries=token_entries[logits_tokens],
        num_decoding=int(np.count_nonzero(counts == 1)),
    )
    return plan, order


def _page_table(packed: Sequence[PlanEntry]) -> npt.NDArray[np.int32]:
    """`[R, P]`: each row's pages up to its last column of this step, then NO_PAGE."""
    needed = [-(-entry.length // PAGE_SIZE) for entry in packed]
    table = np.full((len(packed), max(needed)), NO_PAGE, dtype=np.int32)
    for row, (entry, count) in enumerate(zip(packed, needed, strict=True)):
        table[row, :count] = entry.pages[:count]
    return table
