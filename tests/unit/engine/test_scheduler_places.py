"""Whose rows get a place before it is their turn, who gives way for them, and what that costs the others."""

import pytest

from tests.unit.engine.scheduling import (
    Memory,
    end,
    is_finished,
    make_row,
    make_scheduler,
    put_to_work,
    serials,
    take,
)


def test_another_tenant_gets_its_first_token_in_a_step_of_its_own_although_the_batch_is_full() -> None:
    memory = Memory()
    scheduler = make_scheduler(memory, max_rows=4)
    for serial in range(1, 20):
        scheduler.add(make_row(serial, tenant="flood"))
    take(scheduler.schedule())
    scheduler.add(make_row(20, tenant="calm", num_tokens=30))
    assert serials(scheduler.schedule()) == [20]
    assert memory.preempted == [4], "the youngest row of the tenant that runs most"


def test_between_two_express_steps_all_rows_take_part() -> None:
    memory = Memory()
    scheduler = make_scheduler(memory, max_rows=4)
    for serial in range(1, 20):
        scheduler.add(make_row(serial, tenant="flood"))
    take(scheduler.schedule())
    steps = []
    for serial in (20, 21, 22):
        scheduler.add(make_row(serial, tenant=f"calm{serial}"))
        scheduled = scheduler.schedule()
        steps.append(serials(scheduled))
        take(scheduled)
    assert steps[0] == [20]
    assert {1, 2, 3} <= set(steps[1]), "the second of them waits for an ordinary step"
    assert 21 in steps[2]
    assert 1 not in steps[2]


def test_tenants_that_both_flood_leave_each_other_in_the_step() -> None:
    memory = Memory()
    scheduler = make_scheduler(memory, max_rows=4)
    for serial in range(1, 20):
        scheduler.add(make_row(serial, tenant="ab"[serial % 2]))
    take(scheduler.schedule())
    for _ in range(10):
        scheduled = scheduler.schedule()
        assert len(scheduled) == 4
        take(scheduled)
    assert memory.preempted == []


def test_flood_of_one_tenant_alone_is_left_in_peace() -> None:
    memory = Memory()
    scheduler = make_scheduler(memory, max_rows=4)
    for serial in range(1, 20):
        scheduler.add(make_row(serial))
    for _ in range(10):
        scheduled = scheduler.schedule()
        assert serials(scheduled) == [1, 2, 3, 4]
        take(scheduled)


def test_nobody_gives_way_for_a_row_whose_prefix_is_not_ready() -> None:
    memory = Memory()
    scheduler = make_scheduler(memory, max_rows=2)
    for serial in (1, 2, 3):
        scheduler.add(make_row(serial, tenant="flood"))
    take(scheduler.schedule())
    scheduler.add(make_row(4, tenant="calm"))
    memory.not_ready = {4}
    take(scheduler.schedule())
    assert memory.preempted == []


def test_rows_that_came_in_vain_push_nobody_out_a_second_time() -> None:
    """Its tenant is far behind, so those that gave way come back before it; and it finds no room then either."""
    memory = Memory(num_pages=40)
    scheduler = make_scheduler(memory, max_rows=8, max_step_tokens=600, prefill_chunk=300)
    scheduler.add(make_row(1, tenant="long", num_tokens=16 * 20 - 5, num_new=200))
    for serial in range(2, 8):
        scheduler.add(make_row(serial, tenant="many", num_tokens=20, num_new=100))
    for _ in range(3):
        take(scheduler.schedule())
    assert len(scheduler.running) == 7
    scheduler.waiting.add(make_row(19, tenant="late"))
    scheduler.waiting.charge("late", 5000)
    scheduler.waiting.remove(next(row for row in scheduler.waiting if row.serial == 19))
    scheduler.add(make_row(20, tenant="late", num_tokens=16 * 25))
    take(scheduler.schedule())
    assert memory.preempted == [7, 6, 5, 4, 3]
    assert [row.serial for row in scheduler.running] == [1, 2], "no row comes back in the step that sent it back"
    for _ in range(20):
        take(scheduler.schedule())
    assert memory.preempted == [7, 6, 5, 4, 3]
    assert sorted(row.serial for row in scheduler.running) == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("has_express_steps", [True, False])
def test_tenant_with_one_short_row_after_another_takes_the_place_that_the_first_was_given(
    has_express_steps: bool,
) -> None:
    memory = Memory()
    scheduler = make_scheduler(memory, max_rows=4, has_express_steps=has_express_steps)
    for serial in range(1, 20):
        scheduler.add(make_row(serial, tenant="flood", num_new=1000))
    take(scheduler.schedule())
    for serial in range(20, 40):
        row = make_row(serial, tenant="calm", num_new=1)
        scheduler.add(row)
        for _ in range(3):
            take(scheduler.schedule())
            if is_finished(row):
                break
        end(scheduler, memory, row)
        assert is_finished(row)
    assert memory.preempted == [4]


