"""Who runs next, and with how many tokens: the rules one by one."""

import pytest

from server.engine.row import RowState
from tests.unit.engine.scheduling import (
    Memory,
    end,
    is_finished,
    make_row,
    make_scheduler,
    num_pages_for,
    put_to_work,
    run_to_end,
    serials,
    take,
)

TENANTS = ("a", "b", "c")


def test_tenants_are_admitted_in_turn_whoever_has_more_rows() -> None:
    scheduler = make_scheduler(Memory(), has_express_steps=False)
    for serial, tenant in enumerate("aaaaabb", start=1):
        scheduler.add(make_row(serial, tenant=tenant))
    assert [item.row.request.tenant for item in scheduler.schedule()] == ["a", "b", "a", "b", "a", "a", "a"]


def test_turn_goes_on_where_the_last_step_left_it() -> None:
    memory = Memory()
    scheduler = make_scheduler(memory, max_rows=1, has_express_steps=False)
    for serial, tenant in enumerate("aaabbc", start=1):
        scheduler.add(make_row(serial, tenant=tenant))
    order = []
    for _ in range(6):
        (item,) = scheduler.schedule()
        order.append(item.row.request.tenant)
        end(scheduler, memory, item.row)
    assert order == ["a", "b", "c", "a", "b", "a"]


def test_row_without_room_holds_back_those_behind_it() -> None:
    memory = Memory(num_pages=4)
    scheduler = make_scheduler(memory)
    for serial, num_tokens in ((1, 20), (2, 30), (3, 1)):
        scheduler.add(make_row(serial, num_tokens=num_tokens))
    assert serials(scheduler.schedule()) == [1]
    assert memory.asked == [1, 2], "row 3 was tried although row 2 found no room"
    end(scheduler, memory, scheduler.running[0])
    assert serials(scheduler.schedule()) == [2, 3]


def test_row_whose_prefix_is_not_ready_delays_only_itself_and_keeps_its_place() -> None:
    memory = Memory()
    memory.not_ready = {1}
    scheduler = make_scheduler(memory, max_rows=3)
    for serial in (1, 2, 3, 4):
        scheduler.add(make_row(serial))
    assert serials(scheduler.schedule()) == [2, 3, 4]
    memory.not_ready.clear()
    end(scheduler, memory, scheduler.running[0])
    scheduler.add(make_row(5))
    assert serials(scheduler.schedule())[-1] == 1


def test_rows_behind_as_many_cold_prompts_as_may_be_brought_are_not_tried() -> None:
    memory = Memory()
    memory.not_ready = {1, 2}
    scheduler = make_scheduler(memory, max_cold_prompts=2)
    for serial in (1, 2, 3):
        scheduler.add(make_row(serial))
    assert scheduler.schedule() == []
    assert memory.asked == [1, 2]


def test_long_prompt_is_computed_in_chunks_and_yields_with_the_last() -> None:
    scheduler = make_scheduler(Memory(), prefill_chunk=4)
    scheduler.add(make_row(1, num_tokens=10))
    chunks = []
    for _ in range(4):
        (item,) = scheduler.schedule()
        chunks.append((item.num_tokens, item.yields_token))
        take([item])
    assert chunks == [(4, False), (4, False), (2, True), (1, True)]


def test_decoding_rows_come_before_a_long_prompt_that_runs_longer() -> None:
    memory = Memory()
    scheduler = make_scheduler(memory, max_rows=4, max_step_tokens=8, prefill_chunk=8)
    scheduler.add(make_row(1, num_tokens=100))
    take(scheduler.schedule())
    for serial in (2, 3, 4):
        scheduler.add(make_row(serial, num_tokens=1))
    late = scheduler.schedule()
    assert serials(late) == [1], "the running prompt takes the whole step"
    for row in list(scheduler.waiting):
        scheduler.waiting.remove(row)
        memory.try_admit(row)
        row.state = RowState.RUNNING
        scheduler.running.append(row)
    assert [(item.row.serial, item.num_tokens) for item in scheduler.schedule()] == [(2, 1), (3, 1), (4, 1), (1, 5)]


