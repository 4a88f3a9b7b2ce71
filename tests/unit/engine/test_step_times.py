"""What steps are expected to take, against the formula that made them."""

import itertools
import random

import pytest

from server.engine.step_times import MIN_STEPS, StepTimes
from tests.unit.engine.simulation import Cost

COMPILED = Cost(base_s=0.007, per_row_s=0.0004, per_token_s=0.0001)
SLOWER = Cost(base_s=0.02, per_row_s=0.001, per_token_s=0.0002)
SHAPES = [(1, 1), (1, 64), (64, 64), (16, 80), (8, 8)]


def taught(cost: Cost, shapes: list[tuple[int, int]], num_steps: int, times: StepTimes | None = None) -> StepTimes:
    """Steps of these shapes in turn, each off by up to a tenth."""
    times = times or StepTimes()
    numbers = random.Random(0)
    for num_rows, num_tokens in itertools.islice(itertools.cycle(shapes), num_steps):
        times.add(num_rows, num_tokens, cost.of(num_rows, num_tokens) * numbers.uniform(0.9, 1.1))
    return times


@pytest.mark.parametrize("cost", [COMPILED, SLOWER, Cost(1.0, 0.0, 0.0), Cost(0.0, 0.01, 0.0)])
def test_few_steps_of_several_shapes_tell_what_any_shape_takes(cost: Cost) -> None:
    times = taught(cost, SHAPES, 30)
    for shape in [*SHAPES, (1, 200), (32, 32), (40, 300)]:
        assert times.of(*shape) == pytest.approx(cost.of(*shape), rel=0.25)


def test_what_many_rows_take_is_not_forgotten_while_one_runs_alone() -> None:
    times = taught(COMPILED, SHAPES, 40)
    taught(COMPILED, [(1, 1)], 2000, times)
    assert times.of(64, 64) == pytest.approx(COMPILED.of(64, 64), rel=0.15)


def test_machine_that_has_become_faster_is_followed() -> None:
    times = taught(SLOWER, SHAPES, 200)
    taught(COMPILED, SHAPES, 100, times)
    for shape in SHAPES:
        assert times.of(*shape) == pytest.approx(COMPILED.of(*shape), rel=0.15)


def test_step_during_which_the_machine_stood_still_says_little() -> None:
    times = taught(COMPILED, SHAPES, 100)
    times.add(16, 16, 5.0)
    assert times.of(16, 16) < 1.7 * COMPILED.of(16, 16)


def test_nothing_is_expected_to_take_less_than_no_time() -> None:
    times = StepTimes()
    for num_rows in (1, 2, 3, 4) * 20:
        times.add(num_rows, num_rows, 1.0 / num_rows)
    assert times.base_s >= 0
    assert times.of_one_more_row(1) >= 0


def test_few_steps_are_no_knowledge() -> None:
    assert not taught(COMPILED, SHAPES, MIN_STEPS - 1).is_known
    assert taught(COMPILED, SHAPES, MIN_STEPS).is_known


@pytest.mark.parametrize("at_most", [1, 7, 500])
def test_tokens_within_a_time_are_as_many_as_take_no_longer(at_most: int) -> None:
    times = taught(COMPILED, SHAPES, 50)
    for seconds in (-1.0, 0.0, 0.0003, 0.001, 0.01, 0.02, float("inf")):
        expected = max((n for n in range(1, at_most + 1) if times.of_one_more_row(n) <= seconds), default=0)
        assert abs(times.num_tokens_within(seconds, at_most) - expected) <= (1 if expected else 0)
    assert StepTimes().num_tokens_within(0.0, at_most) == at_most
