"""Fixtures of the command line's tests: a task server on a real socket, and a clean environment."""

import subprocess
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer

import pytest

from tests.unit.cli.processes import StartProcess, start, wait_for_address
from tests.unit.cli.task_server import TaskHandler, TaskServer


@pytest.fixture
def task_server() -> Iterator[TaskServer]:
    state = TaskServer()
    handler = type("Handler", (TaskHandler,), {"state": state})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        state.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield state
        server.shutdown()
        thread.join()


@pytest.fixture
def start_process() -> Iterator[StartProcess]:
    """Starts a module as a process and waits until it serves; whatever is left is killed afterwards."""
    started: list[subprocess.Popen[str]] = []

    def start_and_wait(module: str, *arguments: str) -> tuple[subprocess.Popen[str], str]:
        process = start(module, *arguments)
        started.append(process)
        return process, wait_for_address(process)

    yield start_and_wait
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands read variables; those of whoever runs the tests do not count."""
    for name in ("PROMPTMUX_URL", "PROMPTMUX_KEY", "PROMPTMUX_CONFIG", "PROMPTMUX_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
