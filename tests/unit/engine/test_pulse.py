"""How long steps take by their kind, on a clock of the test's own; and that the engine tells it."""

import threading

import pytest
import torch

from server.engine.backbone import Backbone
from server.engine.pulse import Pulse, step_kind
from tests.unit.engine.stepped import SteppedEngine, make_request


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def take(pulse: Pulse, clock: Clock, kind: tuple[int, int] | None, seconds: float) -> None:
    pulse.begin(kind)
    clock.now_s += seconds
    pulse.begin(None)


def test_a_step_is_expected_to_take_what_the_slowest_of_its_kind_took() -> None:
    clock = Clock()
    pulse = Pulse(clock=clock)
    small, large = step_kind(1, 40), step_kind(500, 900)
    pulse.begin(small)
    assert pulse.look() == (0.0, None)
    take(pulse, clock, small, 0.25)
    take(pulse, clock, small, 0.125)
    take(pulse, clock, large, 8.0)

    pulse.begin(small)
    clock.now_s += 3
    age_s, usual_s = pulse.look()
    assert age_s == 3
    assert usual_s is not None
    assert 0.2 < usual_s <= 0.25
    pulse.begin(large)
    assert pulse.look() == (0.0, 8.0)
    pulse.begin(None)
    assert pulse.look() == (0.0, None)


def test_a_step_that_was_slow_once_is_forgotten() -> None:
    clock = Clock()
    pulse = Pulse(clock=clock)
    kind = step_kind(64, 64)
    take(pulse, clock, kind, 100.0)
    for _ in range(500):
        take(pulse, clock, kind, 0.125)

    pulse.begin(kind)
    assert pulse.look()[1] == 0.125


def test_steps_are_alike_within_a_factor_of_two() -> None:
    assert step_kind(64, 600) == step_kind(127, 1023)
    assert len({step_kind(63, 600), step_kind(64, 600), step_kind(64, 1024)}) == 3


def test_the_engine_tells_of_a_step_that_hangs_how_long_its_like_took(
    llama: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepped = SteppedEngine(llama)
    stepped.submit(make_request("first", max_tokens=30))
    stepped.finish()
    assert stepped.engine.status().usual_step_s is None

    hangs, goes_on = threading.Event(), threading.Event()
    forward = llama.forward

    def hang(*arguments: object) -> torch.Tensor:
        hangs.set()
        goes_on.wait(30)
        return forward(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(llama, "forward", hang)
    stepped.submit(make_request("second", max_tokens=30))
    turning = threading.Thread(target=stepped.engine.run_once)
    turning.start()
    try:
        assert hangs.wait(30)
        status = stepped.engine.status()
    finally:
        goes_on.set()
        turning.join()
    assert status.usual_step_s is not None
    assert 0 < status.usual_step_s < 30
    assert status.num_running == 1
