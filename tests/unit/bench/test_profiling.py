"""The profile sees what other threads do, and its trace is one that Chrome reads."""

import json
import threading
from pathlib import Path

import pytest
import torch

from server.bench.profiling import Profiler


def test_operators_of_a_thread_that_ran_before_are_counted(tmp_path: Path) -> None:
    begin = threading.Event()

    def work() -> None:
        assert begin.wait(10)
        for _ in range(7):
            torch.mm(torch.ones(8, 8), torch.ones(8, 8))

    thread = threading.Thread(target=work)
    thread.start()
    profiler = Profiler(tmp_path / "trace.json")
    with profiler:
        begin.set()
        thread.join()

    found = {operator.name: operator for operator in profiler.operators}
    assert found["aten::mm"].num_calls == 7
    assert found["aten::mm"].self_cpu_s > 0
    times = [operator.self_cpu_s for operator in profiler.operators]
    assert times == sorted(times, reverse=True)
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert sum(event.get("name") == "aten::mm" for event in trace["traceEvents"]) == 7


def test_a_trace_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), Profiler(tmp_path / "no folder" / "trace.json"):
        torch.ones(2)


def test_an_error_inside_is_not_replaced_by_another(tmp_path: Path) -> None:
    with pytest.raises(KeyError), Profiler(tmp_path / "no folder" / "trace.json"):
        raise KeyError
