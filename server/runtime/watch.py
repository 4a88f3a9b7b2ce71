"""Watches an engine from outside: has it failed, or does it hang? It may be past telling so itself.

A step that is like others before it hangs when it takes much longer than they did; one that is like none, or the
compiling of a prompt, is given a minute. Owns these limits. Refuses to know what follows.
"""

import asyncio
import time
from collections.abc import Callable

import structlog

from server.runtime.protocols import EngineLike

WATCH_INTERVAL_S = 0.25
# So that requests are told within 5 s, looking included.
MIN_SILENCE_S = 4.0
# A step takes three times as long as any of its kind did of late, but not more than a minute longer: it hangs.
USUAL_TIMES = 3.0
MAX_MARGIN_S = 60.0
# What was never done before: the first step on a slow machine, kernels that are compiled for it.
UNKNOWN_SILENCE_S = 60.0
# Where this process itself stood still, so did the engine: that time does not count.
MAX_GAP_S = 1.0

_log = structlog.get_logger("promptmux.runtime")


def max_silence_s(usual_step_s: float | None) -> float:
    """How long a step may take, of whose kind the slowest of late took `usual_step_s`; None if there was none."""
    if usual_step_s is None:
        return UNKNOWN_SILENCE_S
    return max(min(usual_step_s * USUAL_TIMES, usual_step_s + MAX_MARGIN_S), MIN_SILENCE_S)


class EngineWatch:
    """Looks at one engine now and then. The event loop's thread alone uses it."""

    def __init__(self, engine: EngineLike, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine
        self._clock = clock
        self._looked_at_s = clock()
        self._silence_s = 0.0

    def look(self) -> str | None:
        """Why only a restart helps; None while the engine works."""
        now_s = self._clock()
        passed_s, self._looked_at_s = now_s - self._looked_at_s, now_s
        status = self._engine.status()
        if status.failure is not None:
            return status.failure
        if status.num_running + status.num_waiting == 0:
            self._silence_s = 0.0
            return None
        self._silence_s = min(status.heartbeat_age_s, self._silence_s + min(passed_s, MAX_GAP_S))
        if self._silence_s > max_silence_s(status.usual_step_s):
            return f"no step for {self._silence_s:.0f} s"
        return None


async def wait_for_failure(engine: EngineLike) -> str:
    """Returns the reason when the engine has failed; perhaps never."""
    watch = EngineWatch(engine)
    has_looked = True
    while True:
        try:
            reason = watch.look()
            has_looked = True
        except Exception:
            # Nobody else watches the engine: the watcher goes on, and says so once.
            if has_looked:
                _log.exception("engine_not_watched")
            reason, has_looked = None, False
        if reason is not None:
            return reason
        await asyncio.sleep(WATCH_INTERVAL_S)
