"""Random batches for the plan and its check: slabs of several capacities, holes where rows have left, ragged chunks."""

from dataclasses import dataclass

import hypothesis.strategies as st

from server.engine.isolation import Claim, Violation, check_plan
from server.engine.plan import PlanEntry, StepPlan, build_plan
from server.engine.slots import NO_PREFIX, Slot, SlotLedger

LONGEST_ROW = 512


@dataclass(slots=True)
class Batch:
    """Entries and claims as the rows made them, and the plan with its claims in packed order."""

    ledger: SlotLedger
    entries: list[PlanEntry]
    claims: list[Claim]
    plan: StepPlan
    packed: list[Claim]

    def check(self) -> list[Violation]:
        return check_plan(self.plan, self.packed, self.ledger.slabs)

    def blamed(self) -> set[int]:
        return {violation.entry for violation in self.check()}


def make_batch(ledger: SlotLedger, rows: list[Claim]) -> Batch:
    entries = [
        PlanEntry(row.slot, row.start_column, row.token_ids, logits_from=row.num_tokens - row.num_logits)
        for row in rows
    ]
    plan, order = build_plan(entries)
    return Batch(ledger, entries, rows, plan, [rows[i] for i in order])


@st.composite
def batches(draw: st.DrawFn, min_rows: int = 1, max_rows: int = 10) -> Batch:
    """Rows with slots in a ledger from which others have left; most of them decode."""
    ledger = SlotLedger(max_tokens=LONGEST_ROW, budget_tokens=40 * 128, slab_tokens=8 * 128, max_slots_per_slab=8)
    slots: list[Slot] = []
    for serial, num_tokens in enumerate(draw(st.lists(st.sampled_from([100, 100, 100, 200, 500]), max_size=16)), 1):
        slot = ledger.allocate(serial, num_tokens)
        if slot is not None:
            slots.append(slot)
    while len(slots) < min_rows:
        slot = ledger.allocate(100 + len(slots), 100)
        assert slot is not None
        slots.append(slot)
    num_rows = draw(st.integers(min_rows, min(len(slots), max_rows)))
    kept = draw(st.permutations(slots))[:num_rows]
    for slot in slots:
        if slot not in kept and draw(st.booleans()):
            ledger.free(slot)  # the others stay: rows that do not take part in this step
    return make_batch(ledger, [draw(_claims(ledger, slot)) for slot in kept])


@st.composite
def _claims(draw: st.DrawFn, ledger: SlotLedger, slot: Slot) -> Claim:
    num_tokens = draw(st.sampled_from([1, 1, 1, 2, 5, 17]))
    start = draw(st.integers(0, slot.capacity - num_tokens))
    prefix_uid = draw(st.sampled_from([NO_PREFIX, 3, 4]))
    ledger.stamp_prefix(slot, prefix_uid)
    return Claim(
        serial=slot.owner,
        slot=slot,
        start_column=start,
        token_ids=draw(st.lists(st.integers(0, 50), min_size=num_tokens, max_size=num_tokens)),
        num_logits=draw(st.integers(0, num_tokens)),
        prefix_uid=prefix_uid,
    )
