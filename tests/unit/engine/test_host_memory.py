"""What is free follows the machine and the container's limit, on made-up machines."""

from pathlib import Path

import pytest

from server.engine.host_memory import available_bytes

MIB = 1 << 20


def write(root: Path, path: str, text: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def machine(root: Path, free_mib: int) -> None:
    write(root, "proc/meminfo", f"MemTotal: 99999999 kB\nMemFree: 5 kB\nMemAvailable:  {free_mib * 1024} kB\n")


@pytest.mark.parametrize(
    ("folder", "names"),
    [
        ("sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")),
        ("sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
    ],
)
def test_a_container_has_what_its_limit_leaves(tmp_path: Path, folder: str, names: tuple[str, str, str]) -> None:
    machine(tmp_path, 1000)
    limit, usage, reclaimable = names
    write(tmp_path, f"{folder}/{limit}", f"{500 * MIB}\n")
    write(tmp_path, f"{folder}/{usage}", f"{450 * MIB}\n")
    write(tmp_path, f"{folder}/memory.stat", f"anon 1\n{reclaimable} {100 * MIB}\n")
    assert available_bytes(tmp_path) == 150 * MIB
    machine(tmp_path, 20)
    assert available_bytes(tmp_path) == 20 * MIB


@pytest.mark.parametrize("limit", ["max", None])
def test_without_a_limit_it_is_the_machines(tmp_path: Path, limit: str | None) -> None:
    machine(tmp_path, 1000)
    if limit is not None:
        write(tmp_path, "sys/fs/cgroup/memory.max", limit)
        write(tmp_path, "sys/fs/cgroup/memory.current", "5")
        write(tmp_path, "sys/fs/cgroup/memory.stat", "inactive_file 0")
    assert available_bytes(tmp_path) == 1000 * MIB


def test_a_machine_that_does_not_tell_is_not_guessed(tmp_path: Path) -> None:
    assert available_bytes(tmp_path) is None
