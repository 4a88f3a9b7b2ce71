"""Room for prefixes is given in the order of asking, nothing is read or kept in vain, and no fault takes pages away."""

import pytest
import torch

from server.engine.backbone import Backbone
from server.engine.kv import StackedColumns
from server.engine.prefix import Prefix
from server.engine.request import PromptRef
from server.engine.residency import MAX_LOADING
from server.errors import UnavailableError
from tests.unit.engine.prompts import make_prompt
from tests.unit.engine.residency_bench import Bench


def held(bench: Bench, ref: PromptRef) -> Prefix:
    bench.bring(ref)
    prefix = bench.residency.acquire(ref)
    assert prefix is not None
    return prefix


def turn(bench: Bench, limit_s: float = 60.0) -> None:
    assert bench.arrive() == []
    assert bench.residency.compile_wanted(limit_s) == []


# --- the first without room is owed it ------------------------------------------------------------------------------


def test_prompts_behind_one_without_room_are_not_made_before_it(llama: Backbone) -> None:
    bench = Bench(llama, prefix_pages=4)
    first = bench.add("a", k=32)
    prefix = held(bench, first)
    large, small = bench.add("b", k=48), bench.add("c", k=16)
    for ref in (large, small):
        bench.residency.bring(ref)
    for _ in range(3):
        turn(bench)
        assert bench.where(first, large, small) == ["device", "host", "host"], "there is room for the small one alone"
    bench.residency.device.release(prefix)
    turn(bench)
    assert bench.where(first, large, small) == ["host", "device", "device"]
    assert bench.residency.num_wanted == 0


def test_prompt_owed_room_gets_it_however_many_rows_ask_for_those_in_its_way(llama: Backbone) -> None:
    """Each of two prompts always has a row that began before the last one ended."""
    bench = Bench(llama, prefix_pages=4)
    busy = [bench.add(key, k=32) for key in "ab"]
    rows = [held(bench, ref) for ref in busy]
    large = bench.add("large", k=64)
    bench.residency.bring(large)
    num_turns = 0
    while bench.where(large) != ["device"] and num_turns < 20:
        num_turns += 1
        turn(bench)
        # New rows come first, then an old one ends.
        rows += [prefix for ref in busy if (prefix := bench.residency.acquire(ref)) is not None]
        if rows:
            bench.residency.device.release(rows.pop(0))
    assert num_turns <= 3, "those that were running had to end, and no others"


def test_prompts_that_are_not_in_the_way_take_new_rows_meanwhile(llama: Backbone) -> None:
    bench = Bench(llama, prefix_pages=4)
    in_the_way, other = bench.add("a", k=32), bench.add("b", k=32)
    prefix = held(bench, in_the_way)
    held(bench, other)
    large = bench.add("large", k=32)
    bench.residency.bring(large)
    turn(bench)
    assert bench.residency.acquire(in_the_way) is None
    assert bench.residency.acquire(other) is not None
    bench.residency.device.release(prefix)
    turn(bench)
    assert bench.where(in_the_way, other, large) == ["host", "device", "device"]
    assert bench.residency.acquire(large) is not None


def test_prompts_take_rows_again_when_nobody_waits_for_the_one_in_whose_way_they_were(llama: Backbone) -> None:
    bench = Bench(llama, prefix_pages=2)
    ref, other = bench.add("a", k=32), bench.add("b", k=32)
    held(bench, ref)
    bench.residency.bring(other)
    turn(bench)
    assert bench.residency.acquire(ref) is None
    bench.residency.keep_wanted(frozenset())
    assert bench.residency.acquire(ref) is not None


def test_prompts_made_in_one_turn_do_not_push_each_other_out_before_their_rows_can_take_them(llama: Backbone) -> None:
    bench = Bench(llama, prefix_pages=2)
    refs = [bench.add(key, k=16) for key in "abcd"]
    for ref in refs:
        bench.residency.bring(ref)
    turn(bench)
    assert bench.where(*refs) == ["device", "device", "host", "host"]
    assert bench.residency.acquire(refs[0]) is not None, "the third is not owed room yet"
    turn(bench)
    assert bench.where(*refs) == ["device", "host", "device", "host"]


