"""How far a training is: bars for somebody who looks, plain lines for a log, nothing beside JSON.

Refuses to know what is trained: it is told of events.
"""

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Final, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from tuning.records import TrainEvent

PLAIN_INTERVAL_S: Final = 10.0
_LAST_LOSSES: Final = 0.8
_ENDS: Final = ("finished", "failed", "cancelled")
# Of a terminal: the line of the held-out answers, and room to see that more is above.
_OTHER_LINES: Final = 4


class TrainProgress(Protocol):
    """Shows a run while the block lasts."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def on_event(self, event: TrainEvent) -> None: ...

    def on_measuring(self, task: str, num_done: int, num_all: int) -> None: ...


class SilentProgress:
    """Shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def on_event(self, event: TrainEvent) -> None:
        return None

    def on_measuring(self, task: str, num_done: int, num_all: int) -> None:
        return None


class PlainProgress(SilentProgress):
    """A line when a task begins, when it was looked at, when it ends, and every few seconds in between."""

    def __init__(self, say: Callable[[str], None], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._say = say
        self._clock = clock
        self._said_at: dict[str, float] = {}
        self._measuring: str | None = None

    def on_event(self, event: TrainEvent) -> None:
        name = event.task
        if event.kind == "step":
            now = self._clock()
            if now - self._said_at.setdefault(name, now) < PLAIN_INTERVAL_S:
                return
            self._said_at[name] = now
        self._say(f"{name}: {self._describe(event)}")

    def on_measuring(self, task: str, num_done: int, num_all: int) -> None:
        if task != self._measuring:
            self._measuring = task
            self._say(f"{task}: being tested on its held-out examples")

    def _describe(self, event: TrainEvent) -> str:
        where = f"step {event.step} of {event.num_steps}"
        if event.kind == "step":
            left = event.seconds / event.step * (event.num_steps - event.step)
            return f"{where}, loss {event.loss:.4f}, {_examples_per_s(event):.1f} examples/s, {left:.0f} s left"
        if event.kind == "evaluated":
            return f"{where}, validation loss {event.validation_loss:.4f}"
        if event.kind == "started":
            return f"{event.num_steps} steps begin"
        return f"{event.kind} at {where}" + (f": {event.message}" if event.message else "")


class LiveProgress:
    """A bar a task with its losses, its speed and the time left. Of more tasks than fit, those that run are shown."""

    def __init__(self, console: Console, num_steps: Mapping[str, int]) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._bars: dict[str, TaskID] = {
            name: self._progress.add_task(name, total=total, start=False, visible=False, figures="")
            for name, total in num_steps.items()
        }
        self._hides_ended = len(num_steps) > console.height - _OTHER_LINES
        self._begun: set[TaskID] = set()
        self._losses: dict[str, float] = {}
        self._validation: dict[str, float] = {}
        self._speeds: dict[str, float] = {}
        self._measuring: TaskID | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def on_event(self, event: TrainEvent) -> None:
        name, bar = event.task, self._bars[event.task]
        if bar not in self._begun:
            # A run that is gone on from has no beginning.
            self._begun.add(bar)
            self._progress.start_task(bar)
        if event.loss is not None:
            # A batch's loss jumps; what is shown is smoothed.
            before = self._losses.get(name, event.loss)
            self._losses[name] = _LAST_LOSSES * before + (1 - _LAST_LOSSES) * event.loss
            self._speeds[name] = _examples_per_s(event)
        if event.validation_loss is not None:
            self._validation[name] = event.validation_loss
        total = event.step if event.kind == "finished" else event.num_steps
        is_shown = not (self._hides_ended and event.kind in _ENDS)
        self._progress.update(bar, visible=is_shown, completed=event.step, total=total, figures=self._figures(event))

    def on_measuring(self, task: str, num_done: int, num_all: int) -> None:
        if self._measuring is None:
            self._measuring = self._progress.add_task(task, total=num_all, figures="held-out answers")
        self._progress.update(self._measuring, description=task, completed=num_done, total=num_all)

    def _figures(self, event: TrainEvent) -> str:
        name = event.task
        parts = [f"loss {self._losses[name]:.3f}"] if name in self._losses else []
        parts += [f"validation {self._validation[name]:.3f}"] if name in self._validation else []
        parts += [f"{self._speeds[name]:.1f} examples/s"] if name in self._speeds else []
        if event.kind in _ENDS and event.kind != "finished":
            parts.append(event.kind)
        return ", ".join(parts)


def _examples_per_s(event: TrainEvent) -> float:
    """Of one task, which shares the time with those beside it. Every step has the same number of examples."""
    return event.step * event.num_examples / event.seconds if event.seconds else 0.0
