"""The plan: the index tensors of one step. They are made here and nowhere else.

A step computes a packed batch of T tokens: one segment of consecutive tokens an entry, no padding between. Segments of
one token (decoding rows) come first, ordered by slab and slot, so that the rows of a slab are read with one batched
product; longer segments (chunks of a client's prompt) follow, each read alone. The column of a token in its slot is
also its position: the prefix fills columns 0 to k-1, and the client's tokens start at k.

All index arrays are numpy; the tensors that the forward pass uses share their memory (`torch.from_numpy`), so what
`isolation.check_plan` reads is what the pass will read. On a device with memory of its own the checked arrays are
copied there afterwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from server.engine.slots import Slot

IntArray = npt.NDArray[np.int64]

MAX_HOLE = 4
"""Unused slots that a batched read may span; a wider hole begins a new read."""


@dataclass(frozen=True, slots=True)
class PlanEntry:
    """One segment: the tokens of one row (or the vectors of one prompt being compiled) in this step.

    Computes `token_ids` at columns `start_column, start_column + 1, ...` of `slot`. With `vectors` (`[n, hidden_size]`)
    the token ids are placeholders and the vectors take the place of the embeddings. `logits_from` is the index within
    the segment of the first token whose logits are wanted (`len(token_ids)`: none).
    """

    slot: Slot
    start_column: int
    token_ids: Sequence[int]
    logits_from: int
    vectors: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(slots=True)
class SlabWrite:
    """Where this step's keys and values go in one slab: token `tokens[i]` to column `columns[i]` of slot `slots[i]`."""

    slab: int
    tokens: IntArray  # [n]
    slots: IntArray  # [n]
    columns: IntArray  # [n]


@dataclass(slots=True)
class DecodeRead:
    """A batched read of slots `first_slot .. first_slot + n - 1` of one slab, one query token each.

    `query_tokens[i]` is the token that asks slot `first_slot + i` (for an unused slot inside the run: any token, whose
    answer nobody takes); `lengths[i]` columns of it are visible (at least 1). The answer of `result_slots[j]` belongs
    to token `result_tokens[j]`.
    """

    slab: int
    first_slot: int
    query_tokens: IntArray  # [n]
    lengths: IntArray  # [n]
    result_slots: IntArray  # [m], relative to first_slot
    result_tokens: IntArray  # [m]
    is_dense: bool
    """True when every slot of the run is used and the tokens are consecutive: views then take the place of gathers."""

    @property
    def num_slots(self) -> int:
        return len(self.query_tokens)

    @property
    def max_length(self) -> int:
        return int(self.lengths.max())


@dataclass(slots=True)
class PrefillRead:
    """Tokens `first_token .. first_token + num_tokens - 1` ask one slot; token i sees columns 0 .. start_column + i."""

    slab: int
    slot: int
    first_token: int
    num_tokens: int
    start_column: int


