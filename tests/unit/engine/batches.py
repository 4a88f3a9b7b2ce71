"""Random batches for the plan and its check: pages of prefixes and texts, copied tails, own pages, ragged chunks.

What a page holds is known here by itself, without the code under test: see `World`.
"""

from dataclasses import dataclass, field

import hypothesis.strategies as st
import numpy as np

from server.engine.isolation import Claim, Violation, check_plan
from server.engine.pages import (
    NO_PREFIX,
    PAGE_SIZE,
    SHARED,
    PageLedger,
    content_of_prefix,
    content_of_text,
    text_root,
)
from server.engine.plan import PlanEntry, StepPlan, build_plan
from server.engine.row_pages import RowPages

NUM_PAGES = 120
LONGEST_ROW = 12 * PAGE_SIZE
PREFIX_TOKENS = {"p": 5, "q": 2 * PAGE_SIZE, "r": PAGE_SIZE + 7}
"""Prompts by key, and how many virtual tokens each has: only a tail, only full pages, both."""


STRANGER = 900
"""The serial of a row that has been sampled for and takes no part."""


@dataclass(slots=True)
class World:
    """A ledger with prefixes and kept texts in it. Shared pages are found by their content id."""

    ledger: PageLedger = field(default_factory=lambda: PageLedger(NUM_PAGES))
    shared: dict[int, int] = field(default_factory=dict)
    next_serial: int = 1000

    def shared_page(self, content: int) -> int:
        """The one page with this content, with one more holder."""
        if content in self.shared:
            self.ledger.hold([self.shared[content]])
        else:
            self.next_serial += 1
            page = int(allocated(self.ledger, self.next_serial, 1)[0])
            self.ledger.share(page, self.next_serial, content)
            self.shared[content] = page
        return self.shared[content]

    def add_row(self, serial: int, *, prompt: str | None, tenant: str, texts: list[int], num_own: int) -> RowPages:
        """A row's pages: those of its prompt, one shared page for each of `texts`, then its own."""
        k = PREFIX_TOKENS[prompt] if prompt is not None else 0
        pages = RowPages(LONGEST_ROW)
        if prompt is not None:
            contents = [content_of_prefix(prompt, i) for i in range(k // PAGE_SIZE)]
            pages.append_prefix(self._pages_of(contents), self.ledger, np.array(contents, dtype=np.int64))
        parent, contents = text_root(tenant, prompt), []
        for text in texts:
            parent = content_of_text(parent, [text] * PAGE_SIZE)
            contents.append(parent)
        pages.append(self._pages_of(contents), self.ledger, np.array(contents, dtype=np.int64))
        own = allocated(self.ledger, serial, num_own)
        if k % PAGE_SIZE and not texts and num_own:
            self.ledger.stamp_tail(int(own[0]), serial, uid_of(prompt))
        pages.append(own, self.ledger)
        return pages

    def _pages_of(self, contents: list[int]) -> np.ndarray:
        return np.array([self.shared_page(content) for content in contents], dtype=np.int32)


@dataclass(slots=True)
class Batch:
    """Entries and claims as the rows made them, and the plan with its claims in packed order.

    `sampled_for` are the rows of the last sample: more of them than take part, and in another order.
    """

    ledger: PageLedger
    entries: list[PlanEntry]
    claims: list[Claim]
    plan: StepPlan
    packed: list[Claim]
    sampled_for: np.ndarray

    def check(self) -> list[Violation]:
        return check_plan(self.plan, self.packed, self.ledger, self.sampled_for)

    def blamed(self) -> set[int]:
        return {violation.entry for violation in self.check()}

    def holders_of(self, page: int) -> set[int]:
        """The packed entries that read the page in this step."""
        return {i for i, claim in enumerate(self.packed) if page in used_pages(claim)}


def make_batch(ledger: PageLedger, rows: list[Claim]) -> Batch:
    sampled_for = [STRANGER, *(row.serial for row in reversed(rows)), STRANGER]
    entries = [
        PlanEntry(
            row.pages,
            row.start_column,
            row.token_ids,
            logits_from=row.num_tokens - row.num_logits,
            source=sampled_for.index(row.serial) if row.awaits_token else None,
        )
        for row in rows
    ]
    plan, order = build_plan(entries)
    return Batch(ledger, entries, rows, plan, [rows[i] for i in order], np.array(sampled_for, dtype=np.int64))


def make_claim(
    serial: int,
    pages: RowPages,
    *,
    start_column: int,
    token_ids: list[int],
    num_logits: int = 1,
    prompt: str | None = None,
    awaits_token: bool = False,
) -> Claim:
    k = PREFIX_TOKENS[prompt] if prompt is not None else 0
    return Claim(
        serial=serial,
        start_column=start_column,
        token_ids=token_ids,
        num_logits=num_logits,
        pages=pages.numbers,
        generations=pages.generations,
        contents=pages.contents,
        prefix_uid=uid_of(prompt),
        tail_page=k // PAGE_SIZE if k % PAGE_SIZE else None,
        awaits_token=awaits_token,
    )


def uid_of(prompt: str | None) -> int:
    return NO_PREFIX if prompt is None else 1 + sorted(PREFIX_TOKENS).index(prompt)


def used_pages(claim: Claim) -> list[int]:
    """The pages that the claim's row reads in this step, in their order."""
    length = claim.start_column + claim.num_tokens
    return [int(page) for page in claim.pages[: -(-length // PAGE_SIZE)]]


def allocated(ledger: PageLedger, owner: int, count: int) -> np.ndarray:
    pages = ledger.allocate(owner, count)
    assert pages is not None
    return pages


def free_for_good(ledger: PageLedger, page: int) -> None:
    """Take a page from all its holders, as if they had all given it back."""
    ledger.release([page] * int(ledger.num_holders[page]), int(ledger.owner[page]))
    assert ledger.owner[page] != SHARED


@st.composite
def batches(draw: st.DrawFn, min_rows: int = 1, max_rows: int = 8) -> Batch:
    """Rows in a ledger in which others live and from which others have left; most of them decode."""
    world = World()
    for serial, count in enumerate(draw(st.lists(st.integers(1, 3), max_size=6)), 500):
        bystander = allocated(world.ledger, serial, count)
        if draw(st.booleans()):
            world.ledger.release(bystander, serial)
    num_rows = draw(st.integers(min_rows, max_rows))
    return make_batch(world.ledger, [draw(_claims(world, serial)) for serial in range(1, num_rows + 1)])


@st.composite
def _claims(draw: st.DrawFn, world: World, serial: int) -> Claim:
    prompt = draw(st.sampled_from([None, None, *PREFIX_TOKENS]))
    texts = draw(st.sampled_from([[], [], [1], [2], [1, 3]]))
    k = PREFIX_TOKENS[prompt] if prompt is not None else 0
    first = max(k, (k // PAGE_SIZE + len(texts)) * PAGE_SIZE)
    past = first + draw(st.sampled_from([0, 0, 1, 9, 15, 16, 30]))
    num_tokens = draw(st.sampled_from([1, 1, 1, 2, 5, 17, 33]))
    num_own = -(-(past + num_tokens) // PAGE_SIZE) - k // PAGE_SIZE - len(texts) + draw(st.integers(0, 2))
    pages = world.add_row(serial, prompt=prompt, tenant=draw(st.sampled_from(["a", "b"])), texts=texts, num_own=num_own)
    return make_claim(
        serial,
        pages,
        start_column=past,
        token_ids=draw(st.lists(st.integers(0, 50), min_size=num_tokens, max_size=num_tokens)),
        num_logits=draw(st.integers(0, num_tokens)),
        prompt=prompt,
        awaits_token=draw(st.booleans()),
    )
