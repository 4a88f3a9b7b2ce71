"""What a pass reads beside the indices one by one: whole pages exchanged, and the vectors of the entries.

Each damage is first shown to change a real backbone's logits, then to be caught by the check before the pass.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from server.engine.backbone import Backbone
from server.engine.isolation import Claim, check_plan
from server.engine.kv import KvPool
from server.engine.pages import PageLedger
from server.engine.plan import PlanEntry, StepPlan, build_plan
from server.engine.row_pages import RowPages
from tests.unit.engine.batches import allocated

TOKENS = ((5, 6), (9, 8), (20, 21))


def claim_of(serial: int, pages: RowPages, step: int, token_ids: list[int]) -> Claim:
    return Claim(
        serial, step, token_ids, num_logits=1,
        pages=pages.numbers, generations=pages.generations, contents=pages.contents,
    )  # fmt: skip


def run_steps(llama: Backbone, damage: Callable[[StepPlan], None], damaged_step: int) -> tuple[torch.Tensor, set[int]]:
    """Three rows decode two tokens each, the plan of one step damaged; the last logits, and who was blamed."""
    pool = KvPool(llama.layers, row_pages=3, prefix_pages=0, dtype=llama.dtype, device=llama.device)
    rows = []
    for serial in (1, 2, 3):
        rows.append(RowPages(10))
        rows[-1].append(allocated(pool.ledger, serial, 1), pool.ledger)
    blamed: set[int] = set()
    logits = torch.empty(0)
    for step in range(2):
        entries = [
            PlanEntry(pages.numbers, step, [tokens[step]], logits_from=0)
            for pages, tokens in zip(rows, TOKENS, strict=True)
        ]
        claims = [claim_of(i + 1, pages, step, [TOKENS[i][step]]) for i, pages in enumerate(rows)]
        plan, order = build_plan(entries)
        if step == damaged_step:
            damage(plan)
        blamed |= {violation.entry for violation in check_plan(plan, [claims[i] for i in order], pool.ledger)}
        logits = llama.forward(pool, plan)
    return logits, blamed


def no_damage(plan: StepPlan) -> None:
    return


def exchange_writes(plan: StepPlan) -> None:
    plan.write_slots[[0, 2]] = plan.write_slots[[2, 0]]


def exchange_reads(plan: StepPlan) -> None:
    plan.page_table[[0, 2]] = plan.page_table[[2, 0]]


def exchange_pages(plan: StepPlan) -> None:
    """Reads and writes agree with each other: the rows have changed places in the pool."""
    exchange_writes(plan)
    exchange_reads(plan)


def give_an_entry_vectors(plan: StepPlan) -> None:
    plan.entries[1] = replace(plan.entries[1], vectors=torch.ones(1, 32))


@pytest.mark.parametrize(
    ("damage", "step", "touched"),
    [
        (exchange_writes, 0, {0, 2}),
        (exchange_reads, 1, {0, 2}),
        (exchange_pages, 1, {0, 2}),
        (give_an_entry_vectors, 0, {1}),
    ],
)
def test_damage_that_changes_logits_is_caught(
    llama: Backbone, damage: Callable[[StepPlan], None], step: int, touched: set[int]
) -> None:
    healthy, nobody = run_steps(llama, no_damage, step)
    assert nobody == set()
    damaged, blamed = run_steps(llama, damage, step)

    changed = {row for row in range(3) if not torch.allclose(healthy[row], damaged[row], atol=1e-3)}
    assert changed == touched
    assert blamed == touched


def test_vectors_of_a_compiled_prompt_must_be_its_own() -> None:
    ledger = PageLedger(1)
    pages = RowPages(2)
    pages.append(allocated(ledger, 1, 1), ledger)
    vectors, others = torch.ones(2, 4), torch.zeros(2, 4)
    plan, _ = build_plan([PlanEntry(pages.numbers, 0, [0, 0], logits_from=2, vectors=vectors)])
    claim = replace(claim_of(1, pages, 0, [0, 0]), num_logits=0, vectors=vectors)

    assert check_plan(plan, [claim], ledger) == []
    for wrong in (replace(claim, vectors=others), replace(claim, vectors=None)):
        assert [violation.entry for violation in check_plan(plan, [wrong], ledger)] == [0]


def test_claim_without_pages_is_blamed() -> None:
    ledger = PageLedger(1)
    pages = np.zeros(1, dtype=np.int32)
    plan, _ = build_plan([PlanEntry(pages, 0, [7], logits_from=0)])
    assert [violation.entry for violation in check_plan(plan, [Claim(1, 0, [7], num_logits=1)], ledger)] == [0]
