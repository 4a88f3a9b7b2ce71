"""Kept texts against a plain dictionary of texts, over a real ledger, with rows that come and go in any order."""

from dataclasses import dataclass

import hypothesis.strategies as st
import numpy as np
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from server.engine.pages import NO_CONTENT, SHARED, PageLedger
from server.engine.text_cache import TextCache
from tests.unit.engine.texts import chain, make_tokens, page_ends

PROMPTS: dict[str | None, int] = {None: 0, "short": 5, "even": 32}
"""Prefix keys, and how many virtual tokens each prompt has."""

Text = tuple[str, str | None, tuple[int, ...]]
"""Tenant, prefix key and all tokens from the first to the end of a page."""


@dataclass(eq=False)
class FakeRow:
    """A row that has computed all its tokens: what it holds for each of its full pages."""

    serial: int
    tenant: str
    prefix_key: str | None
    tokens: list[int]
    pages: list[int]
    contents: list[int]

    @property
    def k(self) -> int:
        return PROMPTS[self.prefix_key]

    def text_of(self, index: int) -> Text:
        return (self.tenant, self.prefix_key, tuple(self.tokens[: page_ends(self.k, len(self.tokens))[index]]))


def is_above(one: Text, other: Text) -> bool:
    return one[:2] == other[:2] and len(one[2]) < len(other[2]) and other[2][: len(one[2])] == one[2]


