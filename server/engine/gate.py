"""The gate at load: a model is served only in a way that was just seen to be right on this machine.

Two ragged rows are run packed and apart. Their logits must agree with the model's own attention on each row alone, the
attention function must have been called exactly once a layer, a prompt cut into chunks and continued token by token
must give what the whole gives, and one row's logits must not move when its neighbour's content changes. Models that
keep state across tokens outside attention (state-space hybrids) fail the last two; models that ignore the attention
function fail the first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from server.engine.forward import Forward, reference_logits
from server.engine.kv import KvPool, num_pages_for
from server.engine.plan import PlanEntry, build_plan

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 8e-2, torch.float16: 2e-2}
"""Largest allowed root-mean-square difference of logits, relative to the reference's own spread."""

NUM_PASSES = 5
"""Forward passes that a passed gate has run."""

_LONG, _SHORT = 21, 5
"""The longer row takes more than one page of the pool."""


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
    forward: Forward, max_rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether a decoding row's logits have the same bits at any place of any batch of up to `max_rows` rows."""
    generator = torch.Generator().manual_seed(20)
    texts = torch.randint(0, vocab_size, (max_rows, _LONG), generator=generator).tolist()
    pages_each = num_pages_for(_LONG + 1)
    pool = KvPool(
        forward.layers, row_pages=pages_each * max_rows, prefix_pages=0, dtype=dtype, device=device, poison_freed=True
    )
    texts_in, entries = [], []
    for serial, text in enumerate(texts, start=1):
        pages = pool.allocate(serial, pages_each)
        if pages is None:
            raise RuntimeError("the gate's own pages do not fit")
        texts_in.append(PlanEntry(pages, 0, text, logits_from=_LONG))
        entries.append(PlanEntry(pages, _LONG, text[:1], logits_from=0))
    forward.run(pool, build_plan(texts_in)[0])
    needle, others = entries[0], entries[1:]
    alone = forward.run(pool, build_plan([needle])[0])[0].clone()
    for num_others in {min(1, max_rows - 1), max_rows // 2, max_rows - 1}:
        for place in {0, num_others // 2, num_others}:
            rows = [*others[:num_others][:place], needle, *others[:num_others][place:]]
            if not torch.equal(forward.run(pool, build_plan(rows)[0])[place], alone):
                return False
    return True


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
    tables = [pool.allocate(serial, pages_each) for serial in range(1, len(rows) + 1)]
    found: list[list[torch.Tensor]] = [[] for _ in rows]
    for step in range(len(rows[0])):
        entries = []
        for row, pages in zip(rows, tables, strict=True):
            token_ids, start = row[step]
            if pages is None:
                raise RuntimeError("the gate's own pages do not fit")
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
