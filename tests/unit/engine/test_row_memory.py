"""Rows get their pages, share what they begin with, grow, give way and end; what lies in each page is theirs."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from server.engine.isolation import check_plan
from server.engine.kv import num_pages_for
from server.engine.pages import NO_CONTENT, NO_PREFIX, PAGE_SIZE, SHARED
from server.engine.plan import build_plan
from server.engine.scheduler import ScheduledRow
from server.engine.step import plan_entry
from tests.unit.engine.row_memory_bench import PREFIX_TOKENS, Bench, pages_of, text


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 40])
def test_row_gets_pages_for_all_its_tokens_and_they_are_its_own(num_tokens: int) -> None:
    bench = Bench()
    row = bench.admitted(text(num_tokens))
    pages = pages_of(row)
    assert pages.num_pages == row.num_pages == num_pages_for(num_tokens)
    assert pages.contents.tolist() == [NO_CONTENT] * pages.num_pages
    assert set(bench.pool.ledger.owner[pages.numbers].tolist()) == {row.serial}
    assert (row.num_computed, row.num_cached) == (0, 0)
    bench.compute(row)
    bench.assert_holds_its_own(row)


@pytest.mark.parametrize(("row_pages", "is_admitted"), [(4, False), (5, True)])
def test_admission_beside_others_leaves_one_page_of_head_room(row_pages: int, is_admitted: bool) -> None:
    bench = Bench(row_pages=row_pages)
    bench.admitted(text(1, first=50))
    row = bench.row(text(40))
    assert bench.try_admit(row) == is_admitted
    assert (row.pages is not None) == is_admitted
    assert bench.pool.num_row_pages == (4 if is_admitted else 1)


@pytest.mark.parametrize("num_kept", [0, 16, 32])
def test_row_alone_may_fill_the_whole_pool_whatever_is_kept(num_kept: int) -> None:
    bench = Bench(row_pages=3)
    if num_kept:
        earlier = bench.admitted(text(num_kept))
        bench.compute(earlier)
        bench.end(earlier)
    row = bench.admitted(text(48))
    assert row.num_cached == num_kept
    bench.compute(row)
    bench.assert_holds_its_own(row)
    assert not bench.try_admit(bench.row(text(1, first=50)))


def test_row_that_can_never_fit_is_not_admitted() -> None:
    bench = Bench(row_pages=2)
    assert not bench.try_admit(bench.row(text(33)))
    assert bench.pool.num_row_pages == 0


@pytest.mark.parametrize("num_kept", [0, 32])
def test_row_that_reserves_all_gets_pages_for_its_longest_length_at_once(num_kept: int) -> None:
    bench = Bench(reserves_all=True)
    if num_kept:
        earlier = bench.admitted(text(num_kept), max_tokens=1)
        bench.compute(earlier)
        bench.end(earlier)
    row = bench.admitted(text(40), max_tokens=30)
    assert pages_of(row).num_pages == num_pages_for(70)
    assert row.num_cached == num_kept
    used = bench.pool.num_row_pages
    bench.compute(row)
    for _ in range(30):
        row.token_ids.append(1)
        assert bench.memory.extend(row, 1)
        bench.compute(row)
    assert bench.pool.num_row_pages == used
    bench.assert_holds_its_own(row)


@pytest.mark.parametrize("prompt", PREFIX_TOKENS)
def test_row_reads_its_prefix_from_shared_pages_and_the_copied_tail(prompt: str) -> None:
    bench = Bench()
    row = bench.admitted(text(20), prompt=prompt)
    prefix, pages, k = bench.prefixes[prompt], pages_of(row), PREFIX_TOKENS[prompt]
    num_full = k // PAGE_SIZE
    assert pages.numbers[:num_full].tolist() == prefix.pages.tolist()
    assert pages.held.tolist() == pages.numbers[num_full:].tolist()
    assert pages.num_pages == num_pages_for(k + 20)
    stamped = bench.pool.ledger.tail_uid[pages.held].tolist()
    assert stamped == [prefix.uid if k % PAGE_SIZE else NO_PREFIX] + [NO_PREFIX] * (len(stamped) - 1)
    bench.assert_holds_its_own(row)
    bench.compute(row)
    bench.assert_holds_its_own(row)
    bench.end(row)
    assert bench.pool.ledger.num_holders[prefix.pages].tolist() == [1] * num_full, "the row holds no page of its prefix"


def test_contents_that_a_row_expects_follow_from_its_request_and_not_from_the_prefix_it_was_given() -> None:
    bench = Bench()
    row = bench.row(text(20), prompt="full")
    row.prefix = bench.prefixes["like full"]
    assert bench.memory.admit(row, row.prefix)
    item = ScheduledRow(row, 4)
    plan, _ = build_plan([plan_entry(item)])
    believed = replace(bench.claim(item), prefix_matches=True)
    (violation,) = check_plan(plan, [believed], bench.pool.ledger)
    assert violation.reason == "its shared page holds another text or prompt"


@pytest.mark.parametrize("prompt", [None, *PREFIX_TOKENS])
def test_row_that_begins_like_an_earlier_one_shares_its_full_pages(prompt: str | None) -> None:
    bench = Bench()
    k = PREFIX_TOKENS[prompt] if prompt is not None else 0
    first = bench.admitted(text(50), prompt=prompt)
    bench.compute(first)
    theirs = pages_of(first).numbers.tolist()
    bench.end(first)
    second = bench.admitted([*text(45), 99, 99], prompt=prompt)
    num_shared = (k + 45) // PAGE_SIZE
    assert pages_of(second).numbers[:num_shared].tolist() == theirs[:num_shared]
    assert second.num_cached == second.num_computed == num_shared * PAGE_SIZE - k
    contents = pages_of(second).contents
    assert (contents != NO_CONTENT).tolist() == [i < num_shared for i in range(len(contents))]
    # A shared page that begins with the tail was computed behind it; the tail is not copied once more.
    assert not bench.pool.ledger.tail_uid[pages_of(second).numbers].any()
    bench.assert_holds_its_own(second)
    bench.compute(second)
    bench.assert_holds_its_own(second)


def test_tail_is_copied_when_no_kept_page_covers_it() -> None:
    bench = Bench()
    first = bench.admitted(text(50), prompt="tail")
    bench.compute(first)
    bench.end(first)
    other = bench.admitted(text(50, first=7), prompt="tail")
    assert other.num_cached == 0
    assert int(bench.pool.ledger.tail_uid[pages_of(other).numbers[0]]) == bench.prefixes["tail"].uid
    bench.assert_holds_its_own(other)


def test_last_token_is_always_computed_however_much_is_kept() -> None:
    bench = Bench()
    first = bench.admitted(text(32))
    bench.compute(first)
    bench.end(first)
    same = bench.admitted(text(32))
    assert same.num_cached == PAGE_SIZE
    assert same.num_uncomputed == PAGE_SIZE
    longer = bench.admitted(text(33))
    assert (longer.num_cached, longer.num_uncomputed) == (32, 1)


@pytest.mark.parametrize(
    "other", [{"tenant": "b"}, {"prompt": None}, {"prompt": "tail"}, {"prompt_logprobs": 0}], ids=str
)
def test_kept_text_is_not_for_another_tenant_or_prompt_nor_for_who_must_see_every_logit(
    other: dict[str, str | int | None],
) -> None:
    bench = Bench()
    first = bench.admitted(text(50), prompt="full")
    bench.compute(first)
    bench.end(first)
    assert bench.admitted(text(50), prompt="full").num_cached == 48
    second = bench.admitted(text(50), **({"prompt": "full"} | other))
    assert (second.num_cached, second.num_computed) == (0, 0)
    bench.compute(second)
    bench.assert_holds_its_own(second)


def test_nothing_is_kept_when_texts_are_not_to_be_kept() -> None:
    bench = Bench(keeps_texts=False)
    first = bench.admitted(text(50))
    bench.compute(first)
    bench.end(first)
    assert bench.pool.num_row_pages == 0
    assert bench.admitted(text(50)).num_cached == 0


def test_failed_admission_gives_back_what_it_had_taken_hold_of() -> None:
    bench = Bench(row_pages=6)
    first = bench.admitted(text(32))
    bench.compute(first)
    kept = pages_of(first).numbers.tolist()
    bench.end(first)
    blocker = bench.admitted(text(17, first=50))
    used = bench.pool.num_row_pages
    row = bench.row([*text(32), *text(20, first=70)])
    assert not bench.try_admit(row), "two pages are free, three would be needed"
    assert row.pages is None
    assert bench.pool.ledger.num_holders[kept].tolist() == [1, 1]
    assert bench.pool.num_row_pages == used
    bench.end(blocker)
    assert bench.try_admit(row)
    assert pages_of(row).numbers[:2].tolist() == kept
    bench.check()


def test_kept_texts_give_way_to_rows_but_not_the_one_that_the_row_begins_with() -> None:
    bench = Bench(row_pages=7)
    for first in (0, 40):
        row = bench.admitted(text(32, first=first))
        bench.compute(row)
        bench.end(row)
    assert bench.pool.num_free_row_pages == 3
    row = bench.admitted([*text(33), *text(30, first=70)])
    assert row.num_cached == 32, "the older text, held by the row before anything is dropped"
    bench.assert_holds_its_own(row)
    bench.compute(row)
    assert bench.memory.extend(row, 17)
    assert bench.admitted(text(1)).num_cached == 0
    bench.assert_holds_its_own(row)
    bench.check()


def test_row_grows_a_page_at_its_border_and_not_before() -> None:
    bench = Bench()
    row = bench.admitted(text(15))
    bench.compute(row)
    row.token_ids.append(5)
    assert bench.memory.extend(row, 1)
    assert row.num_pages == 1
    bench.compute(row)
    row.token_ids.append(6)
    assert bench.memory.extend(row, 1)
    assert row.num_pages == 2
    bench.compute(row)
    bench.assert_holds_its_own(row)


def test_row_that_cannot_grow_keeps_what_it_has() -> None:
    bench = Bench(row_pages=4)
    row = bench.admitted(text(16))
    blocker = bench.admitted(text(17, first=50))
    bench.compute(row)
    row.token_ids += [1] * 40
    assert not bench.memory.extend(row, 40), "one page is free, three would be needed"
    assert (row.num_pages, bench.pool.num_free_row_pages) == (1, 1)
    assert bench.memory.extend(row, 1)
    bench.memory.release(blocker)
    assert bench.memory.extend(row, 40)
    bench.compute(row)
    bench.assert_holds_its_own(row)


def test_kept_texts_give_way_to_a_row_that_grows() -> None:
    bench = Bench(row_pages=4)
    old = bench.admitted(text(48))
    bench.compute(old)
    bench.end(old)
    row = bench.admitted(text(16, first=50))
    bench.compute(row)
    row.token_ids += [1] * 40
    assert bench.memory.extend(row, 40)
    bench.compute(row)
    bench.assert_holds_its_own(row)
    assert bench.memory.texts.num_pages == 0


def test_kept_pages_of_a_running_row_are_shared_and_it_goes_on_behind_them() -> None:
    bench = Bench()
    row = bench.admitted(text(40), prompt="both")
    bench.compute(row)
    for _ in range(2):
        bench.memory.keep_text(row)
        pages = pages_of(row)
        num_full = row.next_column // PAGE_SIZE
        assert (pages.contents != NO_CONTENT).tolist() == [i < num_full for i in range(pages.num_pages)]
        assert bench.pool.ledger.content[pages.numbers].tolist() == pages.contents.tolist()
        assert set(bench.pool.ledger.owner[pages.numbers[:num_full]].tolist()) == {SHARED}
        row.token_ids.append(7)
        assert bench.memory.extend(row, 1)
        bench.compute(row)
    other = bench.admitted(text(41), prompt="both")
    assert other.num_cached == 41 // PAGE_SIZE * PAGE_SIZE + 16 - PREFIX_TOKENS["both"] % PAGE_SIZE - 16
    for ended in (row, other):
        bench.assert_holds_its_own(ended)
        bench.end(ended)
    bench.check()


@pytest.mark.parametrize(("num_in_flight", "num_kept"), [(0, 2), (1, 1), (16, 1), (17, 0), (32, 0)])
def test_what_a_step_computes_that_is_not_collected_yet_is_not_kept(num_in_flight: int, num_kept: int) -> None:
    bench = Bench()
    row = bench.admitted(text(32))
    bench.compute(row)
    row.num_in_flight = num_in_flight
    bench.memory.keep_text(row)
    assert bench.memory.texts.num_pages == num_kept
    assert (pages_of(row).contents != NO_CONTENT).sum() == num_kept


def test_two_rows_that_compute_the_same_text_at_once_each_keep_their_own_pages() -> None:
    bench = Bench()
    rows = [bench.admitted(text(32)) for _ in range(2)]
    for row in rows:
        bench.compute(row)
        bench.memory.keep_text(row)
    first, second = (pages_of(row) for row in rows)
    assert not set(first.numbers.tolist()) & set(second.numbers.tolist())
    assert (second.contents == NO_CONTENT).all()
    for row in rows:
        bench.end(row)
    assert bench.pool.num_row_pages == bench.memory.texts.num_pages == 2


def test_preempted_row_finds_its_own_tokens_again_and_reports_what_was_cached_at_first() -> None:
    bench = Bench()
    row = bench.admitted(text(20), prompt="tail")
    bench.compute(row)
    for token_id in range(30):
        row.token_ids.append(token_id)
        assert bench.memory.extend(row, 1)
        bench.compute(row)
    row.token_ids.append(77)
    bench.end(row)
    assert row.pages is None
    row.num_computed, row.num_preemptions = 0, 1
    assert bench.try_admit(row)
    assert row.num_computed == 3 * PAGE_SIZE - PREFIX_TOKENS["tail"]
    assert row.num_cached == 0
    bench.assert_holds_its_own(row)
    assert pages_of(row).num_columns >= row.num_virtual_tokens + len(row.token_ids)
    bench.compute(row)
    bench.assert_holds_its_own(row)


def dispute_owner(bench: Bench, page: int) -> None:
    bench.pool.ledger.owner[page] = 999


def dispute_sharing(bench: Bench, page: int) -> None:
    bench.pool.ledger.owner[page] = SHARED


@pytest.mark.parametrize("dispute", [dispute_owner, dispute_sharing])
def test_disputed_page_is_given_back_by_nobody_and_the_others_are(dispute: Callable[[Bench, int], None]) -> None:
    bench = Bench()
    row = bench.admitted(text(40))
    disputed, *others = pages_of(row).numbers.tolist()
    dispute(bench, disputed)
    bench.memory.release(row)
    assert row.pages is None
    assert bench.pool.ledger.num_holders[[disputed, *others]].tolist() == [1, 0, 0]
    again = bench.admitted(text(100))
    assert disputed not in pages_of(again).numbers.tolist()


def test_rows_whose_pages_were_exchanged_give_back_what_the_ledger_says_is_theirs() -> None:
    bench = Bench()
    rows = [bench.admitted(text(40)), bench.admitted(text(10, first=50))]
    theirs = [pages_of(row).numbers.tolist() for row in rows]
    rows[0].pages, rows[1].pages = rows[1].pages, rows[0].pages
    bench.memory.release(rows[0])
    assert bench.pool.ledger.num_holders[theirs[0]].tolist() == [0, 0, 0]
    assert bench.pool.ledger.owner[theirs[1]].tolist() == [rows[1].serial]
    bench.memory.release(rows[1])
    assert bench.pool.num_row_pages == 0


def test_disputed_shared_page_is_given_back_by_nobody() -> None:
    bench = Bench()
    row = bench.admitted(text(40))
    bench.compute(row)
    bench.memory.keep_text(row)
    shared = pages_of(row).numbers[:2].tolist()
    bench.pool.ledger.owner[shared[0]] = 999
    bench.memory.release(row)
    assert bench.pool.ledger.num_holders[shared].tolist() == [2, 1]


def test_texts_behind_a_deleted_prompt_are_dropped_and_others_stay() -> None:
    bench = Bench()
    for prompt in ("full", "tail"):
        row = bench.admitted(text(32), prompt=prompt)
        bench.compute(row)
        bench.end(row)
    bench.memory.forget_prompt("key-full")
    assert bench.admitted(text(40), prompt="full").num_cached == 0
    assert bench.admitted(text(40), prompt="tail").num_cached == 2 * PAGE_SIZE - 5
    bench.check()


def test_usage_counts_what_rows_hold_and_not_what_is_kept_for_later_ones() -> None:
    bench = Bench(row_pages=10)
    assert bench.memory.usage_ratio == 0.0
    row = bench.admitted(text(32), prompt="full")
    assert bench.memory.usage_ratio == 0.2
    bench.compute(row)
    bench.memory.keep_text(row)
    assert bench.memory.usage_ratio == 0.2, "shared, and still held by the row"
    bench.memory.release(row)
    assert bench.memory.usage_ratio == 0.0


@pytest.mark.parametrize("use", ["extend", "keep_text", "release"])
def test_row_without_pages_is_an_error(use: str) -> None:
    bench = Bench()
    row = bench.row(text(3))
    with pytest.raises(RuntimeError, match="has no pages"):
        getattr(bench.memory, use)(row, *([1] if use == "extend" else []))


def test_invariants_notice_a_page_that_no_row_owns() -> None:
    bench = Bench()
    bench.admitted(text(3))
    bench.check()
    with pytest.raises(RuntimeError, match="1 pages have an owner, rows own 0"):
        bench.memory.check_invariants([])
