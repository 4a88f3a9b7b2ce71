"""The number of threads follows cores and limits, on made-up machines."""

import os
from pathlib import Path

import pytest

from server.engine.threads import choose_threads, count_cores, read_cpu_limit


@pytest.fixture(autouse=True)
def _no_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)


def write(root: Path, path: str, text: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def hyperthreads(root: Path) -> None:
    for cpu in range(4):
        write(root, f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", f"{cpu % 2},{cpu % 2 + 2}\n")


def test_two_threads_of_one_core_count_once(tmp_path: Path) -> None:
    hyperthreads(tmp_path)
    assert count_cores({0, 1, 2, 3}, tmp_path) == 2
    assert count_cores({0, 2}, tmp_path) == 1
    assert choose_threads(tmp_path) == 2


def test_a_machine_that_does_not_tell_its_cores_gives_every_cpu(tmp_path: Path) -> None:
    assert choose_threads(tmp_path) == 4


@pytest.mark.parametrize(("text", "limit"), [("150000 100000\n", 1.5), ("max 100000\n", None), ("nonsense", None)])
def test_the_limit_of_control_groups_v2_is_read(tmp_path: Path, text: str, limit: float | None) -> None:
    write(tmp_path, "sys/fs/cgroup/cpu.max", text)
    assert read_cpu_limit(tmp_path) == limit


@pytest.mark.parametrize(("quota", "limit"), [("300000", 3.0), ("-1", None)])
def test_the_limit_of_control_groups_v1_is_read(tmp_path: Path, quota: str, limit: float | None) -> None:
    write(tmp_path, "sys/fs/cgroup/cpu/cpu.cfs_quota_us", quota)
    write(tmp_path, "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000")
    assert read_cpu_limit(tmp_path) == limit


def test_a_container_gets_no_more_threads_than_its_share_and_never_none(tmp_path: Path) -> None:
    write(tmp_path, "sys/fs/cgroup/cpu.max", "350000 100000")
    assert choose_threads(tmp_path) == 3
    write(tmp_path, "sys/fs/cgroup/cpu.max", "50000 100000")
    assert choose_threads(tmp_path) == 1


def test_the_users_own_number_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7,2")
    assert choose_threads(tmp_path) == 7
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert choose_threads(tmp_path) == 4