class CacheSchedule(RuleBasedStateMachine):
    """Rows begin, leave their texts, and end; `kept` (text → page) and `used_at` are the truth."""

    @initialize(num_pages=st.integers(4, 20))
    def start(self, num_pages: int) -> None:
        self.ledger = PageLedger(num_pages)
        self.cache = TextCache(self.ledger)
        self.kept: dict[Text, int] = {}
        self.used_at: dict[Text, int] = {}
        self.rows: list[FakeRow] = []
        self.clock = 0
        self.next_serial = 1

    # --- the model ---

    def is_held(self, text: Text) -> bool:
        return any(self.kept[text] in row.pages for row in self.rows)

    def drop_one(self, before: int) -> bool | None:
        """Whether the page that goes next becomes free; None when none can go."""
        leaves = [t for t in self.kept if not any(is_above(t, other) for other in self.kept)]
        leaves = [leaf for leaf in leaves if self.used_at[leaf] < before]
        candidates = [leaf for leaf in leaves if not self.is_held(leaf)]
        becomes_free = bool(candidates)
        if not candidates:
            candidates = [
                leaf
                for leaf in leaves
                if any(is_above(t, leaf) and self.used_at[t] < before and not self.is_held(t) for t in self.kept)
            ]
        if not candidates:
            return None
        oldest = min(candidates, key=lambda leaf: self.used_at[leaf])
        del self.kept[oldest], self.used_at[oldest]
        return becomes_free

    def drop(self, count: int, before: int) -> int:
        num_freed = 0
        while num_freed < count:
            becomes_free = self.drop_one(before)
            if becomes_free is None:
                break
            num_freed += becomes_free
        return num_freed

    # --- what happens ---

    @rule(
        tenant=st.sampled_from("aaab"),
        prefix_key=st.sampled_from([None, "short", "short", "short", "even"]),
        # Mostly equal beginnings of some length: they are what the cache is for.
        letters=st.tuples(st.integers(0, 4), st.lists(st.integers(0, 1), max_size=2)).map(lambda t: [0] * t[0] + t[1]),
        num_more=st.integers(0, 3),
        spare=st.integers(0, 20),
        only_new=st.booleans(),
    )
    def row_begins(
        self,
        tenant: str,
        prefix_key: str | None,
        letters: list[int],
        num_more: int,
        spare: int,
        only_new: bool,
    ) -> None:
        self.begin(tenant, prefix_key, letters, num_more=num_more, spare=spare, only_new=only_new)

    @rule(letters=st.lists(st.integers(0, 1), min_size=1, max_size=2), num_shorter=st.integers(0, 1))
    def rows_compute_alike(self, letters: list[int], num_shorter: int) -> None:
        """Two rows compute one text at once; the first to leave it ends, the other goes on behind the first's pages."""
        one = self.begin("a", "short", letters[num_shorter:], only_new=True)
        other = self.begin("a", "short", [*letters, 0, 1], only_new=True)
        for row in (one, other):
            if row is not None:
                self.leave(row, len(row.pages))
        if one is not None:
            self.end(one)

    def begin(
        self,
        tenant: str,
        prefix_key: str | None,
        letters: list[int],
        *,
        num_more: int = 0,
        spare: int = 0,
        only_new: bool = False,
    ) -> FakeRow | None:
        """A row takes what is kept of its text (unless it is one that may not) and computes the rest, if it fits."""
        k = PROMPTS[prefix_key]
        tokens = make_tokens(k, letters, num_more)
        row = FakeRow(self.next_serial, tenant, prefix_key, tokens, [], [])
        self.next_serial += 1
        ends = page_ends(k, len(tokens))
        if not only_new:
            limit = max(0, len(tokens) - spare)
            match = self.cache.match(tenant, prefix_key, k, tokens, limit=limit)
            self.clock += 1
            expected: list[Text] = []
            while len(expected) < len(ends) and ends[len(expected)] <= limit:
                text = row.text_of(len(expected))
                if text not in self.kept:
                    break
                self.used_at[text] = self.clock
                expected.append(text)
            assert match.pages.tolist() == [self.kept[text] for text in expected]
            assert match.contents.tolist() == chain(tenant, prefix_key, k, tokens)[: len(expected)]
            assert match.num_tokens == (ends[len(expected) - 1] if expected else 0)
            row.pages, row.contents = match.pages.tolist(), match.contents.tolist()
        self.rows.append(row)
        needed = len(ends) - len(row.pages)
        self.evict(max(0, needed - self.ledger.num_free))
        own = self.ledger.allocate(row.serial, needed)
        if own is None:
            assert all(self.is_held(text) for text in self.kept)
            self.end(row)
            return None
        row.pages += own.tolist()
        row.contents += [NO_CONTENT] * needed
        return row

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def row_leaves_its_text(self, data: st.DataObject) -> None:
        row = data.draw(st.sampled_from(self.rows))
        count = len(row.pages) - data.draw(st.sampled_from([0, 0, 0, 1, 2]))
        self.leave(row, max(0, count))

    def leave(self, row: FakeRow, count: int) -> None:
        shared = self.cache.insert(
            row.tenant, row.prefix_key, row.k, row.tokens, np.array(row.pages[:count], dtype=np.int32), row.serial
        )
        self.clock += 1
        contents = chain(row.tenant, row.prefix_key, row.k, row.tokens)
        for index in range(count):
            text = row.text_of(index)
            if text not in self.kept:
                self.kept[text] = row.pages[index]
                row.contents[index] = contents[index]
            self.used_at[text] = self.clock
        assert shared.tolist() == row.contents[:count]

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def row_ends(self, data: st.DataObject) -> None:
        self.end(data.draw(st.sampled_from(self.rows)))

    def end(self, row: FakeRow) -> None:
        self.rows.remove(row)
        self.ledger.release(row.pages, row.serial)

    @rule(count=st.sampled_from([0, 1, 2, 20]))
    def evict(self, count: int) -> None:
        num_free, num_evictable = self.ledger.num_free, self.cache.num_evictable
        num_freed = self.cache.evict(count)
        assert num_freed == self.drop(count, self.clock + 1)
        assert num_freed == min(count, num_evictable)
        assert self.ledger.num_free == num_free + num_freed

    @rule(is_known=st.booleans())
    def forget_a_prompt(self, is_known: bool) -> None:
        self.cache.evict_prefix("short" if is_known else "unknown")
        for text in [text for text in self.kept if is_known and text[1] == "short"]:
            del self.kept[text], self.used_at[text]

    @invariant()
    def cache_and_ledger_show_exactly_what_is_kept_and_held(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.check_invariants()
        self.ledger.check_invariants()
        assert self.cache.num_pages == len(self.kept)
        assert self.cache.num_evictable == sum(not self.is_held(text) for text in self.kept)
        holders = np.zeros(self.ledger.num_pages, dtype=np.int32)
        for pages in (list(self.kept.values()), *(row.pages for row in self.rows)):
            holders[pages] += 1
        assert holders.tolist() == self.ledger.num_holders.tolist()
        for text, page in self.kept.items():
            assert int(self.ledger.content[page]) == chain(text[0], text[1], PROMPTS[text[1]], list(text[2]))[-1]
        for row in self.rows:
            owners = self.ledger.owner[row.pages].tolist()
            assert owners == [SHARED if content else row.serial for content in row.contents]
            assert self.ledger.content[row.pages].tolist() == row.contents

    def teardown(self) -> None:
        if not hasattr(self, "cache"):
            return
        for row in list(self.rows):
            self.end(row)
        self.cache.evict(self.ledger.num_pages)
        assert self.ledger.num_free == self.ledger.num_pages


TestCacheSchedule = CacheSchedule.TestCase
TestCacheSchedule.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
