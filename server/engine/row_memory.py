"""Gives rows their pages: at admission, as they grow, and back again.

Admission takes pages for everything that the row is known to compute and asks for one more page of head-room, so that
a row that has just been admitted does not at once push another out; or, on request, pages for all that it may ever
need. What a row leaves behind is kept for later rows of the same tenant, prompt and beginning (`text_cache`), and is
the first thing to go when pages are short; only then does the scheduler preempt rows.
"""

from collections.abc import Iterable

import numpy as np

from server.engine.kv import KvPool, num_pages_for
from server.engine.pages import FREE, NO_CONTENT, PAGE_SIZE, SHARED, PageNumbers, content_of_prefix
from server.engine.prefix import Prefix
from server.engine.row import Row
from server.engine.row_pages import RowPages
from server.engine.text_cache import TextCache


class RowMemory:
    """The pages of rows and of kept texts. Only the engine thread calls it."""

    def __init__(self, pool: KvPool, *, keeps_texts: bool, reserves_all: bool = False) -> None:
        """`reserves_all`: a row gets pages for its longest possible length at once, so that none is ever preempted."""
        self.texts = TextCache(pool.ledger, release=pool.release)
        self._pool = pool
        self._keeps_texts = keeps_texts
        self._reserves_all = reserves_all
        self._refused: tuple[int, int, int] | None = None
        """The row last refused, by its serial; how many pages of text had been kept by then; how many it needed."""

    @property
    def usage_ratio(self) -> float:
        """The share of the rows' pages that running rows hold. Also read by other threads, for a gauge."""
        held = self._pool.num_row_pages - int(self.texts.num_evictable)
        return max(0, held) / self._pool.row_pages

    def admit(self, row: Row, prefix: Prefix | None) -> bool:
        """Give a row that is to start, or to start again, its pages; False when there is no room for it.

        Of its tokens, those whose pages are found among the kept texts count as computed.
        """
        k = row.num_virtual_tokens
        key = row.request.prompt.prefix_key if row.request.prompt is not None else None
        pages = RowPages(row.max_total_tokens + PAGE_SIZE)
        if prefix is not None:
            # The contents that the row expects follow from its request alone.
            contents = np.array([content_of_prefix(key or "", i) for i in range(k // PAGE_SIZE)], dtype=np.int64)
            pages.append_prefix(prefix.pages, self._pool.ledger, contents)
        num_columns = row.max_total_tokens if self._reserves_all else k + len(row.token_ids)
        # Asked before the row itself holds kept pages.
        head_room = 0 if self._reserves_all or self._is_alone else 1
        if self._is_refused_again(row, head_room):
            return False
        num_cached = 0
        if self._keeps_texts and not row.wants_prompt_logprobs:
            match = self.texts.match(row.request.tenant, key, k, row.token_ids, limit=len(row.token_ids) - 1)
            pages.append(match.pages, self._pool.ledger, match.contents)
            num_cached = match.num_tokens
        needed = num_pages_for(num_columns) - pages.num_pages
        own = self._allocate(row, needed, head_room=head_room)
        if own is None:
            self._pool.release(pages.held, SHARED)
            self._refused = (row.serial, self.texts.num_entered, needed)
            return False
        self._refused = None
        first_own = pages.num_pages
        pages.append(own, self._pool.ledger)
        if prefix is not None and prefix.tail is not None and first_own == k // PAGE_SIZE:
            self._pool.write_tail(int(pages.numbers[first_own]), prefix.tail, row.serial, prefix.uid)
        row.pages = pages
        row.num_computed = num_cached
        if not row.num_preemptions:
            row.num_cached = num_cached
        return True

    def extend(self, row: Row, num_tokens: int) -> bool:
        """Make sure that the row has pages for its next `num_tokens` columns; False when memory is short."""
        pages = self._pages_of(row)
        missing = num_pages_for(row.next_column + num_tokens) - pages.num_pages
        if missing <= 0:
            return True
        own = self._allocate(row, missing, head_room=0)
        if own is None:
            return False
        pages.append(own, self._pool.ledger)
        return True

    def keep_text(self, row: Row) -> None:
        """Offer the row's full pages of computed tokens to later rows of its tenant and prompt.

        What a step computes that is not collected yet is left out: its logits may turn out not to be finite, and it
        writes to the pages behind. Nothing is kept of a row whose prompt has been deleted. Raises RuntimeError, and
        keeps nothing, when a page is not the row's or holds another text.
        """
        pages = self._pages_of(row)
        first = row.num_virtual_tokens // PAGE_SIZE
        num_full = row.num_settled_columns // PAGE_SIZE
        is_deleted = row.prefix is not None and not row.prefix.is_alive
        if not self._keeps_texts or is_deleted or num_full <= first:
            return
        shared = self.texts.insert(
            row.request.tenant,
            row.request.prompt.prefix_key if row.request.prompt is not None else None,
            row.num_virtual_tokens,
            row.token_ids,
            pages.numbers[first:num_full],
            row.serial,
        )
        pages.mark_shared(first, shared)

    def release(self, row: Row) -> None:
        """Take the row's pages back: what the ledger says is its own, whatever the row itself says.

        A step that was launched with the row may still be reading and writing them. Whoever is given them next has its
        work queued on the device behind that step, so that it sees and leaves what it would if the step were done.
        """
        pages, row.pages = self._pages_of(row), None
        ledger = self._pool.ledger
        held = pages.held
        contents = pages.contents[pages.num_prefix_pages :]
        is_current = ledger.generation[held] == pages.generations[pages.num_prefix_pages :]
        shared = held[(contents != NO_CONTENT) & (ledger.owner[held] == SHARED) & is_current]
        own = held[contents == NO_CONTENT]
        if not (ledger.owner[own] == row.serial).all():
            own = np.flatnonzero(ledger.owner == row.serial).astype(np.int32)
        self._pool.release(np.concatenate([shared, own]), row.serial)

    def forget_prompt(self, prefix_key: str) -> None:
        """Drop the texts that were computed behind a deleted prompt."""
        self.texts.evict_prefix(prefix_key)

    def check_invariants(self, rows: Iterable[Row]) -> None:
        """Raises RuntimeError when pool, kept texts and these rows (all there are) contradict each other."""
        self._pool.check_invariants()
        self.texts.check_invariants()
        own = sum(int((row.pages.contents == NO_CONTENT).sum()) for row in rows if row.pages is not None)
        owned = int((self._pool.ledger.owner > FREE).sum())
        if own != owned:
            raise RuntimeError(f"{owned} pages have an owner, rows own {own}")

    @property
    def _is_alone(self) -> bool:
        """Whether no running row holds a page: then the longest row must fit."""
        return self._pool.num_row_pages == self.texts.num_evictable

    def _is_refused_again(self, row: Row, head_room: int) -> bool:
        """Whether the row was the last to be refused and lacks room as before: matching its text again is not worth it.

        While no text has entered since, it can begin with no more of them and needs as many pages of its own, or more.
        """
        if self._refused is None or self._refused[:2] != (row.serial, self.texts.num_entered):
            return False
        return self._refused[2] + head_room > self._pool.num_free_row_pages + self.texts.num_evictable

    def _allocate(self, row: Row, count: int, *, head_room: int) -> PageNumbers | None:
        short = count + head_room - self._pool.num_free_row_pages
        if short > 0:
            if short > self.texts.num_evictable:
                return None
            self.texts.evict(short)
        return self._pool.allocate(row.serial, count)

    @staticmethod
    def _pages_of(row: Row) -> RowPages:
        if row.pages is None:
            raise RuntimeError(f"row {row.row_id} has no pages")
        return row.pages