def test_tenant_with_a_backlog_of_rows_of_one_token_leaves_others_in_the_step() -> None:
    memory = Memory()
    scheduler = make_scheduler(memory, max_rows=4)
    for serial in range(1, 100):
        scheduler.add(make_row(serial, tenant="long" if serial < 20 else "brief", num_new=1000 if serial < 20 else 1))
    num_tokens = {"long": 0, "brief": 0}
    for _ in range(20):
        scheduled = scheduler.schedule()
        for item in scheduled:
            num_tokens[item.row.request.tenant] += item.num_tokens
        assert any(item.row.request.tenant == "long" for item in scheduled)
        take(scheduled)
        for item in scheduled:
            if is_finished(item.row):
                end(scheduler, memory, item.row)
    assert num_tokens["brief"] >= 10
    assert len(memory.preempted) <= 1


def test_without_express_steps_an_entitled_row_goes_first_and_all_take_part() -> None:
    memory = Memory()
    scheduler = make_scheduler(memory, max_rows=8, max_step_tokens=200, prefill_chunk=100, has_express_steps=False)
    for serial in range(1, 40):
        scheduler.add(make_row(serial, tenant="flood", num_tokens=90))
    for _ in range(5):
        take(scheduler.schedule())
    assert len(scheduler.running) == 8
    scheduler.add(make_row(50, tenant="calm", num_tokens=60))
    scheduled = scheduler.schedule()
    assert serials(scheduled) == [50, 1, 2, 3, 4, 5, 6, 7]
    assert memory.preempted == [8]
    take(scheduled)
    for _ in range(20):
        scheduled = scheduler.schedule()
        assert len(scheduled) == 8, "nobody is left out, and no step is kept short"
        take(scheduled)


def test_a_token_is_left_for_every_running_row_when_an_entitled_one_goes_first() -> None:
    scheduler = make_scheduler(Memory(), max_rows=4, max_step_tokens=4, prefill_chunk=50, has_express_steps=False)
    for serial in range(1, 9):
        scheduler.add(make_row(serial, tenant="flood"))
    take(scheduler.schedule())
    scheduler.add(make_row(50, tenant="calm", num_tokens=60))
    scheduled = scheduler.schedule()
    assert {item.row.serial: item.num_tokens for item in scheduled} == {50: 1, 1: 1, 2: 1, 3: 1}


def test_row_that_is_sent_back_from_the_place_it_was_given_pushes_nobody_out_again() -> None:
    memory = Memory(num_pages=6, is_hasty=True, first_chunk=33)
    scheduler = make_scheduler(memory, max_rows=3, has_express_steps=False)
    for serial in (1, 2, 3):
        put_to_work(scheduler, memory, serial, num_tokens=17)
    scheduler.add(make_row(50, tenant="calm", num_tokens=33))
    take(scheduler.schedule())
    assert memory.preempted == [3, 50], "pages are short for the second row, and the new one holds most"
    take(scheduler.schedule())
    assert memory.preempted == [3, 50]
    assert [row.serial for row in scheduler.running] == [1, 2]


def test_express_step_has_all_rows_of_the_tenant_for_which_it_is_made() -> None:
    scheduler = make_scheduler(Memory(), max_rows=6)
    for serial in range(1, 20):
        scheduler.add(make_row(serial, tenant="flood"))
    take(scheduler.schedule())
    for serial, express in ((20, [20]), (21, [21, 20])):
        scheduler.add(make_row(serial, tenant="calm"))
        scheduled = scheduler.schedule()
        assert serials(scheduled) == express
        take(scheduled)
        take(scheduler.schedule())


def test_row_that_went_first_is_taken_into_the_step_once() -> None:
    scheduler = make_scheduler(Memory(), max_rows=2, max_step_tokens=70, has_express_steps=False)
    for serial in (1, 2, 3):
        scheduler.add(make_row(serial, tenant="flood"))
    take(scheduler.schedule())
    scheduler.add(make_row(50, tenant="calm", num_tokens=40))
    assert {item.row.serial: item.num_tokens for item in scheduler.schedule()} == {50: 40, 1: 1}


def test_kept_place_holds_nobody_back_when_the_flood_is_over() -> None:
    memory = Memory()
    scheduler = make_scheduler(memory, max_rows=2)
    for serial in (1, 2):
        scheduler.add(make_row(serial, tenant="flood"))
    take(scheduler.schedule())
    scheduler.add(make_row(20, tenant="calm", num_new=1))
    take(scheduler.schedule())
    assert memory.preempted == [2]
    for row in [*scheduler.running, *scheduler.waiting]:
        end(scheduler, memory, row)
    for serial in (30, 31):
        scheduler.add(make_row(serial, tenant="other"))
    assert len(scheduler.schedule()) == 2


def test_nobody_is_left_out_for_a_first_token_for_which_there_is_no_room() -> None:
    memory = Memory(num_pages=7)
    scheduler = make_scheduler(memory)
    for serial in range(1, 6):
        put_to_work(scheduler, memory, serial, tenant="flood", num_tokens=5)
    put_to_work(scheduler, memory, 20, tenant="calm", num_tokens=5, num_prompt_tokens=1)
    put_to_work(scheduler, memory, 21, tenant="calm", num_tokens=17)
    assert sorted(serials(scheduler.schedule())) == [1, 2, 3, 4, 20, 21]
    assert memory.preempted == [5]
