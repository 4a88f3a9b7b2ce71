"""/metrics on a port of its own."""

import socket
from pathlib import Path

import httpx
import pytest

from server.api.metrics_server import metrics_listener
from server.app import create_app
from server.runtime.service import Runtime
from server.settings import Settings
from tests.fakes import EchoServerParts


def make_runtime(data_dir: Path, metrics_port: int | None) -> Runtime:
    parts = EchoServerParts()
    settings = Settings(data_dir=data_dir, metrics_port=metrics_port)
    runtime = create_app(settings, load_backbone=parts.load_backbone, make_engine=parts.make_engine).state.runtime
    assert isinstance(runtime, Runtime)
    return runtime


def test_port_of_its_own_needs_no_key_and_is_gone_afterwards(data_dir: Path) -> None:
    runtime = make_runtime(data_dir, 0)
    runtime.metrics.num_preemptions_total.inc(7)
    with metrics_listener(runtime) as port:
        text = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
        assert "promptmux_num_preemptions_total 7.0" in text
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False)


def test_without_the_setting_nothing_listens(data_dir: Path) -> None:
    with metrics_listener(make_runtime(data_dir, None)) as port:
        assert port is None


def test_port_that_is_taken_is_an_error(data_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        runtime = make_runtime(data_dir, taken.getsockname()[1])
        with pytest.raises(OSError, match="in use"), metrics_listener(runtime):
            pass
