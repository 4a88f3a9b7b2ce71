"""Watches an engine from outside: has it failed, or does it hang? It may be past telling so itself."""

import asyncio

import structlog

from server.runtime.protocols import EngineLike

WATCH_INTERVAL_S = 1.0
# A step on a slow machine may take many seconds; an engine with rows that makes none for so long hangs.
MAX_HEARTBEAT_AGE_S = 60.0

_log = structlog.get_logger("promptmux.runtime")


def find_failure(engine: EngineLike) -> str | None:
    """Why only a restart helps; None while the engine works."""
    status = engine.status()
    if status.failure is not None:
        return status.failure
    has_work = status.num_running + status.num_waiting > 0
    if has_work and status.heartbeat_age_s > MAX_HEARTBEAT_AGE_S:
        return f"no step for {status.heartbeat_age_s:.0f} s"
    return None


async def wait_for_failure(engine: EngineLike) -> str:
    """Returns the reason when the engine has failed; perhaps never."""
    has_looked = True
    while True:
        try:
            reason = find_failure(engine)
            has_looked = True
        except Exception:
            # Nobody else watches the engine: the watcher goes on, and says so once.
            if has_looked:
                _log.exception("engine_not_watched")
            reason, has_looked = None, False
        if reason is not None:
            return reason
        await asyncio.sleep(WATCH_INTERVAL_S)
