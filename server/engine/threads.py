"""How many threads torch should use on this machine.

Owns the count alone: whoever starts the engine applies it with `torch.set_num_threads`. One thread a physical core that
this process may use: the products fill a core's vector units, so that two threads on one core only wait for each
other, and every thread beyond a container's share is put to sleep while the others spin for it.
"""

import math
import os
from collections.abc import Iterable
from pathlib import Path

_CGROUP_V2 = Path("sys/fs/cgroup/cpu.max")
_CGROUP_V1_QUOTA = Path("sys/fs/cgroup/cpu/cpu.cfs_quota_us")
_CGROUP_V1_PERIOD = Path("sys/fs/cgroup/cpu/cpu.cfs_period_us")
_SIBLINGS = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def choose_threads(root: Path = Path("/")) -> int:
    """Intra-op threads for decode and prefill, at least one. `OMP_NUM_THREADS`, where it is set, is the user's word.

    Else the physical cores among the CPUs that this process is scheduled on, no more than the container's CPU limit
    (control groups v2 or v1). `root` is where `sys` is looked for.
    """
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if wanted.isdecimal() and int(wanted) > 0:
        return int(wanted)
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = count_cores(cpus, root)
    limit = read_cpu_limit(root)
    return max(1, min(cores, math.floor(limit)) if limit is not None else cores)


def count_cores(cpus: Iterable[int], root: Path = Path("/")) -> int:
    """Physical cores behind the logical CPUs; each CPU counts as one where the machine does not say."""
    cores = set()
    for cpu in cpus:
        try:
            cores.add((root / _SIBLINGS.format(cpu)).read_text().strip())
        except OSError:
            cores.add(f"cpu {cpu}")
    return len(cores)


def read_cpu_limit(root: Path = Path("/")) -> float | None:
    """CPUs' worth of time that the container may use, or None where there is no limit."""
    try:
        quota, period = (root / _CGROUP_V2).read_text().split()
    except (OSError, ValueError):
        try:
            quota = (root / _CGROUP_V1_QUOTA).read_text().strip()
            period = (root / _CGROUP_V1_PERIOD).read_text().strip()
        except OSError:
            return None
    try:
        limit = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):
        return None
    return limit if limit > 0 else None
