"""Fixtures of the command line's tests: a task server on a real socket, and a clean environment."""

import subprocess
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
import structlog

from server.settings_sources import OTHER_ENV_NAMES
from tests.unit.api.live_server import LiveServer, running_server
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


@pytest.fixture
def _quiet() -> Iterator[None]:
    """The server runs in this process: its log lines must not mix with what a command prints."""
    was_configured, config = structlog.is_configured(), structlog.get_config()
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    yield
    structlog.reset_defaults()
    if was_configured:
        structlog.configure(**config)


@pytest.fixture
def live(tmp_path: Path, _quiet: None) -> Iterator[LiveServer]:
    with running_server(tmp_path / "data") as server:
        yield server


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Commands read variables and a file at home; those of whoever runs the tests do not count."""
    for name in OTHER_ENV_NAMES | {"PROMPTMUX_DATA_DIR"}:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "no config"))