# --- nothing in vain ------------------------------------------------------------------------------------------------


def test_prompt_for_which_nobody_waits_any_more_is_not_made_unless_it_is_pinned(llama: Backbone) -> None:
    bench = Bench(llama)
    cancelled, waited_for, pinned = (bench.add(key) for key in "abc")
    bench.residency.pin([pinned])
    for ref in (cancelled, waited_for):
        bench.residency.bring(ref)
    bench.arrive()
    bench.residency.keep_wanted({waited_for.prefix_key})
    assert bench.residency.compile_wanted(60.0) == []
    assert bench.where(cancelled, waited_for, pinned) == ["host", "device", "device"]


def test_prompts_are_brought_ahead_only_so_many(llama: Backbone) -> None:
    bench = Bench(llama)
    for i in range(500):
        bench.residency.prefetch(bench.add(f"{i}"))
    assert bench.residency.num_wanted == 2 * 64
    bench.arrive()
    assert len(bench.loads) == MAX_LOADING


def test_numbers_of_prompts_that_wait_for_room_are_held_by_the_host_tier_alone(llama: Backbone) -> None:
    bench = Bench(llama, prefix_pages=40)
    refs = [bench.add(f"{i}", k=16) for i in range(40)]
    room_for_two = 2 * make_prompt(llama, refs[0], seed=0).values.nbytes
    bench.residency.host._max_bytes = room_for_two
    for ref in refs:
        bench.residency.bring(ref)
    for _ in range(40):
        turn(bench)
        assert bench.residency.host.num_bytes <= room_for_two
    assert bench.where(*refs) == ["device"] * 40


def test_prompt_that_is_owed_room_is_read_again_when_the_host_tier_has_lost_it(llama: Backbone) -> None:
    bench = Bench(llama, prefix_pages=2)
    first, owed = bench.add("a", k=32), bench.add("b", k=32)
    prefix = held(bench, first)
    bench.bring(owed)
    bench.residency.host.discard(owed.prefix_key)
    bench.residency.device.release(prefix)
    turn(bench)
    turn(bench)
    assert bench.where(owed) == ["device"]
    assert bench.loads == [first.prefix_key, owed.prefix_key, owed.prefix_key]


# --- faults ---------------------------------------------------------------------------------------------------------


def test_device_without_memory_for_one_prompt_fails_that_one_and_the_others_are_made(
    llama: Backbone, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench(llama)
    large, small = bench.add("large", k=40), bench.add("small", k=16)
    forward = llama.forward

    def fail_when_large(pool: object, plan: object) -> torch.Tensor:
        if plan.num_tokens == 40:  # type: ignore[attr-defined]
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(pool, plan)  # type: ignore[arg-type]

    monkeypatch.setattr(llama, "forward", fail_when_large)
    for ref in (large, small):
        bench.residency.bring(ref)
    bench.arrive()
    ((failed, error),) = bench.residency.compile_wanted(60.0)
    assert failed is large
    assert isinstance(error, UnavailableError)
    assert "task-large@1 could not be compiled" in caplog.text
    assert bench.where(large, small) == ["host", "device"]
    bench.residency.evict(small.prefix_key)
    bench.assert_nothing_is_left()


def test_tail_that_cannot_be_copied_leaves_no_pages_behind(llama: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: StackedColumns) -> StackedColumns:
        raise torch.OutOfMemoryError("CUDA out of memory")

    bench = Bench(llama)
    ref = bench.add("a", k=20)
    monkeypatch.setattr(StackedColumns, "clone", fail)
    with pytest.raises(UnavailableError, match="out of memory"):
        bench.compile(ref, make_prompt(llama, ref, seed=0))
    bench.assert_nothing_is_left()
