"""How much memory a piece of work needed at its peak, beyond what was held before it. Refuses to know the work.

On CUDA it is the allocator's own figure. On Linux the kernel's high-water mark of resident pages, which is set back
first, so that the loading of a model does not count; where it cannot be set back (`/proc/self/clear_refs`), the mark of
the whole life of the process, which is only right if it is passed.
"""

import resource
import sys
from pathlib import Path

import torch

_RESET_HIGH_WATER_MARK = "5"


class PeakMemory:
    """Measures from its making to `mb`."""

    def __init__(self) -> None:
        self._on_cuda = torch.cuda.is_available()
        if self._on_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return
        try:
            Path("/proc/self/clear_refs").write_text(_RESET_HIGH_WATER_MARK)
        except OSError:
            self._before = _status_bytes("VmRSS")
        else:
            self._before = _status_bytes("VmHWM")

    @property
    def mb(self) -> float:
        """Megabytes (10^6) above what was held before."""
        peak = torch.cuda.max_memory_allocated() if self._on_cuda else _status_bytes("VmHWM")
        return round(max(0, peak - self._before) / 1e6, 1)


def _status_bytes(name: str) -> int:
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    # macOS counts bytes, the others kilobytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
