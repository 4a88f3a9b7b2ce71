"""Kept texts, rule by rule: what is shared, with whom, and what goes first."""

from collections.abc import Callable

import numpy as np
import pytest

import server.engine.text_cache as text_cache_module
from server.engine.pages import SHARED, PageLedger
from server.engine.text_cache import TextCache
from tests.unit.engine.texts import make_tokens, page_ends


class Keeper:
    """A cache over a ledger of its own, and rows that compute a text, leave it and end."""

    def __init__(self, num_pages: int = 32) -> None:
        self.ledger = PageLedger(num_pages)
        self.cache = TextCache(self.ledger)
        self.next_serial = 1

    def compute(
        self, tokens: list[int], *, tenant: str = "a", prefix_key: str | None = None, k: int = 0
    ) -> tuple[list[int], int]:
        """A row's own pages for all full pages of the text, and its serial."""
        serial, self.next_serial = self.next_serial, self.next_serial + 1
        pages = self.ledger.allocate(serial, len(page_ends(k, len(tokens))))
        assert pages is not None
        self.cache.insert(tenant, prefix_key, k, tokens, pages, serial)
        return pages.tolist(), serial

    def leave(self, tokens: list[int], *, tenant: str = "a", prefix_key: str | None = None, k: int = 0) -> list[int]:
        pages, serial = self.compute(tokens, tenant=tenant, prefix_key=prefix_key, k=k)
        self.ledger.release(pages, serial)
        return pages

    def find(
        self,
        tokens: list[int],
        *,
        tenant: str = "a",
        prefix_key: str | None = None,
        k: int = 0,
        limit: int | None = None,
    ) -> list[int]:
        """The pages of a match that is given back at once."""
        match = self.cache.match(tenant, prefix_key, k, tokens, limit=len(tokens) if limit is None else limit)
        self.ledger.release(match.pages, SHARED)
        return match.pages.tolist()


def test_later_row_shares_the_pages_of_an_equal_beginning_only() -> None:
    keeper = Keeper()
    pages = keeper.leave(make_tokens(0, [1, 2, 3]))
    assert keeper.find(make_tokens(0, [1, 2, 3])) == pages
    assert keeper.find(make_tokens(0, [1, 2, 4])) == pages[:2]
    assert keeper.find(make_tokens(0, [2, 2, 3])) == []
    assert keeper.find(make_tokens(0, [1, 2])) == pages[:2]


def test_first_page_holds_the_tokens_that_the_prefix_left_room_for() -> None:
    keeper = Keeper()
    tokens = list(range(100, 100 + 11 + 16 + 4))
    match_of = {"prefix_key": "p", "k": 5}
    pages = keeper.leave(tokens, prefix_key="p", k=5)
    assert len(pages) == 2
    match = keeper.cache.match("a", "p", 5, tokens, limit=len(tokens) - 1)
    assert (match.pages.tolist(), match.num_tokens) == (pages, 27)
    assert keeper.find(tokens[:10], **match_of) == []  # type: ignore[arg-type]
    assert keeper.find(tokens[:11], **match_of) == pages[:1]  # type: ignore[arg-type]


def test_match_covers_no_more_tokens_than_its_limit() -> None:
    keeper = Keeper()
    tokens = make_tokens(0, [1, 2])
    pages = keeper.leave(tokens)
    assert [len(keeper.find(tokens, limit=limit)) for limit in (0, 15, 16, 31, 32, 99)] == [0, 0, 1, 1, 2, 2]
    assert keeper.find(tokens, limit=-1) == []
    assert keeper.find(tokens) == pages


@pytest.mark.parametrize(
    ("tenant", "prefix_key"), [("b", "p"), ("a", "q"), ("a", None), ("ap", None), ("b", None), ("", "ap")]
)
def test_another_tenant_or_prompt_finds_nothing_of_the_same_tokens(tenant: str, prefix_key: str | None) -> None:
    keeper = Keeper()
    tokens = make_tokens(0, [1, 2])
    pages = keeper.leave(tokens, tenant="a", prefix_key="p")
    assert keeper.find(tokens, tenant=tenant, prefix_key=prefix_key) == []
    other = keeper.leave(tokens, tenant=tenant, prefix_key=prefix_key)
    assert not set(other) & set(pages)
    assert keeper.find(tokens, tenant=tenant, prefix_key=prefix_key) == other
    assert keeper.find(tokens, tenant="a", prefix_key="p") == pages


