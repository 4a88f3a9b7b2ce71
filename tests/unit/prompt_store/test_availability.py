"""How long what is remembered of a database that is away may be believed, and who asks it meanwhile."""

import threading

import pytest

from prompt_store.availability import Availability
from prompt_store.errors import StorageFailed, StorageUnavailable
from prompt_store.last_known import LastKnown
from prompt_store.watchdog import OpenSockets, Watchdog


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def watched(clock: Clock) -> tuple[Availability, list[str]]:
    calls: list[str] = []
    availability = Availability(max_stale_s=60.0, max_silence_s=10.0, clock=clock)
    availability.mark_heard()
    availability.mark_synced(clock())
    availability.watch(lambda: calls.append("lost"))
    return availability, calls


def test_lost_database_is_asked_by_nobody_until_it_was_heard_again() -> None:
    availability, calls = watched(Clock())
    availability.check()
    availability.lose()
    availability.lose()
    assert calls == ["lost"]
    with pytest.raises(StorageUnavailable):
        availability.check()
    availability.mark_heard()
    availability.check()


def test_without_anyone_who_watches_each_call_finds_out_for_itself() -> None:
    clock = Clock()
    availability = Availability(max_stale_s=60.0, clock=clock)
    availability.lose()
    clock.now_s += 1000
    availability.check()


def test_database_that_lets_its_watcher_wait_counts_as_away() -> None:
    clock = Clock()
    availability, _ = watched(clock)
    clock.now_s += 10
    availability.check()
    clock.now_s += 1
    with pytest.raises(StorageUnavailable):
        availability.check()
    availability.mark_heard()
    availability.check()


def test_process_that_stood_still_itself_hears_the_database_before_its_connections_are_cut() -> None:
    now = Clock()
    availability, _ = watched(now)
    looks, cut_at = [], []
    cut = threading.Event()

    class Sockets(OpenSockets):
        def shut_down(self) -> int:
            cut_at.append(len(looks))
            cut.set()
            return 0

    def clock() -> float:
        looks.append(1)
        now.now_s += 1000
        return now.now_s

    watchdog = Watchdog(availability, Sockets(), interval_s=0.001, clock=clock)
    watchdog.start()
    assert cut.wait(20)
    watchdog.stop()
    # The first is when it begins, the second is late and gives time; not for ever, should it always be late.
    assert cut_at[0] == 3


def test_memory_is_believed_for_so_long_after_the_last_proof() -> None:
    clock = Clock()
    availability, _ = watched(clock)
    availability.lose()
    clock.now_s += 60
    assert availability.is_believable()
    assert availability.stale_s == 60
    clock.now_s += 0.1
    assert not availability.is_believable()
    availability.mark_synced(clock())
    assert availability.is_believable()


def test_memory_is_believed_while_the_database_answers_even_if_it_may_not_be_without_it() -> None:
    clock = Clock()
    availability = Availability(max_stale_s=0.0, clock=clock)
    availability.mark_heard()
    availability.mark_synced(clock())
    availability.watch(lambda: None)
    clock.now_s += 0.5
    assert availability.is_believable()
    availability.lose()
    assert not availability.is_believable()


def test_never_synced_is_never_believed() -> None:
    availability = Availability(max_stale_s=60.0)
    assert not availability.is_believable()
    assert availability.stale_s == 0


def away() -> int:
    raise StorageUnavailable("away")


def test_last_answer_counts_only_while_the_database_is_away_and_it_is_believable() -> None:
    believable = True
    known = LastKnown(lambda: believable)
    with pytest.raises(StorageUnavailable):
        known.ask("a", away)
    assert known.ask("a", lambda: 1) == 1
    assert known.ask("a", lambda: 2) == 2
    assert known.ask("a", away) == 2
    believable = False
    with pytest.raises(StorageUnavailable):
        known.ask("a", away)


def test_other_failures_are_not_covered_up() -> None:
    known = LastKnown(lambda: True)
    known.ask("a", lambda: 1)

    def broken() -> int:
        raise StorageFailed("broken")

    with pytest.raises(StorageFailed):
        known.ask("a", broken)


def test_answer_that_is_not_kept_takes_the_one_before_with_it() -> None:
    known = LastKnown(lambda: True)
    known.ask("key", lambda: "good", keeps=bool)
    known.ask("key", lambda: "", keeps=bool)
    with pytest.raises(StorageUnavailable):
        known.ask("key", away)


def test_nothing_that_was_asked_before_a_change_is_told_after_it() -> None:
    known = LastKnown(lambda: True)
    known.ask("key", lambda: "good")
    known.forget()
    with pytest.raises(StorageUnavailable):
        known.ask("key", away)

    def overtaken() -> str:
        known.forget()
        return "good"

    assert known.ask("key", overtaken) == "good"
    with pytest.raises(StorageUnavailable):
        known.ask("key", away)


def test_number_of_answers_is_bounded_and_the_oldest_go() -> None:
    known = LastKnown(lambda: True, max_answers=3)
    for number in range(10):
        known.ask(number, lambda n=number: n)  # type: ignore[misc]
    assert [known.ask(number, away) for number in (7, 8, 9)] == [7, 8, 9]
    with pytest.raises(StorageUnavailable):
        known.ask(6, away)
