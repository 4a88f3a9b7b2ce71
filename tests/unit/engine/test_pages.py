"""The ledger of pages against a plain dictionary of who holds what, and content ids against what they stand for."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from server.engine.pages import (
    FREE,
    NO_CONTENT,
    NO_PREFIX,
    SHARED,
    PageLedger,
    content_of_prefix,
    content_of_text,
    text_root,
)

STRANGER = 10**6


@dataclass
class Held:
    """What the model knows of a page that is in use."""

    owner: int
    generation: int
    content: int = NO_CONTENT
    tail_uid: int = NO_PREFIX
    num_holders: int = 1


class LedgerSchedule(RuleBasedStateMachine):
    """Pages are taken, shared, held and given back in any order; `held` is the truth."""

    @initialize(num_pages=st.integers(1, 12))
    def start(self, num_pages: int) -> None:
        self.ledger = PageLedger(num_pages)
        self.held: dict[int, Held] = {}
        self.last_generation = 0

    def pages_of(self, owner: int) -> list[int]:
        return [page for page, held in self.held.items() if held.owner == owner]

    def refuses(self, change: Callable[[], object]) -> None:
        """The change is refused, and nothing has changed (the invariant compares everything)."""
        with pytest.raises(RuntimeError):
            change()

    @rule(owner=st.integers(1, 4), count=st.integers(0, 5))
    def allocate(self, owner: int, count: int) -> None:
        pages = self.ledger.allocate(owner, count)
        if count > self.ledger.num_pages - len(self.held):
            assert pages is None
            return
        assert pages is not None
        assert len(set(pages.tolist())) == count
        for page in pages.tolist():
            assert page not in self.held
            generation = int(self.ledger.generation[page])
            assert generation > self.last_generation
            self.held[page] = Held(owner, generation)
        self.last_generation = int(self.ledger.generation.max())

    @precondition(lambda self: self.held)
    @rule(data=st.data(), content=st.integers(1, 2**63 - 1), is_owner=st.booleans())
    def share(self, data: st.DataObject, content: int, is_owner: bool) -> None:
        page = data.draw(st.sampled_from(sorted(self.held)))
        held = self.held[page]
        owner = held.owner if is_owner else STRANGER
        if owner != held.owner or owner == SHARED:
            self.refuses(lambda: self.ledger.share(page, owner, content))
            return
        self.ledger.share(page, owner, content)
        held.owner, held.content, held.tail_uid = SHARED, content, NO_PREFIX

    @precondition(lambda self: self.held)
    @rule(data=st.data(), uid=st.integers(1, 9), is_owner=st.booleans())
    def stamp_tail(self, data: st.DataObject, uid: int, is_owner: bool) -> None:
        page = data.draw(st.sampled_from(sorted(self.held)))
        held = self.held[page]
        owner = held.owner if is_owner else STRANGER
        if owner != held.owner or owner == SHARED:
            self.refuses(lambda: self.ledger.stamp_tail(page, owner, uid))
            return
        self.ledger.stamp_tail(page, owner, uid)
        held.tail_uid = uid

    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        pages = data.draw(st.lists(st.integers(-1, self.ledger.num_pages), max_size=4))
        if any(page not in self.held or self.held[page].owner != SHARED for page in pages):
            self.refuses(lambda: self.ledger.hold(pages))
            return
        self.ledger.hold(pages)
        for page in pages:
            self.held[page].num_holders += 1

    @rule(data=st.data(), owner=st.integers(1, 4))
    def release(self, data: st.DataObject, owner: int) -> None:
        mine = sorted(page for page, held in self.held.items() if held.owner in (owner, SHARED))
        any_page = st.integers(-1, self.ledger.num_pages)
        pages = data.draw(st.lists(st.sampled_from(mine), max_size=5) if mine else st.just([]))
        pages += data.draw(st.sampled_from([0, 0, 0, 1]).flatmap(lambda n: st.lists(any_page, min_size=n, max_size=n)))
        is_stale = any(
            page not in self.held or self.held[page].owner not in (owner, SHARED) or times > self.held[page].num_holders
            for page, times in Counter(pages).items()
        )
        if is_stale:
            self.refuses(lambda: self.ledger.release(pages, owner))
            return
        freed = self.ledger.release(np.array(pages, dtype=np.int32), owner).tolist()
        for page in pages:
            self.held[page].num_holders -= 1
        assert freed == sorted(page for page in set(pages) if not self.held[page].num_holders)
        for page in freed:
            del self.held[page]

    @invariant()
    def ledger_shows_exactly_what_is_held(self) -> None:
        if not hasattr(self, "ledger"):
            return
        self.ledger.check_invariants()
        ledger = self.ledger
        shown = {
            page: Held(
                int(ledger.owner[page]),
                int(ledger.generation[page]),
                int(ledger.content[page]),
                int(ledger.tail_uid[page]),
                int(ledger.num_holders[page]),
            )
            for page in range(ledger.num_pages)
            if ledger.owner[page] != FREE
        }
        assert shown == self.held
        assert ledger.num_used == len(self.held)
        assert ledger.num_free == ledger.num_pages - len(self.held)


TestLedgerSchedule = LedgerSchedule.TestCase
TestLedgerSchedule.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_page_comes_back_in_a_new_generation_and_has_forgotten_everything() -> None:
    ledger = PageLedger(1)
    assert ledger.allocate(1, 1) == [0]
    first = int(ledger.generation[0])
    ledger.stamp_tail(0, 1, 5)
    ledger.share(0, 1, 77)
    ledger.release([0], SHARED)
    assert ledger.allocate(2, 1) == [0]
    assert int(ledger.generation[0]) > first
    assert (int(ledger.content[0]), int(ledger.tail_uid[0])) == (NO_CONTENT, NO_PREFIX)


def test_page_named_twice_loses_two_holders() -> None:
    ledger = PageLedger(1)
    ledger.allocate(1, 1)
    with pytest.raises(RuntimeError, match="stale claim"):
        ledger.release([0, 0], 1)
    ledger.share(0, 1, 77)
    ledger.hold([0, 0])
    with pytest.raises(RuntimeError, match="stale claim"):
        ledger.release([0, 0, 0, 0], 1)
    assert ledger.release([0, 0, 0], 1) == [0]


@pytest.mark.parametrize("page", [-1, 2])
def test_page_outside_the_pool_is_not_taken_for_one_inside(page: int) -> None:
    ledger = PageLedger(2)
    ledger.allocate(1, 2)
    ledger.share(1, 1, 77)
    for change in (ledger.hold, lambda pages: ledger.release(pages, 1)):
        with pytest.raises(RuntimeError, match="do not all lie in a pool of 2"):
            change([page])


def test_page_that_was_not_shared_forgets_its_beginning_too() -> None:
    ledger = PageLedger(1)
    ledger.allocate(1, 1)
    ledger.stamp_tail(0, 1, 5)
    ledger.release([0], 1)
    ledger.check_invariants()
    assert int(ledger.tail_uid[0]) == NO_PREFIX


def test_pages_that_were_given_stay_the_same_whatever_is_freed_later() -> None:
    ledger = PageLedger(4)
    first, second = ledger.allocate(1, 2), ledger.allocate(2, 2)
    assert first is not None
    assert second is not None
    ledger.release(first, 1)
    ledger.release(second, 2)
    assert (first.tolist(), second.tolist()) == ([0, 1], [2, 3])


def test_pages_used_before_are_used_again_before_untouched_ones() -> None:
    ledger = PageLedger(100)
    touched: set[int] = set()
    for owner in range(1, 40):
        pages = ledger.allocate(owner, 5)
        assert pages is not None
        touched |= set(pages.tolist())
        ledger.release(pages, owner)
    assert touched == set(range(5))


def test_pages_of_one_allocation_lie_side_by_side_while_the_pool_is_fresh() -> None:
    pages = PageLedger(10).allocate(1, 4)
    assert pages is not None
    assert pages.tolist() == [0, 1, 2, 3]
    assert pages.dtype == np.int32


def test_stale_claim_on_one_page_leaves_the_others_as_they_were() -> None:
    ledger = PageLedger(4)
    ledger.allocate(1, 2)
    ledger.allocate(2, 1)
    with pytest.raises(RuntimeError, match=r"stale claim of row 1 on pages \[2\]"):
        ledger.release([0, 1, 2], 1)
    assert ledger.num_free == 1


@pytest.mark.parametrize("owner", [FREE, SHARED])
def test_owner_that_is_no_serial_owns_nothing(owner: int) -> None:
    ledger = PageLedger(2)
    with pytest.raises(ValueError, match="owner"):
        ledger.allocate(owner, 1)
    with pytest.raises(RuntimeError):
        ledger.share(0, owner, 1)
    with pytest.raises(RuntimeError):
        ledger.release([0], owner)


def test_impossible_counts_and_contents_are_refused() -> None:
    with pytest.raises(ValueError, match="num_pages"):
        PageLedger(0)
    ledger = PageLedger(2)
    with pytest.raises(ValueError, match="count"):
        ledger.allocate(1, -1)
    ledger.allocate(1, 1)
    with pytest.raises(ValueError, match="content"):
        ledger.share(0, 1, NO_CONTENT)


def corrupt_owner(ledger: PageLedger) -> None:
    ledger.owner[3] = 9


def corrupt_impossible_owner(ledger: PageLedger) -> None:
    ledger.owner[0] = -2


def corrupt_holders_of_exclusive(ledger: PageLedger) -> None:
    ledger.num_holders[1] = 2


def corrupt_holders_of_shared(ledger: PageLedger) -> None:
    ledger.num_holders[0] = 0


def corrupt_holders_of_free(ledger: PageLedger) -> None:
    ledger.num_holders[3] = 1


def corrupt_content(ledger: PageLedger) -> None:
    ledger.content[1] = 5


def corrupt_lost_content(ledger: PageLedger) -> None:
    ledger.content[0] = NO_CONTENT


def corrupt_tail(ledger: PageLedger) -> None:
    ledger.tail_uid[3] = 4


def corrupt_future(ledger: PageLedger) -> None:
    ledger.generation[1] = 99


def corrupt_twin(ledger: PageLedger) -> None:
    ledger.generation[1] = ledger.generation[0]


def corrupt_count(ledger: PageLedger) -> None:
    ledger.num_free -= 1


@pytest.mark.parametrize(
    "damage",
    [
        corrupt_owner,
        corrupt_impossible_owner,
        corrupt_holders_of_exclusive,
        corrupt_holders_of_shared,
        corrupt_holders_of_free,
        corrupt_content,
        corrupt_lost_content,
        corrupt_tail,
        corrupt_future,
        corrupt_twin,
        corrupt_count,
    ],
)
def test_invariants_notice_a_damaged_ledger(damage: Callable[[PageLedger], None]) -> None:
    ledger = PageLedger(4)
    ledger.allocate(1, 2)
    ledger.share(0, 1, 7)
    ledger.check_invariants()
    damage(ledger)
    with pytest.raises(RuntimeError):
        ledger.check_invariants()


NAMES = st.sampled_from(["", "a", "b", "ab", "a\x01b", "\x01", "ü"])
TEXTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3), max_size=3)


def chain(tenant: str, prefix_key: str | None, text: list[list[int]]) -> int:
    content = text_root(tenant, prefix_key)
    for page in text:
        content = content_of_text(content, page)
    return content


@settings(max_examples=300, deadline=None)
@given(
    one=st.tuples(NAMES, st.none() | NAMES, TEXTS),
    other=st.tuples(NAMES, st.none() | NAMES, TEXTS),
)
def test_contents_are_equal_exactly_when_tenant_prompt_and_text_are(
    one: tuple[str, str | None, list[list[int]]], other: tuple[str, str | None, list[list[int]]]
) -> None:
    assert (chain(*one) == chain(*other)) == (one == other)
    assert 0 < chain(*one) < 2**63


def test_no_two_tenants_or_prompts_have_one_root() -> None:
    names = ["", "a", "b", "ab", "a\x01b", "\x01", "\x01a", "ü"]
    roots = {text_root(tenant, prefix_key) for tenant in names for prefix_key in (None, *names)}
    assert len(roots) == len(names) * (len(names) + 1)


def test_prefix_and_text_of_the_same_bytes_have_different_contents() -> None:
    parent = int.from_bytes(b"abcdefgh", "little")
    assert content_of_prefix("abcdefgh", 5) != content_of_text(parent, [5])


def test_contents_of_a_prefix_differ_by_key_and_page_and_from_those_of_texts() -> None:
    ids = {content_of_prefix(key, index) for key in ("a", "b") for index in range(300)}
    assert len(ids) == 600
    assert all(0 < content < 2**63 for content in ids)
    assert not ids & {text_root("a", None), text_root("", "a"), content_of_text(1, [2])}