def test_texts_whose_hashes_collide_are_not_taken_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_cache_module, "content_of_text", lambda parent, token_ids: 1)
    keeper = Keeper()
    one = keeper.leave(make_tokens(0, [1, 1]))
    assert keeper.find(make_tokens(0, [2, 1])) == []
    two = keeper.leave(make_tokens(0, [2, 1]))
    assert keeper.find(make_tokens(0, [1, 1])) == one
    assert keeper.find(make_tokens(0, [2, 1])) == two


def test_row_keeps_its_own_page_where_the_same_text_is_kept_already() -> None:
    keeper = Keeper()
    tokens = make_tokens(0, [1, 2])
    kept, _ = keeper.compute(tokens)
    serial = keeper.next_serial
    own, _ = keeper.compute([*tokens, *make_tokens(0, [3])])
    assert keeper.ledger.owner[own].tolist() == [serial, serial, SHARED]
    assert keeper.find([*tokens, *make_tokens(0, [3])]) == [*kept, own[2]]


def test_least_recently_used_text_goes_first_from_its_end() -> None:
    keeper = Keeper()
    old = keeper.leave(make_tokens(0, [1, 1]))
    new = keeper.leave(make_tokens(0, [2, 2]))
    newest = keeper.leave(make_tokens(0, [3]))
    keeper.find(make_tokens(0, [1, 1]))
    freed = []
    for _ in range(5):
        before = set(np.flatnonzero(keeper.ledger.owner == SHARED).tolist())
        assert keeper.cache.evict(1) == 1
        freed += list(before - set(np.flatnonzero(keeper.ledger.owner == SHARED).tolist()))
    assert freed == [new[1], new[0], newest[0], old[1], old[0]]
    assert keeper.cache.evict(1) == 0


def test_text_that_a_row_uses_is_not_evicted() -> None:
    keeper = Keeper()
    tokens = make_tokens(0, [1, 2])
    keeper.leave(tokens)
    match = keeper.cache.match("a", None, 0, tokens, limit=16)
    assert keeper.cache.num_evictable == 1
    assert keeper.cache.evict(2) == 1
    assert keeper.find(tokens) == match.pages.tolist()
    keeper.ledger.release(match.pages, 9)
    assert keeper.cache.evict(2) == 1


def test_page_that_nobody_uses_can_go_although_a_row_uses_one_after_it() -> None:
    keeper = Keeper()
    tokens = make_tokens(0, [1, 2])
    keeper.leave(tokens)
    own, serial = keeper.compute([*tokens, *make_tokens(0, [3])])
    assert keeper.cache.num_evictable == 2, "the two pages that the row has computed once more itself"
    assert keeper.cache.evict(9) == 2
    assert keeper.cache.num_pages == 0
    keeper.ledger.release(own, serial)
    assert keeper.ledger.num_free == keeper.ledger.num_pages


def test_text_of_a_deleted_prompt_is_found_no_more_and_stays_with_the_rows_that_use_it() -> None:
    keeper = Keeper()
    tokens = make_tokens(0, [1, 2])
    keeper.leave(tokens, prefix_key="p")
    others = [keeper.leave(tokens, prefix_key="q"), keeper.leave(tokens)]
    match = keeper.cache.match("a", "p", 0, tokens, limit=16)
    keeper.cache.evict_prefix("p")
    assert keeper.find(tokens, prefix_key="p") == []
    assert [keeper.find(tokens, prefix_key="q"), keeper.find(tokens)] == others
    assert keeper.ledger.owner[match.pages].tolist() == [SHARED]
    assert keeper.ledger.content[match.pages].tolist() == match.contents.tolist()
    assert keeper.ledger.num_used == 5
    assert keeper.ledger.release(match.pages, 9).tolist() == match.pages.tolist()


def test_queue_does_not_grow_with_prompts_that_come_and_go() -> None:
    keeper = Keeper()
    for index in range(200):
        keeper.leave(make_tokens(0, [1, 2]), prefix_key=f"p{index}")
        keeper.cache.evict_prefix(f"p{index}")
    assert not keeper.cache._queue
    assert not keeper.cache._roots


def test_older_of_two_texts_in_the_way_is_forgotten() -> None:
    keeper = Keeper()
    own = {}
    for letter in (1, 2):
        keeper.leave(make_tokens(0, [letter]))
        own[letter], _ = keeper.compute(make_tokens(0, [letter, letter]))
    assert keeper.cache.evict(1) == 1
    assert keeper.find(make_tokens(0, [1, 1])) == []
    assert keeper.find(make_tokens(0, [2, 2]))[1:] == own[2][1:]


