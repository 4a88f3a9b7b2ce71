"""What a tenant with a thousand queued requests costs another, and is left with itself, on simulated machines."""

import functools
import math

import pytest

from server.engine.caution import CALM_A_SECOND, CALM_S
from server.engine.scheduler import StepForm
from tests.unit.engine.scheduling import Memory, end, is_finished, make_row, make_scheduler, put_to_work, serials, take
from tests.unit.engine.simulation import Client, Cost, Simulation, percentile

GOAL = 2.0
LEAST_SHARE = 0.35
NUM_ANSWERS = 100

# Two cores: compiled and eager steps of a small model, eager steps of a large one.
COMPILED = Cost(base_s=0.0068, per_row_s=0.00039, per_token_s=0.00011)
EAGER = Cost(base_s=0.020, per_row_s=0.00095, per_token_s=0.00017)
LARGE = Cost(base_s=0.5, per_row_s=0.01, per_token_s=0.008)
# A device on which a step takes about as long whatever is in it.
WIDE = Cost(base_s=0.008, per_row_s=0.00001, per_token_s=0.00001)

CHATS, DOCUMENTS, LABELS = (64, 64), (1000, 16), (2, 1)
"""Floods: client tokens and new tokens of a request."""


@functools.cache
def tokens_a_second_alone(cost: Cost, flood: tuple[int, int]) -> float:
    simulation, client = Simulation(cost), Client("flood", *flood, num_requests=1000)
    simulation.add(client)
    simulation.run_for(60 * cost.of(64, 128))
    before, since_s = client.num_tokens_made, simulation.now_s
    simulation.run_for(120 * cost.of(64, 128))
    return (client.num_tokens_made - before) / (simulation.now_s - since_s)


@pytest.mark.parametrize(
    ("cost", "calm", "flood"),
    [
        (COMPILED, (64, 16), CHATS),
        (EAGER, (64, 16), CHATS),
        (LARGE, (64, 16), CHATS),
        (COMPILED, (600, 8), CHATS),
        (COMPILED, (30, 40), DOCUMENTS),
        (EAGER, (64, 16), LABELS),
    ],
)
def test_tenant_that_sends_one_request_at_a_time_waits_at_most_twice_as_long_beside_a_thousand_queued(
    cost: Cost, calm: tuple[int, int], flood: tuple[int, int]
) -> None:
    alone, beside = Client("calm", *calm, think_s=0.02), Client("calm", *calm, think_s=0.02)
    simulation = Simulation(cost)
    simulation.add(alone)
    simulation.run(alone, NUM_ANSWERS)

    simulation = Simulation(cost)
    simulation.add(beside)
    simulation.run(beside, 20)
    other = Client("flood", *flood, num_requests=1000)
    simulation.add(other)
    simulation.run(beside, 20)  # while they come it is learned how long steps with many rows take
    beside.first_s.clear()
    beside.whole_s.clear()
    before, since_s = other.num_tokens_made, simulation.now_s
    simulation.run(beside, NUM_ANSWERS)
    for percent in (50, 99):
        assert percentile(beside.first_s, percent) <= GOAL * percentile(alone.first_s, percent)
        assert percentile(beside.whole_s, percent) <= GOAL * percentile(alone.whole_s, percent)
    speed = (other.num_tokens_made - before) / (simulation.now_s - since_s)
    assert speed >= LEAST_SHARE * tokens_a_second_alone(cost, flood)
    assert simulation.max_left_out < 64
    simulation.scheduler.check_invariants()


def test_first_request_after_a_pause_does_not_wait_for_what_came_meanwhile() -> None:
    simulation, calm = Simulation(EAGER), Client("calm", 64, 16)
    simulation.add(Client("flood", *CHATS, num_requests=1000))
    simulation.add(calm)
    simulation.run(calm, 20)
    alone_s = EAGER.of(1, 64)
    calm.think_s = 0.9 * CALM_S
    simulation.run(calm, 1)
    calm.first_s.clear()
    simulation.run(calm, 20)
    assert max(calm.first_s) <= GOAL * alone_s * 1.05