def test_row_is_admitted_with_what_is_left_of_the_budget() -> None:
    scheduler = make_scheduler(Memory(), max_rows=4, max_step_tokens=10, prefill_chunk=8)
    for serial in (1, 2, 3):
        scheduler.add(make_row(serial, num_tokens=20))
    assert [(item.row.serial, item.num_tokens) for item in scheduler.schedule()] == [(1, 8), (2, 2)]
    assert [row.serial for row in scheduler.waiting] == [3]


def test_budget_that_could_not_hold_every_row_is_refused() -> None:
    with pytest.raises(ValueError, match="max_step_tokens"):
        make_scheduler(Memory(), max_rows=9, max_step_tokens=8)


def test_deterministic_budget_that_could_not_hold_a_chunk_is_refused() -> None:
    with pytest.raises(ValueError, match="prefill_chunk"):
        make_scheduler(Memory(), max_step_tokens=20, prefill_chunk=21, is_deterministic=True)


def test_youngest_row_of_the_heaviest_tenant_gives_way() -> None:
    memory = Memory(num_pages=7)
    scheduler = make_scheduler(memory)
    put_to_work(scheduler, memory, 1, num_tokens=17)
    for serial, tenant in ((2, "b"), (3, "b"), (4, "a")):
        put_to_work(scheduler, memory, serial, tenant=tenant, num_tokens=30)
    scheduled = scheduler.schedule()
    assert memory.preempted == [3], "row 4 is younger, but its tenant holds three pages and the other four"
    assert serials(scheduled) == [1, 2, 4]
    assert scheduler.num_preemptions == 1


def test_row_that_needs_a_page_gives_way_itself_when_it_is_the_choice() -> None:
    memory = Memory(num_pages=3)
    scheduler = make_scheduler(memory)
    put_to_work(scheduler, memory, 1, num_tokens=5)
    chosen = put_to_work(scheduler, memory, 2, num_tokens=33)
    assert serials(scheduler.schedule()) == [1]
    assert memory.preempted == [2]
    assert list(scheduler.waiting) == [chosen]


def test_oldest_row_is_spared_even_if_its_tenant_holds_most() -> None:
    memory = Memory(num_pages=5)
    scheduler = make_scheduler(memory)
    put_to_work(scheduler, memory, 1, tenant="b", num_tokens=65)
    put_to_work(scheduler, memory, 2, num_tokens=5)
    assert serials(scheduler.schedule()) == [1]
    assert memory.preempted == [2]


def test_preempted_row_waits_before_the_younger_ones_of_its_tenant_and_keeps_its_tokens() -> None:
    memory = Memory(num_pages=3)
    scheduler = make_scheduler(memory)
    put_to_work(scheduler, memory, 1, num_tokens=17)
    row = put_to_work(scheduler, memory, 2, num_tokens=30)
    row.token_ids[-3:] = [7, 8, 9]
    for serial in (3, 4):
        scheduler.add(make_row(serial))
    scheduler.schedule()
    assert [waiting.serial for waiting in scheduler.waiting] == [2, 3, 4]
    assert (row.token_ids[-3:], row.num_computed) == ([7, 8, 9], 0)


def test_row_that_was_in_the_step_leaves_it_and_its_budget_goes_to_the_next() -> None:
    memory = Memory(num_pages=4)
    scheduler = make_scheduler(memory, max_rows=3, max_step_tokens=20, prefill_chunk=17)
    put_to_work(scheduler, memory, 2, tenant="b", num_tokens=20)
    for serial, tenant in ((1, "a"), (3, "c")):
        row = put_to_work(scheduler, memory, serial, tenant=tenant, num_tokens=2)
        row.num_computed, row.token_ids = 0, [1] * 40
    scheduled = scheduler.schedule()
    assert memory.preempted == [2], "row 1 needs a second page, and b holds most"
    assert [(item.row.serial, item.num_tokens) for item in scheduled] == [(1, 17), (3, 3)]