def test_dropped_pages_go_through_the_given_release() -> None:
    ledger = PageLedger(4)
    released: list[int] = []

    def release(pages: np.ndarray, owner: int) -> None:
        released.extend(ledger.release(pages, owner).tolist())

    cache = TextCache(ledger, release=release)
    for serial, letter in enumerate((1, 2), start=1):
        pages = ledger.allocate(serial, 1)
        assert pages is not None
        cache.insert("a", "p", 0, make_tokens(0, [letter]), pages, serial)
        ledger.release(pages, serial)
    cache.evict(1)
    cache.evict_prefix("p")
    assert released == [0, 1]


def test_page_of_another_row_is_not_kept_and_nothing_changes() -> None:
    keeper = Keeper()
    assert keeper.ledger.allocate(5, 1) is not None
    assert keeper.ledger.allocate(6, 1) is not None
    with pytest.raises(RuntimeError, match="page 1 is not owned by row 5"):
        keeper.cache.insert("a", None, 0, make_tokens(0, [1, 2]), [0, 1], 5)
    assert keeper.ledger.owner[:2].tolist() == [5, 6]
    keeper.cache.check_invariants()


def test_shared_page_that_holds_another_text_is_refused() -> None:
    keeper = Keeper()
    pages, serial = keeper.compute(make_tokens(0, [1]))
    with pytest.raises(RuntimeError, match="another text"):
        keeper.cache.insert("a", None, 0, make_tokens(0, [2]), pages, serial)


def test_nothing_is_kept_of_a_row_one_of_whose_pages_holds_another_text() -> None:
    keeper = Keeper()
    (foreign,) = keeper.leave(make_tokens(0, [1]))
    own = keeper.ledger.allocate(9, 1)
    assert own is not None
    with pytest.raises(RuntimeError, match="another text"):
        keeper.cache.insert("a", None, 0, make_tokens(0, [2, 3]), [int(own[0]), foreign], 9)
    assert keeper.ledger.owner[own].tolist() == [9]
    assert keeper.cache.num_pages == 1
    keeper.cache.check_invariants()
    keeper.ledger.release(own, 9)
    keeper.ledger.check_invariants()


def test_pages_without_enough_tokens_are_refused() -> None:
    keeper = Keeper()
    pages = keeper.ledger.allocate(1, 2)
    assert pages is not None
    with pytest.raises(ValueError, match="more than 31 tokens"):
        keeper.cache.insert("a", None, 0, [7] * 31, pages, 1)


def lose_claim(keeper: Keeper) -> None:
    keeper.ledger.release([0], SHARED)


def lose_queue(keeper: Keeper) -> None:
    keeper.cache._queue.clear()


def lose_entry(keeper: Keeper) -> None:
    keeper.cache._queue.pop()[2].is_queued = False


def double_entry(keeper: Keeper) -> None:
    keeper.cache._queue.append(keeper.cache._queue[0])


def miscount(keeper: Keeper) -> None:
    keeper.cache.num_pages += 1


def mark_another(keeper: Keeper) -> None:
    keeper.cache._is_kept[[0, 9]] = [False, True]


def rename_tree(keeper: Keeper) -> None:
    keeper.cache._roots["b", None] = keeper.cache._roots.pop(("a", None))


def mislay_page(keeper: Keeper) -> None:
    children = keeper.cache._roots["a", None].children
    children[(1, 2, 3)] = children.pop(next(iter(children)))


def change_content(keeper: Keeper) -> None:
    keeper.ledger.content[0] += 1


def use_child_alone(keeper: Keeper) -> None:
    node = next(iter(keeper.cache._roots["a", None].children.values()))
    next(iter(node.children.values())).last_used += 1


@pytest.mark.parametrize(
    "damage",
    [
        lose_claim,
        lose_queue,
        lose_entry,
        double_entry,
        miscount,
        mark_another,
        rename_tree,
        mislay_page,
        change_content,
        use_child_alone,
    ],
)
def test_invariants_notice_damage(damage: Callable[[Keeper], None]) -> None:
    keeper = Keeper()
    keeper.leave(make_tokens(0, [1, 2]))
    keeper.cache.check_invariants()
    damage(keeper)
    with pytest.raises(RuntimeError):
        keeper.cache.check_invariants()
