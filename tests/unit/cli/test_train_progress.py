"""Progress is a bar where somebody looks and sparse lines in a log."""

import io
import itertools
from typing import Any

from rich.console import Console

from server.cli.train_progress import LiveProgress, PlainProgress
from tuning.records import TrainEvent


def event(kind: Any, step: int, **fields: Any) -> TrainEvent:
    shared: dict[str, Any] = {"task": "a", "num_steps": 100, "seconds": step * 0.5}
    if kind == "step":
        shared |= {"num_examples": 16, "loss": 1.25, "learning_rate": 0.1}
    return TrainEvent(kind=kind, step=step, **(shared | fields))


def test_lines_come_at_beginnings_ends_looks_and_every_few_seconds() -> None:
    said: list[str] = []
    now = 0.0
    progress = PlainProgress(said.append, clock=lambda: now)
    progress.on_event(event("started", 0))
    for step in range(1, 26):
        now += 0.5
        progress.on_event(event("step", step))
    progress.on_event(event("evaluated", 25, validation_loss=0.75))
    progress.on_event(event("failed", 25, message="its loss is not a number"))
    for done in (4, 8):
        progress.on_measuring("b", done, 8)

    assert said == [
        "a: 100 steps begin",
        "a: step 21 of 100, loss 1.2500, 32.0 examples/s, 40 s left",
        "a: step 25 of 100, validation loss 0.7500",
        "a: failed at step 25 of 100: its loss is not a number",
        "b: being tested on its held-out examples",
    ]


def test_bars_show_losses_speed_and_what_is_left() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=140)
    with LiveProgress(console, {"a": 100, "b": 100}) as progress:
        progress.on_event(event("started", 0))
        progress.on_event(event("step", 50))
        progress.on_event(event("evaluated", 50, validation_loss=0.75))
        progress.on_event(event("finished", 60))
        progress.on_event(event("failed", 7, task="b"))
        progress.on_measuring("a", 3, 8)
    shown = screen.getvalue()
    for text in ("60/60", "loss 1.250, validation 0.750, 32.0 examples/s", "failed", "held-out answers", "3/8"):
        assert text in shown


def test_bar_of_a_run_that_is_gone_on_from_tells_the_time_left() -> None:
    screen = io.StringIO()
    seconds = itertools.count()
    console = Console(file=screen, force_terminal=True, width=140, get_time=lambda: float(next(seconds)))
    with LiveProgress(console, {"a": 100}) as progress:
        for step in range(40, 50):
            progress.on_event(event("step", step))
    assert "0:00:" in screen.getvalue().rpartition("examples/s")[2]


def test_of_more_tasks_than_fit_those_that_ended_are_hidden() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=140, height=10)
    names = [f"task-{n}" for n in range(12)]
    with LiveProgress(console, dict.fromkeys(names, 100)) as progress:
        for name in names:
            progress.on_event(event("started", 0, task=name))
            progress.on_event(event("finished", 100, task=name))
        progress.on_event(event("started", 0, task="task-0"))
        screen.truncate(0)
    assert "task-0" in screen.getvalue()
    assert "task-5" not in screen.getvalue()
