"""Work that shares the engine's thread with serving: when it may run, and how serving goes on in the middle of it.

One thread owns the device, and one alone may enter parallel regions; so training runs on it too, in the gaps. A piece
of it (an optimizer step) lasts far longer than a step of serving, so it is not waited for: between any two of its parts
(a layer of a pass) it gives way, and serving steps are run right there, on top of it. Owns that order and the account
of time. Refuses to know what the work is, and what a row is.

The account: while rows are served, each second of serving earns `share / (1 - share)` seconds of work, and work goes on
only while it has some. What it has is kept small, so that the work comes in single parts between two steps, and its
debt is bounded, so that one long part is soon forgotten. Work that nobody waits beside is free.
"""

import time
from collections.abc import Callable
from typing import Protocol

MAX_CREDIT_S = 0.002
MAX_DEBT_S = 0.25

GiveWay = Callable[[], None]


class BackgroundStopped(BaseException):
    """The engine ends, in the middle of the work: what has not been kept is lost.

    As with a cancelled coroutine, no `except Exception` on the way may take it for a failure of the work.
    """


class BackgroundWork(Protocol):
    """What is run in the gaps, on the engine's thread."""

    def run(self, give_way: GiveWay) -> bool:
        """Do one piece; False when there was none to do.

        Calls `give_way` between any two parts of it, each of a few milliseconds at most: serving is run inside. It may
        raise BackgroundStopped, which must be let through. Any other exception ends the engine.
        """
        ...


class BackgroundTurns:
    """Gives the work its turns. The engine's thread alone uses it.

    `has_rows` says whether anybody waits for a step, or for a word with the engine; `serve` is one turn of serving in
    the middle of the work, and returns False when there was nothing to do; `beat` is told that the thread lives.
    `on_time` is told how long the work ran, and whether rows were there meanwhile.
    """

    def __init__(
        self,
        *,
        has_rows: Callable[[], bool],
        serve: Callable[[], bool],
        is_stopping: Callable[[], bool],
        beat: Callable[[], None],
        share: float,
        on_time: Callable[[float, bool], None] = lambda seconds, is_beside_rows: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`share`, from 0 to below 1, is what the work may take of the thread's time while rows are served."""
        if not 0 <= share < 1:
            raise ValueError(f"a share of {share} leaves nothing to serve with")
        self._work: BackgroundWork | None = None
        self._has_rows = has_rows
        self._serve = serve
        self._is_stopping = is_stopping
        self._beat = beat
        self._earned_per_s = share / (1 - share)
        self._on_time = on_time
        self._clock = clock
        self._credit_s = 0.0
        self._since_s = clock()
        self._failure: Exception | None = None

    def set_work(self, work: BackgroundWork) -> None:
        self._work = work

    def begin_turn(self) -> None:
        """A turn of serving begins."""
        self._since_s = self._clock()

    def end_turn(self, *, has_served: bool) -> bool:
        """A turn of serving has ended: a piece of the work may have the next. False when there was none to do.

        Raises what a turn of serving inside the piece raised, or BackgroundStopped.
        """
        if self._work is None:
            return False
        if has_served:
            self._earn(self._clock() - self._since_s)
        # Rows that are there but cannot run, for want of a prompt that is being read, keep nobody waiting.
        if self._is_stopping() or (has_served and self._credit_s <= 0):
            return False
        self._since_s = self._clock()
        try:
            has_worked = self._work.run(self._give_way)
            self._charge()
        except BackgroundStopped:
            failure, self._failure = self._failure, None
            if failure is not None:
                raise failure from None
            raise
        return has_worked

    def _give_way(self) -> None:
        self._charge()
        self._beat()
        if self._is_stopping():
            raise BackgroundStopped
        while self._has_rows() and self._credit_s <= 0:
            began_s = self._clock()
            try:
                has_served = self._serve()
            except Exception as error:
                # The engine's own end, which the work must not take for its own.
                self._failure = error
                raise BackgroundStopped from error
            if self._is_stopping():
                raise BackgroundStopped
            if not has_served:
                break
            self._earn(self._clock() - began_s)
        self._since_s = self._clock()

    def _earn(self, seconds: float) -> None:
        earned_s = seconds * self._earned_per_s
        # What one step earns is kept; what many earn while there is no work to do is not saved up.
        self._credit_s = min(self._credit_s + earned_s, max(earned_s, MAX_CREDIT_S))

    def _charge(self) -> None:
        """For a part of the work that has ended just now."""
        now_s = self._clock()
        seconds, self._since_s = now_s - self._since_s, now_s
        is_beside_rows = self._has_rows()
        self._credit_s = max(self._credit_s - seconds, -MAX_DEBT_S) if is_beside_rows else 0.0
        self._on_time(seconds, is_beside_rows)
