"""A row that finds no room is asked for again at every step: that costs little, and never keeps it waiting in vain."""

from typing import Any

import pytest

from server.engine.kv import num_pages_for
from tests.unit.engine.row_memory_bench import Bench, text


def count_matches(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    calls: list[object] = []
    match = bench.memory.texts.match

    def spy(*args: Any, **kwargs: Any) -> object:
        calls.append(args)
        return match(*args, **kwargs)

    monkeypatch.setattr(bench.memory.texts, "match", spy)
    return calls


def test_text_of_a_row_without_room_is_matched_once_until_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(row_pages=6)
    first, second = bench.admitted(text(30, first=50)), bench.admitted(text(20, first=70))
    row = bench.row(text(40))
    matches = count_matches(bench, monkeypatch)
    for _ in range(5):
        assert not bench.try_admit(row)
    assert len(matches) == 1
    bench.memory.release(first)
    assert bench.try_admit(row), "three pages and one of head-room"
    assert len(matches) == 2
    bench.memory.release(second)
    bench.check()


def test_row_without_room_is_admitted_once_another_has_left_its_beginning() -> None:
    bench = Bench(row_pages=6)
    first, second = bench.admitted(text(33)), bench.admitted(text(20, first=70))
    row = bench.row(text(40))
    assert not bench.try_admit(row)
    assert not bench.try_admit(row)
    bench.compute(first)
    bench.memory.keep_text(first)
    assert bench.pool.num_free_row_pages == 1
    bench.memory.release(second)
    assert bench.try_admit(row), "it needs one page of its own and one of head-room"
    assert row.num_cached == 32
    bench.check()


def test_row_without_room_is_admitted_when_it_is_alone() -> None:
    bench = Bench(row_pages=3)
    other = bench.admitted(text(1, first=50))
    row = bench.row(text(48))
    assert not bench.try_admit(row)
    bench.memory.release(other)
    assert bench.try_admit(row), "alone, it needs no head-room"


def test_row_that_reserves_all_needs_no_head_room() -> None:
    bench = Bench(row_pages=4, reserves_all=True)
    bench.admitted(text(8), max_tokens=8)
    row = bench.admitted(text(40), max_tokens=8)
    assert row.num_pages == num_pages_for(48)
    assert bench.pool.num_free_row_pages == 0
