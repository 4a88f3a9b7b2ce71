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
from server.engine.kv import KvCache
from server.engine.plan import PlanEntry, build_plan
from server.engine.slots import SlotLedger

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 8e-2, torch.float16: 2e-2}
"""Largest allowed root-mean-square difference of logits, relative to the reference's own spread."""

NUM_PASSES = 5
"""Forward passes that a passed gate has run."""

_LONG, _SHORT = 9, 5


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
        worst = max(worst, _relative_difference(found, expected))
    if worst > tolerance:
        return GateResult(worst, f"packed rows differ from rows alone by {worst:.1e} (allowed {tolerance:.0e})")
    cut = [[(short[:2], 0), (short[2:4], 2), (short[4:], 4)], [(long[:7], 0), (long[7:8], 7), (long[8:], 8)]]
    for found, expected in zip(_run(forward, cut, dtype, device), references, strict=False):
        worst = max(worst, _relative_difference(found, expected))
    if worst > tolerance:
        return GateResult(worst, f"a row in chunks differs from the whole by {worst:.1e} (allowed {tolerance:.0e})")
    moved = _run(forward, [[(short, 0)], [(other, 0)]], dtype, device)[0]
    leak = _relative_difference(moved, together[0])
    if leak > tolerance / 10:
        return GateResult(leak, f"a row's logits move by {leak:.1e} when its neighbour changes")
    return GateResult(worst, None)


def _run(
    forward: Forward, rows: Sequence[Sequence[tuple[Sequence[int], int]]], dtype: torch.dtype, device: torch.device
) -> list[torch.Tensor]:
    """Run each row's chunks, chunk by chunk, all rows in the same steps. Returns each row's logits, in order."""
    ledger = SlotLedger(
        max_tokens=SlotLedger.MIN_CAPACITY, budget_tokens=4 * SlotLedger.MIN_CAPACITY,
        slab_tokens=4 * SlotLedger.MIN_CAPACITY, max_slots_per_slab=4,
    )  # fmt: skip
    kv = KvCache(forward.layers, ledger, dtype=dtype, device=device)
    slots = [kv.allocate(owner + 1, _LONG) for owner in range(len(rows))]
    found: list[list[torch.Tensor]] = [[] for _ in rows]
    for step in range(len(rows[0])):
        entries = []
        for row, slot in zip(rows, slots, strict=True):
            token_ids, start = row[step]
            if slot is None:
                raise RuntimeError("the gate's own slots do not fit")
            entries.append(PlanEntry(slot, start, token_ids, logits_from=0))
        plan, order = build_plan(entries)
        logits = forward.run(kv, plan).float()
        for packed, original in enumerate(order):
            found[original].append(logits[torch.from_numpy(plan.logits_entries == packed)])
    return [torch.cat(parts) for parts in found]


def _relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root-mean-square difference over the reference's standard deviation; NaN counts as infinite."""
    spread = expected.std().clamp_min(1e-6)
    difference = (found - expected).square().mean().sqrt() / spread
    value = float(difference)
    return value if value == value else float("inf")
