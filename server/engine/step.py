"""A step's plan, checked: what each scheduled row contributes to it, and what the row says of itself.

The two are made here side by side, and from different sources on purpose: an entry is what the plan is built from, a
claim is what the row says without the plan.
"""

from collections.abc import Sequence

from server.engine.isolation import Claim, Violation, check_plan
from server.engine.pages import NO_PREFIX, PAGE_SIZE, PageLedger
from server.engine.plan import IntArray, PlanEntry, StepPlan, build_plan
from server.engine.scheduler import ScheduledRow

_PLACEHOLDER = 0
"""The id of a token that only the device knows: any that the model has."""


def plan_step(
    scheduled: Sequence[ScheduledRow], ledger: PageLedger, sampled_for: IntArray
) -> tuple[StepPlan, list[ScheduledRow], list[Violation]]:
    """The plan, its rows in packed order, and what the isolation check says: nothing, or the plan must not be run.

    `sampled_for`: for which rows, by their serials, the tokens of the last sample were chosen.
    """
    plan, order = build_plan([plan_entry(item) for item in scheduled])
    packed = [scheduled[i] for i in order]
    return plan, packed, check_plan(plan, [claim(item) for item in packed], ledger, sampled_for)


def plan_entry(item: ScheduledRow) -> PlanEntry:
    row = item.row
    if row.pages is None:
        raise RuntimeError(f"row {row.row_id} is scheduled without pages")
    return PlanEntry(
        pages=row.pages.numbers,
        start_column=row.next_column,
        token_ids=step_tokens(item),
        logits_from=item.num_tokens - num_logits(item),
        source=row.sample_place if awaits_token(item) else None,
    )


def claim(item: ScheduledRow) -> Claim:
    """What the row says of itself, for the check: read from the row, never from the plan."""
    row = item.row
    if row.pages is None:
        raise RuntimeError(f"row {row.row_id} is scheduled without pages")
    prompt, prefix = row.request.prompt, row.prefix
    if prompt is None or prefix is None:
        matches = prompt is None and prefix is None
    else:
        matches = prefix.key == prompt.prefix_key and prefix.digest == prompt.digest and prefix.num_users > 0
    return Claim(
        serial=row.serial,
        pages=row.pages.numbers,
        generations=row.pages.generations,
        contents=row.pages.contents,
        start_column=row.next_column,
        token_ids=step_tokens(item),
        num_logits=num_logits(item),
        prefix_uid=prefix.uid if prefix is not None else NO_PREFIX,
        tail_page=row.num_virtual_tokens // PAGE_SIZE if row.num_virtual_tokens % PAGE_SIZE else None,
        prefix_matches=matches,
        awaits_token=awaits_token(item),
    )


def step_tokens(item: ScheduledRow) -> list[int]:
    first = item.row.num_computed
    known = item.row.token_ids[first : first + item.num_tokens]
    return [*known, _PLACEHOLDER] if awaits_token(item) else known


def awaits_token(item: ScheduledRow) -> bool:
    """Whether the last token that the row computes is one that it has been given, but on the device alone."""
    return item.row.num_computed + item.num_tokens > len(item.row.token_ids)


def num_logits(item: ScheduledRow) -> int:
    if item.row.wants_prompt_logprobs and item.row.num_computed < item.row.num_prompt_tokens:
        return item.num_tokens
    return 1 if item.yields_token else 0
