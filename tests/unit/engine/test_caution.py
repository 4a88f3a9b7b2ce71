"""How much of a step large tenants may have while a small one is about."""

import math

import pytest

from server.engine.caution import CALM_A_SECOND, CALM_S, LEAST_PART, MAX_CALM, PART_OF_OTHERS, Caution
from server.engine.shares import Shares
from server.engine.step_times import StepTimes
from server.engine.waiting import WaitingRows
from tests.unit.engine.scheduling import make_row
from tests.unit.engine.simulation import Cost
from tests.unit.engine.test_step_times import SHAPES, taught

OWN_S = CALM_S / CALM_A_SECOND
COST = Cost(base_s=1.0, per_row_s=0.1, per_token_s=0.02)


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def make_shares(running: str, waiting: str = "") -> Shares:
    """A letter is a row's tenant; there are eight places."""
    rows = [make_row(serial, tenant=tenant) for serial, tenant in enumerate(running + waiting, start=1)]
    queue = WaitingRows()
    for row in rows[len(running) :]:
        queue.add(row)
    return Shares(rows[: len(running)], queue, 8, set(running))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def caution(clock: Clock) -> Caution:
    times = StepTimes()
    for shape in SHAPES * 20:
        times.add(*shape, COST.of(*shape))
    return Caution(times, clock)


def test_nothing_is_limited_while_no_small_tenant_is_about(caution: Caution) -> None:
    assert caution.seconds_for_others(make_shares("aaaaaaa"), 0, 0) == math.inf


def test_nothing_is_limited_before_it_is_known_how_long_steps_take(clock: Clock) -> None:
    caution = Caution(taught(COST, SHAPES, 3), clock)
    caution.saw("calm", 30, OWN_S)
    assert caution.seconds_for_others(make_shares("aaaaaaab"), 1, 1) == math.inf


def test_others_add_less_to_a_step_than_the_small_tenants_take_by_themselves(caution: Caution) -> None:
    seconds = caution.seconds_for_others(make_shares("aaaaaaab"), 2, 40)
    assert seconds == pytest.approx(PART_OF_OTHERS * COST.of(2, 40), rel=0.01)


def test_step_under_way_ends_sooner_than_the_first_step_of_who_may_come_takes(caution: Caution) -> None:
    caution.saw("calm", 50, OWN_S)
    seconds = caution.seconds_for_others(make_shares("aaaaaaa"), 0, 0)
    assert COST.base_s + seconds == pytest.approx(PART_OF_OTHERS * COST.of(1, 50), rel=0.01)


def test_first_step_of_who_may_come_is_as_large_as_its_last_first_one(caution: Caution) -> None:
    caution.saw("calm", 50, OWN_S)
    caution.saw("calm", 100, OWN_S)
    caution.saw("calm", None, OWN_S)
    seconds = caution.seconds_for_others(make_shares("aaaaaaa"), 0, 0)
    assert COST.base_s + seconds == pytest.approx(PART_OF_OTHERS * COST.of(1, 100), rel=0.01)


def test_who_needs_least_for_itself_is_waited_for_least(caution: Caution) -> None:
    for tenant, num_tokens in (("b", 200), ("c", 50), ("d", 100)):
        caution.saw(tenant, num_tokens, OWN_S)
    seconds = caution.seconds_for_others(make_shares("aaaaaaa"), 0, 0)
    assert COST.base_s + seconds == pytest.approx(PART_OF_OTHERS * COST.of(1, 50), rel=0.01)


@pytest.mark.parametrize("running", ["aaaaaaac", "ccccccc"])
def test_tenant_of_which_rows_run_is_not_expected(caution: Caution, running: str) -> None:
    caution.saw("c", 30, OWN_S)
    assert caution.seconds_for_others(make_shares(running), 0, 0) == math.inf


def test_tenant_that_has_become_large_is_not_expected(caution: Caution) -> None:
    caution.saw("c", 30, OWN_S)
    assert caution.seconds_for_others(make_shares("", "ccccccccc"), 0, 0) == math.inf


def test_small_tenant_is_expected_for_a_while_after_it_was_there(caution: Caution, clock: Clock) -> None:
    caution.saw("early", 30, OWN_S)
    clock.now_s += CALM_S / 2
    caution.saw("late", 30, OWN_S)
    clock.now_s += CALM_S - 0.1
    assert caution.seconds_for_others(make_shares("aaaaaaa"), 0, 0) < math.inf
    clock.now_s += 0.2
    assert caution.seconds_for_others(make_shares("aaaaaaa"), 0, 0) == math.inf


def test_tenant_is_expected_in_proportion_to_what_its_own_rows_took(caution: Caution, clock: Clock) -> None:
    caution.saw("calm", 30, OWN_S / 10)
    caution.saw("calm", None, OWN_S / 10)
    clock.now_s += 0.19 * CALM_S
    assert caution.seconds_for_others(make_shares("aaaaaaa"), 0, 0) < math.inf
    clock.now_s += 0.02 * CALM_S
    assert caution.seconds_for_others(make_shares("aaaaaaa"), 0, 0) == math.inf


def test_no_work_is_saved_up_for_longer_than_the_longest_time(caution: Caution, clock: Clock) -> None:
    for _ in range(10):
        caution.saw("calm", 30, OWN_S)
    clock.now_s += CALM_S / 2
    caution.saw("calm", None, 0.0)
    clock.now_s += CALM_S / 2 + 0.1
    assert caution.seconds_for_others(make_shares("aaaaaaa"), 0, 0) == math.inf


def test_others_have_part_of_each_step_however_little_the_small_one_takes(caution: Caution) -> None:
    caution.saw("calm", 1, OWN_S)
    seconds = caution.seconds_for_others(make_shares("aaaaaaa"), 0, 0)
    assert seconds == pytest.approx(LEAST_PART * COST.base_s, rel=0.01)


def test_no_more_tenants_are_remembered_than_may_be(caution: Caution) -> None:
    caution.saw("first", 1, OWN_S)
    for number in range(MAX_CALM):
        caution.saw(f"tenant-{number}", 50, OWN_S)
    seconds = caution.seconds_for_others(make_shares("aaaaaaa"), 0, 0)
    assert COST.base_s + seconds == pytest.approx(PART_OF_OTHERS * COST.of(1, 50), rel=0.01)


def test_nobody_is_remembered_when_the_engine_has_ended(caution: Caution) -> None:
    caution.saw("calm", 50, OWN_S)
    caution.clear()
    assert caution.seconds_for_others(make_shares("aaaaaaa"), 0, 0) == math.inf
