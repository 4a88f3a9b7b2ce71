"""What a scheduled row contributes to a plan, and what it says of itself for the isolation check.

The two are made here side by side, and from different sources on purpose: an entry is what the plan is built from, a
claim is what the row says without the plan.
"""

from server.engine.isolation import Claim
from server.engine.plan import PlanEntry
from server.engine.scheduler import ScheduledRow
from server.engine.slots import NO_PREFIX


def plan_entry(item: ScheduledRow) -> PlanEntry:
    row = item.row
    if row.slot is None:
        raise RuntimeError(f"row {row.row_id} is scheduled without a slot")
    return PlanEntry(
        slot=row.slot,
        start_column=row.next_column,
        token_ids=step_tokens(item),
        logits_from=item.num_tokens - num_logits(item),
    )


def claim(item: ScheduledRow) -> Claim:
    """What the row says of itself, for the check: read from the row, never from the plan."""
    row = item.row
    if row.slot is None:
        raise RuntimeError(f"row {row.row_id} is scheduled without a slot")
    prompt, prefix = row.request.prompt, row.prefix
    if prompt is None or prefix is None:
        matches = prompt is None and prefix is None
    else:
        matches = prefix.key == prompt.prefix_key and prefix.digest == prompt.digest and prefix.num_users > 0
    return Claim(
        serial=row.serial,
        slot=row.slot,
        start_column=row.next_column,
        token_ids=step_tokens(item),
        num_logits=num_logits(item),
        prefix_uid=prefix.uid if prefix is not None else NO_PREFIX,
        prefix_matches=matches,
    )


def step_tokens(item: ScheduledRow) -> list[int]:
    first = item.row.num_computed
    return item.row.token_ids[first : first + item.num_tokens]


def num_logits(item: ScheduledRow) -> int:
    if item.row.wants_prompt_logprobs and item.row.num_computed < item.row.num_prompt_tokens:
        return item.num_tokens
    return 1 if item.yields_token else 0
