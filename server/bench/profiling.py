"""Where the engine's time goes, operator by operator: `torch.profiler` around a load in this process.

Importing this module does not import torch: reports name its operators without it.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class Operator:
    """One operator over the whole profile. `self_device_s` is None where there is no accelerator."""

    name: str
    num_calls: int
    self_cpu_s: float
    self_device_s: float | None


class Profiler:
    """Profiles all threads of the process while it is entered, once. Everything runs slower, small operators most.

    Leaving it writes a Chrome trace (chrome://tracing, Perfetto) to `trace`, and raises OSError when it cannot.
    """

    def __init__(self, trace: Path) -> None:
        self.operators: Sequence[Operator] = ()  # most self CPU time first; filled when it is left
        self._trace = trace
        self._profile: Any = None

    def __enter__(self) -> Self:
        # Its native half otherwise writes lines of its own to stderr.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        import torch
        from torch._C._profiler import _ExperimentalConfig
        from torch.profiler import ProfilerActivity, profile

        cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        # The step loop has a thread of its own, which a profiler otherwise passes over.
        every_thread = _ExperimentalConfig(profile_all_threads=True)
        self._profile = profile(activities=[ProfilerActivity.CPU, *cuda], experimental_config=every_thread)
        self._profile.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._profile.__exit__(kind, *rest)
        if kind is not None:
            return
        # torch only logs that it cannot write.
        with self._trace.open("w"):
            pass
        self._profile.export_chrome_trace(str(self._trace))
        self.operators = sorted(
            (_operator(event) for event in self._profile.key_averages()),
            key=lambda operator: operator.self_cpu_s,
            reverse=True,
        )


def _operator(event: Any) -> Operator:
    import torch

    device_s = event.self_device_time_total / 1e6 if torch.cuda.is_available() else None
    return Operator(event.key, event.count, event.self_cpu_time_total / 1e6, device_s)