@dataclass(slots=True)
class StepPlan:
    """Everything that a forward pass needs to know about who is who.

    `entries` is in packed order; entry e owns tokens `first_tokens[e] .. first_tokens[e] + counts[e] - 1`.
    `logits_tokens[i]` is the token whose logits are row i of the result, and belongs to entry `logits_entries[i]`.
    """

    entries: list[PlanEntry]
    token_ids: IntArray  # [T]
    positions: IntArray  # [T]
    first_tokens: IntArray  # [E]
    counts: IntArray  # [E]
    writes: list[SlabWrite]
    decode_reads: list[DecodeRead]
    prefill_reads: list[PrefillRead]
    logits_tokens: IntArray  # [L]
    logits_entries: IntArray  # [L]
    masks: dict[object, torch.Tensor] = field(default_factory=dict)
    """Masks are made once a step by the first layer that needs them and shared by the others."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


def build_plan(entries: Sequence[PlanEntry]) -> tuple[StepPlan, list[int]]:
    """Pack the entries. Returns the plan and, for each of its entries, its index in `entries`.

    Raises ValueError when an entry is empty or would leave its slot.
    """
    for entry in entries:
        if entry.num_tokens < 1:
            raise ValueError("an entry needs at least one token")
        if entry.start_column + entry.num_tokens > entry.slot.capacity:
            raise ValueError(
                f"columns {entry.start_column}..{entry.start_column + entry.num_tokens - 1} leave a slot of "
                f"{entry.slot.capacity}"
            )
    order = sorted(
        range(len(entries)),
        key=lambda i: (entries[i].num_tokens > 1, entries[i].slot.slab, entries[i].slot.index),
    )
    packed = [entries[i] for i in order]
    counts = np.array([entry.num_tokens for entry in packed], dtype=np.int64)
    first_tokens = np.cumsum(counts) - counts
    token_entries = np.repeat(np.arange(len(packed), dtype=np.int64), counts)
    starts = np.array([entry.start_column for entry in packed], dtype=np.int64)
    columns = np.arange(int(counts.sum()), dtype=np.int64) - first_tokens[token_entries] + starts[token_entries]
    slabs = np.array([entry.slot.slab for entry in packed], dtype=np.int64)
    slots = np.array([entry.slot.index for entry in packed], dtype=np.int64)
    logits_from = np.array([entry.logits_from for entry in packed], dtype=np.int64)
    offsets = columns - starts[token_entries]
    logits_tokens = np.flatnonzero(offsets >= logits_from[token_entries])
    num_decoding = int(np.count_nonzero(counts == 1))
    plan = StepPlan(
        entries=packed,
        token_ids=np.concatenate([np.asarray(entry.token_ids, dtype=np.int64) for entry in packed]),
        positions=columns.copy(),
        first_tokens=first_tokens,
        counts=counts,
        writes=_slab_writes(slabs[token_entries], slots[token_entries], columns),
        decode_reads=_decode_reads(slabs[:num_decoding], slots[:num_decoding], starts[:num_decoding]),
        prefill_reads=[
            PrefillRead(entry.slot.slab, entry.slot.index, int(first), entry.num_tokens, entry.start_column)
            for entry, first in zip(packed[num_decoding:], first_tokens[num_decoding:], strict=True)
        ],
        logits_tokens=logits_tokens,
        logits_entries=token_entries[logits_tokens],
    )
    return plan, order


def _slab_writes(slabs: IntArray, slots: IntArray, columns: IntArray) -> list[SlabWrite]:
    writes = []
    for slab in np.unique(slabs):
        tokens = np.flatnonzero(slabs == slab)
        writes.append(SlabWrite(int(slab), tokens, slots[tokens], columns[tokens]))
    return writes


def _decode_reads(slabs: IntArray, slots: IntArray, columns: IntArray) -> list[DecodeRead]:
    """Split the decoding tokens (already ordered by slab and slot) into runs of nearly consecutive slots."""
    if not len(slots):
        return []
    breaks = np.flatnonzero((np.diff(slabs) != 0) | (np.diff(slots) > MAX_HOLE + 1)) + 1
    reads = []
    for tokens in np.split(np.arange(len(slots), dtype=np.int64), breaks):
        first_slot = int(slots[tokens[0]])
        num_slots = int(slots[tokens[-1]]) - first_slot + 1
        relative = slots[tokens] - first_slot
        query_tokens = np.full(num_slots, tokens[0], dtype=np.int64)
        query_tokens[relative] = tokens
        lengths = np.ones(num_slots, dtype=np.int64)
        lengths[relative] = columns[tokens] + 1
        reads.append(
            DecodeRead(
                slab=int(slabs[tokens[0]]),
                first_slot=first_slot,
                query_tokens=query_tokens,
                lengths=lengths,
                result_slots=relative,
                result_tokens=tokens,
                is_dense=len(tokens) == num_slots,
            )
        )
    return reads