def test_flood_has_whole_steps_again_some_seconds_after_the_last_request_of_others() -> None:
    simulation, calm = Simulation(COMPILED), Client("calm", 64, 16)
    flood = Client("flood", *CHATS, num_requests=1000)
    simulation.add(flood)
    simulation.add(calm)
    simulation.run(calm, 20)
    simulation.drop(calm)
    simulation.run_for(CALM_S + 3)
    simulation.forms.clear()
    before, since_s = flood.num_tokens_made, simulation.now_s
    simulation.run_for(5.0)
    assert set(simulation.forms) == {StepForm.FULL}
    speed = (flood.num_tokens_made - before) / (simulation.now_s - since_s)
    assert speed >= 0.95 * tokens_a_second_alone(COMPILED, CHATS)


@pytest.mark.parametrize("cost", [COMPILED, EAGER])
def test_tenant_that_sends_a_token_now_and_then_does_not_keep_the_steps_of_others_short(cost: Cost) -> None:
    simulation, flood = Simulation(cost), Client("flood", *CHATS, num_requests=1000)
    simulation.add(flood)
    simulation.run_for(60 * cost.of(64, 128))
    before, since_s = flood.num_tokens_made, simulation.now_s
    for _ in range(5):
        rare = Client("rare", 1, 1, think_s=math.inf)
        simulation.add(rare)
        simulation.run(rare, 1)
        simulation.run_for(0.9 * CALM_S)
    speed = (flood.num_tokens_made - before) / (simulation.now_s - since_s)
    assert speed >= 0.9 * tokens_a_second_alone(cost, CHATS)


def test_nobody_is_left_out_where_a_step_takes_as_long_whatever_is_in_it() -> None:
    simulation, calm = Simulation(WIDE), Client("calm", 64, 16, think_s=0.02)
    flood = Client("flood", *CHATS, num_requests=1000)
    simulation.add(flood)
    simulation.add(calm)
    simulation.run(calm, 20)
    before, since_s = flood.num_tokens_made, simulation.now_s
    simulation.run(calm, 40)
    assert simulation.max_left_out <= 1
    assert (flood.num_tokens_made - before) / (simulation.now_s - since_s) >= 0.9 * tokens_a_second_alone(WIDE, CHATS)


def test_flood_of_one_tenant_alone_is_scheduled_as_if_there_were_no_fairness_at_all() -> None:
    """It was small itself until it sent more: that limits nothing either."""
    runs = []
    for has_express_steps in (True, False):
        memory = Memory(num_pages=2000)
        scheduler = make_scheduler(memory, max_rows=16, has_express_steps=has_express_steps)
        for serial in range(1, 5):
            scheduler.add(make_row(serial, num_tokens=40, num_new=10))
        plans = []
        for number in range(200):
            if number == 5:
                for serial in range(5, 200):
                    scheduler.add(make_row(serial, num_tokens=serial % 90 + 1, num_new=serial % 13 + 1))
            scheduled = scheduler.schedule()
            plans.append([(item.row.serial, item.num_tokens) for item in scheduled])
            num_tokens = sum(item.num_tokens for item in scheduled)
            scheduler.step_times.add(len(scheduled), num_tokens, COMPILED.of(len(scheduled), num_tokens))
            take(scheduled)
            for row in [row for row in scheduler.running if is_finished(row)]:
                end(scheduler, memory, row)
        runs.append(plans)
    assert runs[0] == runs[1]


@pytest.mark.parametrize("per_row_s", [0.4, 5.0], ids=["time for two", "time for none"])
def test_row_that_has_been_left_out_for_longest_comes_first_and_the_oldest_always(per_row_s: float) -> None:
    memory = Memory()
    scheduler = make_scheduler(memory, max_rows=9)
    for serial in range(1, 9):
        scheduler.add(make_row(serial, tenant="flood"))
    cost = Cost(base_s=1.0, per_row_s=per_row_s, per_token_s=per_row_s)
    for num_rows in (1, 2, 4, 8) * 10:
        scheduler.step_times.add(num_rows, num_rows, cost.of(num_rows, num_rows))
    take(scheduler.schedule())
    scheduler.add(make_row(50, tenant="calm"))
    scheduler.add(make_row(20, tenant="flood"))
    steps = []
    for _ in range(6):
        scheduled = scheduler.schedule()
        steps.append(serials(scheduled))
        take(scheduled)
    assert steps[0] == [50], "the first token comes in an express step"
    assert steps[1:] == [[50, 1, 2], [50, 1, 3], [50, 1, 4], [50, 1, 5], [50, 1, 6]]


