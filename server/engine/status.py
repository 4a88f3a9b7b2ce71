"""A look at the engine from another thread."""

from dataclasses import dataclass
from typing import Literal

CompiledState = Literal["off", "compiling", "trial", "failed", "stopped"]
"""How far a backbone's compiled steps are; "trial": there is a package, each size is served by what was faster."""


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """Numbers of one moment. `failure` is the error that ended the step loop, or None."""

    num_running: int
    num_waiting: int
    kv_usage_ratio: float
    prompts_resident: int
    heartbeat_age_s: float
    usual_step_s: float | None
    """The slowest of late of steps like the one that runs now; None when it is like none before, or none runs."""
    failure: str | None