def test_nobody_is_admitted_in_a_step_that_preempts() -> None:
    memory = Memory(num_pages=3)
    scheduler = make_scheduler(memory)
    put_to_work(scheduler, memory, 1, num_tokens=17)
    put_to_work(scheduler, memory, 2, num_tokens=30)
    scheduler.add(make_row(3, tenant="b"))
    scheduler.schedule()
    assert (memory.preempted, memory.asked) == ([2], [])
    scheduler.schedule()
    assert memory.asked == [3]


def test_long_row_ends_although_another_tenant_never_stops_sending() -> None:
    """The long row is the only one of the tenant that holds most: were it not spared, it would give way for ever."""
    memory = Memory(num_pages=8, is_hasty=True, first_chunk=16)
    scheduler = make_scheduler(memory, max_rows=4, max_step_tokens=20, prefill_chunk=16)
    long_row = make_row(1, tenant="long", num_tokens=80, num_new=40)
    scheduler.add(long_row)
    for serial in range(2, 400):
        while len(scheduler.waiting) < 4:
            scheduler.add(make_row(serial * 10 + len(scheduler.waiting), tenant="short", num_tokens=20, num_new=12))
        take(scheduler.schedule())
        for row in [row for row in scheduler.running if is_finished(row)]:
            end(scheduler, memory, row)
        if long_row.state is RowState.FINISHED:
            break
    assert long_row.state is RowState.FINISHED
    assert scheduler.num_preemptions > 0, "the test has lost its point"
    assert serial <= 5 + 40, "it computes something in every step"


def test_rows_that_together_need_many_times_the_memory_end_with_few_preemptions() -> None:
    memory = Memory(num_pages=12)
    scheduler = make_scheduler(memory, max_rows=8, max_step_tokens=64, prefill_chunk=32)
    rows = [make_row(serial, tenant=TENANTS[serial % 3], num_tokens=30, num_new=60) for serial in range(1, 31)]
    for row in rows:
        scheduler.add(row)
    num_steps = run_to_end(scheduler, memory, rows, max_steps=30 * 62)
    assert num_steps < 30 * 62 / 1.5, "rows ran no better than one by one"
    # With a page of head-room at admission a row gets at least that far before anyone must give way for it.
    assert scheduler.num_preemptions <= sum(num_pages_for(60) for _ in rows)


def test_two_prompts_that_push_each_other_out_do_not_keep_a_decoding_row_from_its_tokens() -> None:
    memory = Memory(num_pages=7, is_hasty=True, first_chunk=16)
    scheduler = make_scheduler(memory, max_step_tokens=16, prefill_chunk=16, is_deterministic=True)
    decoding = make_row(1, tenant="a", num_tokens=4, num_new=60)
    rivals = [make_row(serial, tenant="b", num_tokens=80, num_new=16) for serial in (2, 3)]
    for row in (decoding, *rivals):
        scheduler.add(row)
    num_steps = run_to_end(scheduler, memory, [decoding, *rivals], max_steps=1000)
    assert num_steps < 400


def test_preempted_row_computes_its_new_tokens_again_one_by_one_when_deterministic() -> None:
    memory = Memory()
    scheduler = make_scheduler(memory, prefill_chunk=8, is_deterministic=True)
    row = make_row(1, num_tokens=10)
    row.token_ids += [2, 2, 2]
    scheduler.add(row)
    steps = []
    while row.num_generated == 3:
        (item,) = scheduler.schedule()
        steps.append((item.num_tokens, item.yields_token))
        take([item])
    assert steps == [(8, False), (2, False), (1, False), (1, False), (1, True)]


def test_chunks_end_at_multiples_from_the_first_token_wherever_a_row_begins() -> None:
    memory = Memory()
    scheduler = make_scheduler(memory, prefill_chunk=8, is_deterministic=True)
    row = put_to_work(scheduler, memory, 1, num_tokens=30)
    row.num_computed = 5
    chunks = []
    while row.num_uncomputed > 1:
        (item,) = scheduler.schedule()
        chunks.append(item.num_tokens)
        take([item])
    assert chunks == [3, 8, 8, 6]


