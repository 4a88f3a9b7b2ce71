"""The run-time isolation check: every index of every plan against the ledger of owners, on every step.

The plan says which memory each token reads and writes. The ledger says who owns that memory, and what shared pages
hold. The rows say who they are, which prompt they hold and what they expect in each shared page. Nothing here trusts
how the plan was built: the indices are read back from the plan's own arrays, of which the forward pass makes its
tensors, and compared with what rows and ledger say. A row that fails is ended with an error before the pass, and a new
plan is made of the others and checked; no token is ever sampled from a plan that failed.

A shared page is checked by what it holds: its content id is a chain over the tenant, the prompt and every token before
(`server.engine.pages`), which the row works out from its own request. So a page of another tenant, another prompt or
another text cannot pass for the right one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from server.engine.pages import NO_CONTENT, NO_PREFIX, PAGE_SIZE, SHARED, PageLedger, PageNumbers
from server.engine.plan import NO_PAGE, NO_SOURCE, IntArray, StepPlan

_NO_PAGES: PageNumbers = np.zeros(0, dtype=np.int32)
_NO_INTS: IntArray = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Claim:
    """What the holder of an entry says about itself, taken from the row and not from the plan.

    It means to compute `token_ids` from `start_column` on, and awaits the logits of the last `num_logits` of them.
    `serial` is the row's (or the compile job's) name in the ledger; `pages`, `generations` and `contents` are its
    pages and what it expects of them (`RowPages`). `prefix_uid` is the prefix it holds, and `tail_page` the index of
    the page that begins with that prefix's last columns (None: the prefix ends with a page, or there is none).
    `prefix_matches`: that prefix is the one that its request resolved to, and counts users (its prompt may have been
    deleted). `vectors` is what it wants in place of its tokens' embeddings: only a prompt being compiled has any.
    `awaits_token`: the last of its tokens has been sampled for it and the host does not know it yet.
    """

    serial: int
    start_column: int
    token_ids: Sequence[int]
    num_logits: int
    pages: PageNumbers = field(default_factory=lambda: _NO_PAGES)
    generations: IntArray = field(default_factory=lambda: _NO_INTS)
    contents: IntArray = field(default_factory=lambda: _NO_INTS)
    prefix_uid: int = NO_PREFIX
    tail_page: int | None = None
    prefix_matches: bool = True
    vectors: object | None = None
    awaits_token: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Violation:
    """Entry `entry` of the plan (packed order) touches what its row does not own."""

    entry: int
    reason: str


def check_plan(
    plan: StepPlan, claims: Sequence[Claim], ledger: PageLedger, sampled_for: IntArray = _NO_INTS
) -> list[Violation]:
    """Compare the plan with the claims (one an entry, in the plan's order) and the ledger.

    `sampled_for` are the serials of the rows for which the tokens of the last sample were chosen, in the order in which
    they lie on the device: an entry may take no token but its own row's.

    Returns one violation an offending entry, empty when all is well. Vectorised over tokens and pages; takes well
    under a millisecond for a full step.
    """
    if len(claims) != len(plan.entries):
        return [Violation(entry, "plan and rows differ in number") for entry in range(len(claims))]
    checker = _Checker(plan, claims, ledger)
    checker.check_claims()
    checker.check_packing()
    checker.check_sources(sampled_for)
    if checker.check_page_table():
        checker.check_writes()
    checker.check_logits()
    return checker.violations()


class _Checker:
    """Collects, an entry, the first thing found wrong."""

    def __init__(self, plan: StepPlan, claims: Sequence[Claim], ledger: PageLedger) -> None:
        self._plan = plan
        self._claims = claims
        self._ledger = ledger
        self._reasons: dict[int, str] = {}
        self._counts = np.array([claim.num_tokens for claim in claims], dtype=np.int64)
        self._starts = np.array([claim.start_column for claim in claims], dtype=np.int64)
        self._num_tokens = int(self._counts.sum())
        self._entry_of = np.repeat(np.arange(len(claims), dtype=np.int64), self._counts)  # [T]
        self._firsts = np.cumsum(self._counts) - self._counts
        self._columns = np.arange(self._num_tokens) - self._firsts[self._entry_of] + self._starts[self._entry_of]  # [T]
        self._lengths = self._starts + self._counts
        # The rows' pages one after another, those behind the step's last column left out.
        self._page_counts = -(-self._lengths // PAGE_SIZE)
        self._page_firsts = np.cumsum(self._page_counts) - self._page_counts
        self._page_entries = np.repeat(np.arange(len(claims), dtype=np.int64), self._page_counts)
        self._pages = self._of_claims("pages")
        self._contents = self._of_claims("contents")

    def violations(self) -> list[Violation]:
        return [Violation(entry, reason) for entry, reason in sorted(self._reasons.items())]

    def check_claims(self) -> None:
        """Each row's pages are its own in the ledger, or shared and hold what the row expects, in this generation."""
        ledger, pages, entries = self._ledger, self._pages, self._page_entries
        outside = (pages < 0) | (pages >= ledger.num_pages)
        if outside.any():
            self._blame(entries[outside], "it claims a page that is not there")
            pages = np.where(outside, 0, pages)
        serials = np.array([claim.serial for claim in self._claims], dtype=np.int64)[entries]
        is_shared = self._contents != NO_CONTENT
        owner, content = ledger.owner[pages], ledger.content[pages]
        self._blame(entries[~is_shared & (owner != serials)], "its page belongs to another row")
        self._blame(entries[is_shared & (owner != SHARED)], "its shared page is shared no more")
        self._blame(entries[is_shared & (content != self._contents)], "its shared page holds another text or prompt")
        stale = ledger.generation[pages] != self._of_claims("generations")
        self._blame(entries[stale], "its page was given away and taken back")
        # Whatever begins with a copied tail must begin with that of the row's own prefix, and nothing else may. A
        # shared page answers for its prefix by its content.
        tails = np.array([NO_PAGE if claim.tail_page is None else claim.tail_page for claim in self._claims])[entries]
        uids = np.array([claim.prefix_uid for claim in self._claims], dtype=np.int64)[entries]
        index = np.arange(len(pages)) - self._page_firsts[entries]
        foreign = ledger.tail_uid[pages] != np.where(index == tails, uids, NO_PREFIX)
        self._blame(entries[~is_shared & foreign], "its page begins with another prefix")
        for entry, claim in enumerate(self._claims):
            if not claim.prefix_matches:
                self._blame_entry(entry, "its prefix is not the one that its request named")

    def check_packing(self) -> None:
        """Entries, tokens, positions, segment bounds and lengths are those of the rows.

        The dense path reads the entries themselves, and both take vectors from them, so they are held to the same
        account as the arrays.
        """
        plan = self._plan
        for index, (entry, claim) in enumerate(zip(plan.entries, self._claims, strict=True)):
            if (
                not np.array_equal(entry.pages, claim.pages)
                or entry.start_column != claim.start_column
                or list(entry.token_ids) != list(claim.token_ids)
                or (entry.source is not None) != claim.awaits_token
                or entry.vectors is not claim.vectors
            ):
                self._blame_entry(index, "its entry is another's")
        sizes = {len(plan.token_ids), len(plan.positions), len(plan.write_slots)}
        row_sizes = {len(plan.query_starts) - 1, len(plan.lengths)}
        if sizes != {self._num_tokens} or row_sizes != {len(self._claims)}:
            self._blame_all("the packed batch has another length")
            return
        self._blame(self._entry_of[plan.positions != self._columns], "its tokens are at wrong positions")
        token_ids = np.concatenate([np.asarray(claim.token_ids, dtype=np.int64) for claim in self._claims])
        self._blame(self._entry_of[plan.token_ids != token_ids], "its tokens are another's")
        wrong = (plan.query_starts[:-1] != self._firsts) | (plan.query_starts[1:] != self._firsts + self._counts)
        self._blame(np.flatnonzero(wrong), "its segment begins elsewhere")
        self._blame(np.flatnonzero(plan.lengths != self._lengths), "it would see more or less than its own columns")
        num_decoding = int(np.count_nonzero(self._counts == 1))
        if plan.num_decoding != num_decoding or np.any(self._counts[:num_decoding] != 1):
            self._blame_all("decoding rows and chunks are mixed up")

    def check_sources(self, sampled_for: IntArray) -> None:
        """A token comes from the last sample exactly where its row awaits one, and is the one chosen for that row."""
        sources = self._plan.token_sources
        if len(sources) != self._num_tokens:
            self._blame_all("the packed batch has another length")
            return
        awaited = np.zeros(self._num_tokens, dtype=bool)
        awaited[self._firsts + self._counts - 1] = [claim.awaits_token for claim in self._claims]
        is_taken = sources != NO_SOURCE
        self._blame(self._entry_of[is_taken != awaited], "the token that it awaits is not the one it would take")
        outside = is_taken & ((sources < 0) | (sources >= len(sampled_for)))
        self._blame(self._entry_of[outside], "it would take a token that was not sampled")
        taken = np.flatnonzero(is_taken & ~outside)
        serials = np.array([claim.serial for claim in self._claims], dtype=np.int64)[self._entry_of[taken]]
        foreign = sampled_for[sources[taken]] != serials
        self._blame(self._entry_of[taken[foreign]], "it would take another row's token")

    def check_page_table(self) -> bool:
        """Each row reads exactly its own pages, in their order. False: the table cannot even be looked at."""
        table = self._plan.page_table
        if table.shape[0] != len(self._claims) or table.shape[1] < int(self._page_counts.max()):
            self._blame_all("the page table has another shape")
            return False
        column = np.arange(len(self._pages)) - self._page_firsts[self._page_entries]
        expected = np.full(table.shape, NO_PAGE, dtype=np.int64)
        expected[self._page_entries, column] = self._pages
        self._blame(np.flatnonzero((table != expected).any(axis=1)), "it would read another row's page")
        return True

    def check_writes(self) -> None:
        """Each token's keys and values go to its own row's page and column, and never into a shared page."""
        if len(self._plan.write_slots) != self._num_tokens:
            return  # all are blamed already
        page_of_token = self._page_firsts[self._entry_of] + self._columns // PAGE_SIZE
        expected = self._pages[page_of_token] * PAGE_SIZE + self._columns % PAGE_SIZE
        self._blame(self._entry_of[self._plan.write_slots != expected], "it would write into another row's page")
        is_shared = self._contents[page_of_token] != NO_CONTENT
        self._blame(self._entry_of[is_shared], "it would write into a shared page")

    def check_logits(self) -> None:
        """The logits asked for are of each entry's own last tokens, in packed order."""
        plan = self._plan
        if len(plan.logits_tokens) != len(plan.logits_entries) or not self._in_range(
            plan.logits_tokens, self._num_tokens
        ):
            self._blame_all("the logits are of tokens outside the batch")
            return
        owners = self._entry_of[plan.logits_tokens]
        self._blame(owners[owners != plan.logits_entries], "its logits would go to another row")
        expected = []
        for first, claim in zip(self._firsts.tolist(), self._claims, strict=True):
            last = first + claim.num_tokens
            expected.append(np.arange(last - claim.num_logits, last))
        wanted = np.concatenate(expected)
        if len(wanted) != len(plan.logits_tokens):
            missing = np.setxor1d(wanted, plan.logits_tokens)
            self._blame(self._entry_of[missing], "its logits are not of its last tokens")
            if not len(missing):
                self._blame_all("a token's logits are asked for twice")
        else:
            wrong = np.flatnonzero(wanted != plan.logits_tokens)
            self._blame(self._entry_of[wanted[wrong]], "its logits are not of its last tokens")

    def _of_claims(self, name: str) -> IntArray:
        """One of the claims' page arrays, up to each row's last page of this step, one after another. int64.

        A claim with too few pages is filled with NO_PAGE, which is in no ledger.
        """
        joined = np.full(int(self._page_counts.sum()), NO_PAGE, dtype=np.int64)
        for claim, first, count in zip(
            self._claims, self._page_firsts.tolist(), self._page_counts.tolist(), strict=True
        ):
            part = getattr(claim, name)[:count]
            joined[first : first + len(part)] = part
        return joined

    @staticmethod
    def _in_range(index: IntArray, limit: int) -> bool:
        return index.size == 0 or bool(index.min() >= 0 and index.max() < limit)

    def _blame_entry(self, entry: int, reason: str) -> None:
        self._reasons.setdefault(entry, reason)

    def _blame(self, entries: npt.NDArray[np.int64], reason: str) -> None:
        for entry in np.unique(entries).tolist():
            self._reasons.setdefault(entry, reason)

    def _blame_all(self, reason: str) -> None:
        for entry in range(len(self._claims)):
            self._reasons.setdefault(entry, reason)