def test_tenant_is_expected_back_the_longer_the_more_rows_of_it_were_in_a_step() -> None:
    now_s = 0.0
    memory = Memory()
    scheduler = make_scheduler(memory, max_rows=8, clock=lambda: now_s)
    cost = Cost(base_s=0.001, per_row_s=0.1, per_token_s=0.1)
    for num_rows in (1, 2, 4, 8) * 10:
        scheduler.step_times.add(num_rows, num_rows, cost.of(num_rows, num_rows))
    for serial in range(1, 21):
        scheduler.add(make_row(serial, tenant="flood"))
    calm = [make_row(serial, tenant="calm") for serial in (50, 51)]
    for row in calm:
        scheduler.add(row)
    assert serials(scheduler.schedule()) == [50, 51]
    for row in calm:
        end(scheduler, memory, row)
    forms = []
    for part in (0.9, 1.1):
        now_s = part * CALM_A_SECOND * cost.of(2, 2)
        take(scheduler.schedule())
        forms.append(scheduler.form)
    assert forms == [StepForm.LIMITED, StepForm.FULL]


def test_long_prompt_of_the_oldest_row_leaves_the_others_their_turns() -> None:
    memory = Memory()
    scheduler = make_scheduler(memory, max_rows=8, max_step_tokens=400, prefill_chunk=100)
    cost = Cost(base_s=1.0, per_row_s=0.1, per_token_s=0.02)
    for shape in [(1, 1), (1, 60), (8, 8), (8, 60)] * 10:
        scheduler.step_times.add(*shape, cost.of(*shape))
    scheduler.add(make_row(1, tenant="flood", num_tokens=3000))
    take(scheduler.schedule())
    for serial in range(2, 8):
        scheduler.add(make_row(serial, tenant="flood"))
    take(scheduler.schedule())
    scheduler.add(make_row(50, tenant="calm"))
    take(scheduler.schedule())
    for _ in range(10):
        scheduled = scheduler.schedule()
        tokens_of = {item.row.serial: item.num_tokens for item in scheduled}
        assert 16 <= tokens_of[1] < 50
        assert len(tokens_of) >= 5
        take(scheduled)


def test_prompts_leave_a_token_of_a_short_step_to_every_row_that_decodes() -> None:
    memory = Memory()
    scheduler = make_scheduler(memory, max_rows=8, max_step_tokens=12, prefill_chunk=10)
    for num_rows, num_tokens in [(1, 1), (1, 10), (8, 8), (8, 12)] * 10:
        scheduler.step_times.add(num_rows, num_tokens, 1 + 0.001 * num_tokens)
    put_to_work(scheduler, memory, 1, tenant="flood", num_tokens=60).num_computed = 0
    for serial in range(2, 6):
        put_to_work(scheduler, memory, serial, tenant="flood", num_tokens=4, num_prompt_tokens=1)
    put_to_work(scheduler, memory, 50, tenant="calm", num_tokens=90).num_computed = 0
    for _ in range(3):
        scheduled = scheduler.schedule()
        tokens_of = {item.row.serial: item.num_tokens for item in scheduled}
        assert {1, 2, 3, 4, 5, 50} <= tokens_of.keys()
        assert sum(tokens_of.values()) == 12
        take(scheduled)


def test_row_gets_on_in_the_deterministic_mode_however_many_short_ones_come() -> None:
    memory = Memory()
    scheduler = make_scheduler(memory, is_deterministic=True, has_express_steps=False)
    rows = [make_row(serial, tenant="calm", num_new=20) for serial in (1, 2)]
    for row in rows:
        scheduler.add(row)
    for serial in range(3, 1000):
        scheduler.add(make_row(serial, tenant="flood", num_new=1))
    for _ in range(4 * 20 + 8):
        take(scheduler.schedule())
        for row in [row for row in scheduler.running if is_finished(row)]:
            end(scheduler, memory, row)
    assert [row.num_generated for row in rows] == [20, 20]


def test_batch_fills_in_the_deterministic_mode_before_its_rows_decode() -> None:
    memory = Memory()
    scheduler = make_scheduler(memory, is_deterministic=True, has_express_steps=False)
    for serial in range(1, 20):
        scheduler.add(make_row(serial))
    shapes = []
    for _ in range(9):
        scheduled = scheduler.schedule()
        shapes.append(len(scheduled))
        take(scheduled)
    assert shapes == [1] * 8 + [8]