def test_after_a_preemption_nobody_is_admitted_before_the_others_have_decoded_when_deterministic() -> None:
    memory = Memory(num_pages=6)
    scheduler = make_scheduler(memory, is_deterministic=True)
    put_to_work(scheduler, memory, 1, num_tokens=17, num_prompt_tokens=1)
    put_to_work(scheduler, memory, 2, num_tokens=30, num_prompt_tokens=10)
    others = memory.ledger.allocate(99, memory.ledger.num_free)
    assert others is not None
    take(scheduler.schedule())
    assert memory.preempted == [2]
    memory.ledger.release(others, 99)
    steps = []
    for _ in range(3):
        scheduled = scheduler.schedule()
        steps.append(serials(scheduled))
        take(scheduled)
    assert steps == [[1], [2], [1, 2]]


def test_preempted_row_runs_again_when_those_that_pushed_it_out_are_gone() -> None:
    memory = Memory(num_pages=3)
    scheduler = make_scheduler(memory, is_deterministic=True)
    put_to_work(scheduler, memory, 1, num_tokens=17, num_prompt_tokens=1)
    put_to_work(scheduler, memory, 2, num_tokens=30, num_prompt_tokens=10)
    assert serials(scheduler.schedule()) == [1]
    assert memory.preempted == [2]
    end(scheduler, memory, scheduler.running[0])
    assert serials(scheduler.schedule()) == [2]


def test_oldest_prompt_comes_first_although_it_was_admitted_later() -> None:
    memory = Memory()
    scheduler = make_scheduler(memory, max_step_tokens=10, prefill_chunk=10)
    for serial in (2, 1):
        put_to_work(scheduler, memory, serial, num_tokens=40).num_computed = 0
    assert serials(scheduler.schedule()) == [1]


def test_row_alone_for_which_there_is_no_room_is_a_broken_guarantee() -> None:
    memory = Memory(num_pages=2)
    scheduler = make_scheduler(memory)
    scheduler.add(make_row(1, num_tokens=40))
    with pytest.raises(RuntimeError, match="nothing runs"):
        scheduler.schedule()
    scheduler.remove(next(iter(scheduler.waiting)))
    put_to_work(scheduler, memory, 2, num_tokens=33)
    with pytest.raises(RuntimeError, match="alone"):
        scheduler.schedule()


def test_all_rows_are_forgotten_when_the_engine_has_ended() -> None:
    memory = Memory(num_pages=4)
    scheduler = make_scheduler(memory)
    rows = [make_row(serial, num_tokens=20) for serial in (1, 2)]
    for row in rows:
        scheduler.add(row)
    scheduler.schedule()
    scheduler.clear()
    assert [row.state for row in rows] == [RowState.FINISHED] * 2
    assert (scheduler.running, list(scheduler.waiting)) == ([], [])


@pytest.mark.parametrize("damage", ["twice", "too many", "no pages", "wrong state", "waiting with pages"])
def test_invariants_notice_damage(damage: str) -> None:
    memory = Memory()
    scheduler = make_scheduler(memory, max_rows=2, max_step_tokens=2)
    for serial in (1, 2, 3):
        scheduler.add(make_row(serial))
    scheduler.schedule()
    scheduler.check_invariants()
    if damage == "twice":
        scheduler.running[1] = scheduler.running[0]
    elif damage == "too many":
        extra = make_row(9)
        memory.try_admit(extra)
        extra.state = RowState.RUNNING
        scheduler.running.append(extra)
    elif damage == "no pages":
        scheduler.running[0].pages = None
    elif damage == "wrong state":
        scheduler.running[0].state = RowState.WAITING
    else:
        memory.try_admit(next(iter(scheduler.waiting)))
    with pytest.raises(RuntimeError):
        scheduler.check_invariants()
