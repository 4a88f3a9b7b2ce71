"""The gate at load: a model is served only in a way that was just seen to be right on this machine.

Two ragged rows are run packed and apart. Their logits must agree with the model's own attention on each row alone, the
attention function must have been called exactly once a layer, a prompt cut into chunks and continued token by token
must give what the whole gives, and one row's logits must not move when its neighbour's content changes. Models that
keep state across tokens outside attention (state-space hybrids) fail the last two; models that ignore the attention
function fail the first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from server.engine.forward import Forward, reference_logits
from server.engine.kv import KvPool, num_pages_for
from server.engine.pages import PAGE_SIZE, PageNumbers
from server.engine.plan import PlanEntry, build_plan

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 8e-2, torch.float16: 2e-2}
"""Largest allowed root-mean-square difference of logits, relative to the reference's own spread."""

NUM_PASSES = 5
"""Forward passes that a passed gate has run."""

_LONG, _SHORT = 21, 5
"""The longer row takes more than one page of the pool."""

_UNDIVIDED_COLUMNS, _DIVIDED_COLUMNS = 32, 320
"""On CUDA a row alone in its batch is divided from 256 columns on (`triton_attention.MIN_SPLIT_COLUMNS`)."""

_NUM_TEXTS = 8

_SHARED_PASS_LENGTHS = (1, 7, 16, 20, 33, 20)
"""Vectors a row of `check_shared_passes`: a product of one row, of less and of more than a tile, of several pages."""


@dataclass(frozen=True, slots=True)
class GateResult:
    """`error` is the largest relative difference seen; `reason` is None when the gate was passed."""

    error: float
    reason: str | None

    @property
    def passed(self) -> bool:
        return self.reason is None


@torch.inference_mode()
def check_forward(
    forward: Forward,
    references: Sequence[torch.Tensor],
    rows: Sequence[Sequence[int]],
    dtype: torch.dtype,
    device: torch.device,
) -> GateResult:
    """Run the gate on `forward`. `references[i]` are the logits of `rows[i]` alone by the model's own attention.

    Never raises for a model that misbehaves: the reason says how.
    """
    try:
        return _check(forward, references, rows, dtype, device)
    except Exception as error:
        return GateResult(float("inf"), f"{type(error).__name__}: {error}")


def gate_rows(vocab_size: int) -> list[list[int]]:
    """Two ragged rows of token ids, and a second version of the longer one with other content."""
    generator = torch.Generator().manual_seed(20)
    return [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in (_SHORT, _LONG, _LONG)]


