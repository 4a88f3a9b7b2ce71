"""Learning rates and data orders are functions of the step; every example comes before any comes again."""

import itertools

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from tuning.config import TrainConfig
from tuning.optimizers import DataOrder, learning_rate_at, make_optimizer


def rates(**fields: object) -> list[float]:
    config = TrainConfig(num_steps=20, learning_rate=0.5, **fields)  # type: ignore[arg-type]
    return [learning_rate_at(config, step) for step in range(20)]


def test_linear_schedule_warms_up_and_ends_near_nothing() -> None:
    found = rates(schedule="linear", num_warmup_steps=4)
    assert found[:5] == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5])
    assert found[-1] == pytest.approx(0.5 / 16)
    assert found[4:] == sorted(found[4:], reverse=True)


@pytest.mark.parametrize(
    ("schedule", "reference"),
    [("linear", get_linear_schedule_with_warmup), ("cosine", get_cosine_schedule_with_warmup)],
)
def test_decay_is_that_of_transformers(schedule: str, reference: object) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = reference(optimizer, 4, 20)  # type: ignore[operator]
    expected = []
    for _ in range(20):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    # transformers begins its warm-up with a step of rate nothing, which is left out here.
    assert rates(schedule=schedule, num_warmup_steps=4)[4:] == pytest.approx(expected[4:])


def test_constant_schedule_stays() -> None:
    assert rates(schedule="constant", num_warmup_steps=0) == [0.5] * 20


@pytest.mark.parametrize(("count", "batch_size"), [(7, 3), (3, 7), (1, 4), (8, 4)])
def test_every_example_comes_before_any_comes_again(count: int, batch_size: int) -> None:
    order = DataOrder(count, batch_size, seed=3)
    stream = list(itertools.chain.from_iterable(order.batches(3 * count)))
    assert len(stream) == 3 * count * batch_size
    for start in range(0, len(stream), count):
        assert sorted(stream[start : start + count]) == list(range(count))


def test_a_batch_depends_on_its_step_alone() -> None:
    forward = [DataOrder(10, 4, seed=1).batch(step) for step in range(12)]
    order = DataOrder(10, 4, seed=1)
    assert [order.batch(step) for step in reversed(range(12))] == forward[::-1]
    assert [DataOrder(10, 4, seed=2).batch(step) for step in range(12)] != forward


@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("adafactor", torch.optim.Adafactor)])
def test_the_configured_optimizer_is_made(name: str, kind: type) -> None:
    config = TrainConfig(num_steps=1, optimizer=name, weight_decay=0.25)  # type: ignore[arg-type]
    optimizer = make_optimizer(config, [torch.nn.Parameter(torch.ones(3, 4))])
    assert isinstance(optimizer, kind)
    assert optimizer.param_groups[0]["weight_decay"] == 0.25


def test_each_round_has_an_order_of_its_own() -> None:
    first, second = DataOrder(50, 50, seed=0).batches(2)
    assert sorted(first) == sorted(second)
    assert first != second
