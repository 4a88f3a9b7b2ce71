"""Who is entitled to a place at once, and how long a place that was given up is kept."""

import pytest

from server.engine.row import Row
from server.engine.shares import NUM_KEPT_STEPS, KeptPlaces, Shares
from server.engine.waiting import WaitingRows
from tests.unit.engine.scheduling import make_row


def make_shares(running: str, waiting: str, *, max_rows: int, recent: str = "") -> Shares:
    """A letter is a row's tenant."""
    rows = [make_row(serial, tenant=tenant) for serial, tenant in enumerate(running + waiting, start=1)]
    queue = WaitingRows()
    for row in rows[len(running) :]:
        queue.add(row)
    return Shares(rows[: len(running)], queue, max_rows, set(recent))


@pytest.mark.parametrize(
    ("running", "waiting", "recent", "entitled"),
    [
        ("aaaa", "aab", "a", "b"),  # b is small
        ("aaaa", "aabbbbb", "a", "b"),  # nothing of b runs
        ("aaaa", "aabbbbb", "ab", ""),  # it ran a step ago, and has more than its share
        ("aaaab", "aabbbbb", "ab", ""),
        ("aab", "aab", "ab", "b"),  # its share are two places
        ("", "aabbbbb", "ab", "ab"),  # there is room for all
    ],
)
def test_small_tenants_and_those_of_which_nothing_runs_are_entitled_to_a_place(
    running: str, waiting: str, recent: str, entitled: str
) -> None:
    shares = make_shares(running, waiting, max_rows=4, recent=recent)
    assert shares.entitled == set(entitled)


@pytest.mark.parametrize(
    ("running", "waiting", "calm"),
    [
        ("a", "", "a"),
        ("aaaaa", "", ""),  # it has all places to itself, and were large beside another
        ("aaaa", "", "a"),
        ("aab", "aaaaaaa", "b"),
        ("aabbb", "c", "ac"),
    ],
)
def test_calm_tenants_are_those_that_are_small_beside_another(running: str, waiting: str, calm: str) -> None:
    assert make_shares(running, waiting, max_rows=8).calm == set(calm)


def test_largest_tenant_gives_up_places_until_it_has_no_more_than_the_other() -> None:
    shares = make_shares("aaaacc", "aacccb", max_rows=6, recent="ac")
    given = []
    while shares.can_make_way_for("b"):
        given.append(shares.make_way())
    assert given == ["a", "a", "c", "a"]
    assert shares.num_running == {"a": 1, "c": 1}
    assert not shares.can_make_way_for("c")


def taken(kept: KeptPlaces, serial: int, *, is_given_up: bool = True) -> Row:
    row = make_row(serial)
    kept.take(row, is_given_up=is_given_up)
    return row


def test_place_that_was_given_up_is_kept_for_a_while_when_its_row_has_ended() -> None:
    kept = KeptPlaces()
    row = taken(kept, 1)
    assert len(kept) == 0
    kept.end(row)
    for _ in range(NUM_KEPT_STEPS):
        kept.begin_step()
        assert len(kept) == 1
    kept.begin_step()
    assert len(kept) == 0


def test_kept_place_goes_from_one_entitled_row_to_the_next() -> None:
    kept = KeptPlaces()
    kept.end(taken(kept, 1))
    second = taken(kept, 2, is_given_up=False)
    assert len(kept) == 0
    kept.end(second)
    assert len(kept) == 1


def test_place_that_was_free_anyway_is_not_kept() -> None:
    kept = KeptPlaces()
    kept.end(taken(kept, 1, is_given_up=False))
    kept.end(make_row(2))
    assert len(kept) == 0