@torch.inference_mode()
def gate_references(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Logits `[n, vocab_size]` of each row alone. The model must be set to its own attention."""
    return [reference_logits(model, row).float() for row in rows]


@torch.inference_mode()
def check_deterministic(
    forward: Forward, max_rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device, max_columns: int
) -> bool:
    """Whether a decoding row's logits have the same bits at any place of any batch of up to `max_rows` rows.

    The rows have columns enough (of `max_columns` that the model has) for a kernel to divide them. There are a few
    texts only, which rows read in common, so that time and memory do not grow with `max_rows`.
    """
    wanted = _DIVIDED_COLUMNS if device.type == "cuda" else _UNDIVIDED_COLUMNS
    num_text_pages = min(wanted, max_columns - 1) // PAGE_SIZE
    num_columns = num_text_pages * PAGE_SIZE
    num_texts = min(_NUM_TEXTS, max_rows)
    pool = KvPool(
        forward.layers,
        row_pages=num_texts * num_text_pages + max_rows,
        prefix_pages=0,
        dtype=dtype,
        device=device,
        poison_freed=True,
    )
    generator = torch.Generator().manual_seed(20)
    texts = torch.randint(0, vocab_size, (num_texts, num_columns), generator=generator).tolist()
    text_pages = [_allocate(pool, serial, num_text_pages) for serial in range(1, num_texts + 1)]
    if num_columns:
        for text, pages in zip(texts, text_pages, strict=True):
            forward.run(pool, build_plan([PlanEntry(pages, 0, text, logits_from=num_columns)])[0])
    token_ids = torch.randint(0, vocab_size, (max_rows,), generator=generator).tolist()
    entries = []
    for index, token_id in enumerate(token_ids):
        own = _allocate(pool, num_texts + 1 + index, 1)
        pages = np.concatenate([text_pages[index % num_texts], own])
        entries.append(PlanEntry(pages, num_columns, [token_id], logits_from=0))
    needle, others = entries[0], entries[1:]
    alone = forward.run(pool, build_plan([needle])[0])[0].clone()
    for num_others in {min(1, max_rows - 1), max_rows // 2, max_rows - 1}:
        for place in {0, num_others // 2, num_others}:
            rows = [*others[:num_others][:place], needle, *others[:num_others][place:]]
            if not torch.equal(forward.run(pool, build_plan(rows)[0])[place], alone):
                return False
    return True


@torch.inference_mode()
def check_shared_passes(forward: Forward, hidden_size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether vectors get keys and values with the same bits alone in a pass and in any company.

    A sample, not a proof: for backbones whose products add in an order that does not depend on the number of rows.
    """
    generator = torch.Generator().manual_seed(21)
    texts = [torch.randn(k, hidden_size, generator=generator).to(device, dtype) for k in _SHARED_PASS_LENGTHS]
    num_pages = sum(num_pages_for(len(vectors)) for vectors in texts)
    pool = KvPool(forward.layers, row_pages=num_pages, prefix_pages=0, dtype=dtype, device=device, poison_freed=True)

    def run(indices: Sequence[int]) -> dict[int, tuple[torch.Tensor, ...]]:
        pages = {index: _allocate(pool, index + 1, num_pages_for(len(texts[index]))) for index in indices}
        entries = [
            PlanEntry(pages[i], 0, [0] * len(texts[i]), logits_from=len(texts[i]), vectors=texts[i]) for i in indices
        ]
        forward.run(pool, build_plan(entries)[0])
        columns = {}
        for index, owned in pages.items():
            columns[index] = tuple(part.clone() for part in pool.read(owned, len(texts[index])).parts)
            pool.release(owned, index + 1)
        return columns

    everyone = range(len(texts))
    alone = {index: run([index])[index] for index in everyone}
    for company in ([0, 1], [3, 0], [2, 4, 1], [*everyone], [*reversed(everyone)]):
        for index, parts in run(company).items():
            if not all(torch.equal(one, other) for one, other in zip(parts, alone[index], strict=True)):
                return False
    return True


def _allocate(pool: KvPool, serial: int, count: int) -> PageNumbers:
    pages = pool.allocate(serial, count)
    if pages is None:
        raise RuntimeError("the gate's own pages do not fit")
    return pages


def _check(
    forward: Forward,
    references: Sequence[torch.Tensor],
    rows: Sequence[Sequence[int]],
    dtype: torch.dtype,
    device: torch.device,
) -> GateResult:
    short, long, other = rows
    tolerance = TOLERANCE[dtype]
    worst = 0.0
    together = _run(forward, [[(short, 0)], [(long, 0)]], dtype, device)
    for found, expected in zip(together, references, strict=False):
        worst = max(worst, relative_difference(found, expected))
    if worst > tolerance:
        return GateResult(worst, f"packed rows differ from rows alone by {worst:.1e} (allowed {tolerance:.0e})")
    cut = [[(short[:2], 0), (short[2:4], 2), (short[4:], 4)], [(long[:15], 0), (long[15:20], 15), (long[20:], 20)]]
    for found, expected in zip(_run(forward, cut, dtype, device), references, strict=False):
        worst = max(worst, relative_difference(found, expected))
    if worst > tolerance:
        return GateResult(worst, f"a row in chunks differs from the whole by {worst:.1e} (allowed {tolerance:.0e})")
    moved = _run(forward, [[(short, 0)], [(other, 0)]], dtype, device)[0]
    leak = relative_difference(moved, together[0])
    if leak > tolerance / 10:
        return GateResult(leak, f"a row's logits move by {leak:.1e} when its neighbour changes")
    return GateResult(worst, None)


def _run(
    forward: Forward, rows: Sequence[Sequence[tuple[Sequence[int], int]]], dtype: torch.dtype, device: torch.device
) -> list[torch.Tensor]:
    """Run each row's chunks, chunk by chunk, all rows in the same steps. Returns each row's logits, in order."""
    pages_each = num_pages_for(_LONG)
    pool = KvPool(
        forward.layers, row_pages=pages_each * len(rows), prefix_pages=0, dtype=dtype, device=device, poison_freed=True
    )
    tables = [_allocate(pool, serial, pages_each) for serial in range(1, len(rows) + 1)]
    found: list[list[torch.Tensor]] = [[] for _ in rows]
    for step in range(len(rows[0])):
        entries = []
        for row, pages in zip(rows, tables, strict=True):
            token_ids, start = row[step]
            entries.append(PlanEntry(pages, start, token_ids, logits_from=0))
        plan, order = build_plan(entries)
        logits = forward.run(pool, plan).float()
        for packed, original in enumerate(order):
            found[original].append(logits[torch.from_numpy(plan.logits_entries == packed)])
    return [torch.cat(parts) for parts in found]


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root-mean-square difference over the reference's standard deviation; NaN counts as infinite."""
    spread = expected.std().clamp_min(1e-6)
    difference = (found - expected).square().mean().sqrt() / spread
    value = float(difference)
    return value if value == value else float("inf")
