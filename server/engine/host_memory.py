"""How much memory this machine or container has left. Linux; elsewhere nothing is known."""

from collections.abc import Callable
from pathlib import Path

_MEMINFO = Path("proc/meminfo")
_CGROUPS = (
    (Path("sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (Path("sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def available_bytes(root: Path = Path("/")) -> int | None:
    """Bytes that a new process could take without swapping or being killed; None where the system does not tell.

    The machine's, or what is left of the container's limit (control groups v2 or v1), where a file's pages that nobody
    has read lately count as free. `root` is where `proc` and `sys` are looked for.
    """
    left = [_of_machine(root), *(_of_container(root / group[0], *group[1:]) for group in _CGROUPS)]
    return min((found for found in left if found is not None), default=None)


def _of_machine(root: Path) -> int | None:
    return _quietly(lambda: 1024 * _field(root / _MEMINFO, "MemAvailable:"))


def _of_container(folder: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    def left() -> int:
        taken = int((folder / usage).read_text()) - _field(folder / "memory.stat", reclaimable)
        return max(0, int((folder / limit).read_text()) - taken)

    return _quietly(left)


def _field(file: Path, name: str) -> int:
    for line in file.read_text().splitlines():
        words = line.split()
        if words[:1] == [name]:
            return int(words[1])
    raise ValueError(f"{file} has no {name}")


def _quietly(read: Callable[[], int]) -> int | None:
    try:
        return read()
    except (OSError, ValueError, IndexError):  # no such file, or no limit ("max")
        return None
