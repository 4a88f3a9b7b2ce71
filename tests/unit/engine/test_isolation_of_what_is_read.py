"""What a pass reads beside the indices one by one: the order of a whole write, and the vectors of the entries.

Each damage is first shown to change a real backbone's logits, then to be caught by the check before the pass.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from server.engine.backbone import Backbone
from server.engine.isolation import Claim, check_plan
from server.engine.kv import KvCache
from server.engine.plan import PlanEntry, StepPlan, build_plan
from server.engine.slots import SlotLedger

TOKENS = ((5, 6), (9, 8), (20, 21))


def run_steps(llama: Backbone, damage: Callable[[StepPlan], None]) -> tuple[torch.Tensor, set[int]]:
    """Three rows decode two tokens each, the plan of the first step damaged; the last logits, and who was blamed."""
    ledger = SlotLedger(max_tokens=128, budget_tokens=4 * 128, slab_tokens=4 * 128, max_slots_per_slab=4)
    kv = KvCache(llama.layers, ledger, dtype=llama.dtype, device=llama.device)
    slots = [kv.allocate(serial, 10) for serial in (1, 2, 3)]
    blamed: set[int] = set()
    logits = torch.empty(0)
    for step in range(2):
        entries, claims = [], []
        for slot, tokens in zip(slots, TOKENS, strict=True):
            assert slot is not None
            entries.append(PlanEntry(slot, step, [tokens[step]], logits_from=0))
            claims.append(Claim(slot.owner, slot, step, [tokens[step]], num_logits=1))
        plan, order = build_plan(entries)
        if step == 0:
            damage(plan)
        blamed |= {violation.entry for violation in check_plan(plan, [claims[i] for i in order], ledger.slabs)}
        logits = llama.forward(kv, plan)
    return logits, blamed


def no_damage(plan: StepPlan) -> None:
    return


def exchange_whole_writes(plan: StepPlan) -> None:
    (write,) = plan.writes
    for array in (write.tokens, write.slots, write.columns):
        array[[0, 2]] = array[[2, 0]]


def give_an_entry_vectors(plan: StepPlan) -> None:
    plan.entries[1] = replace(plan.entries[1], vectors=torch.ones(1, 32))


@pytest.mark.parametrize(("damage", "touched"), [(exchange_whole_writes, {0, 2}), (give_an_entry_vectors, {1})])
def test_damage_that_changes_logits_is_caught(
    llama: Backbone, damage: Callable[[StepPlan], None], touched: set[int]
) -> None:
    healthy, nobody = run_steps(llama, no_damage)
    assert nobody == set()
    damaged, blamed = run_steps(llama, damage)

    changed = {row for row in range(3) if not torch.allclose(healthy[row], damaged[row], atol=1e-3)}
    assert changed == touched
    assert blamed == touched


def test_vectors_of_a_compiled_prompt_must_be_its_own() -> None:
    ledger = SlotLedger(max_tokens=128, budget_tokens=128, slab_tokens=128, max_slots_per_slab=1)
    slot = ledger.allocate(1, 10)
    assert slot is not None
    vectors, others = torch.ones(2, 4), torch.zeros(2, 4)
    plan, _ = build_plan([PlanEntry(slot, 0, [0, 0], logits_from=2, vectors=vectors)])
    claim = Claim(1, slot, 0, [0, 0], num_logits=0, vectors=vectors)

    assert check_plan(plan, [claim], ledger.slabs) == []
    for wrong in (replace(claim, vectors=others), replace(claim, vectors=None)):
        assert [violation.entry for violation in check_plan(plan, [wrong], ledger.slabs)] == [0]
