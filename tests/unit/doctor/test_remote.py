"""What the doctor finds at a running server: ready, loading, failed, elsewhere, and with alarming counters."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from server import __version__
from server.doctor.findings import Finding
from server.doctor.remote import check_server
from tests.fakes import EchoServerParts
from tests.unit.api.live_server import LiveServer, running_server


@pytest.fixture
def live(tmp_path: Path) -> Iterator[LiveServer]:
    with running_server(tmp_path / "data") as server:
        yield server


def findings(url: str, **arguments: httpx.BaseTransport) -> dict[str, Finding]:
    return {found.name: found for found in check_server(url, None, **arguments)}


def test_a_ready_server_is_ok(live: LiveServer) -> None:
    found = findings(live.url)

    assert list(found) == ["server", "served backbone", "health", "load", "metrics"]
    assert {name for name, item in found.items() if item.status == "wrong"} == set()
    assert found["health"].status == "ok"
    assert found["metrics"].status == "ok"
    assert __version__ in found["server"].detail


def test_a_server_that_loads_is_slow_to_answer(tmp_path: Path) -> None:
    parts = EchoServerParts()
    parts.load_gate.clear()
    with running_server(tmp_path / "data", parts=parts, wait=False) as live:
        found = findings(live.url)
        parts.load_gate.set()

    assert found["served backbone"].status == "slow"
    assert found["health"].status == "slow"
    assert "loading" in found["health"].detail


def test_an_engine_that_has_failed_is_wrong(live: LiveServer) -> None:
    live.engine.crash("boom")
    live.wait_until(lambda: httpx.get(f"{live.url}/livez").status_code == 503)

    found = findings(live.url)

    assert found["health"].status == "wrong"
    assert "engine_failed" in found["health"].detail


def test_rows_stopped_by_the_isolation_check_are_wrong(live: LiveServer) -> None:
    live.runtime.metrics.isolation_violations_total.inc(3)

    found = findings(live.url)

    assert (found["metrics"].status, found["metrics"].detail[:1]) == ("wrong", "3")
    assert "promptmux check" in (found["metrics"].advice or "")


def test_no_server_and_another_server_are_wrong() -> None:
    page = httpx.MockTransport(lambda request: httpx.Response(200, text="<html>"))

    assert findings("http://127.0.0.1:1")["server"].status == "wrong"
    assert findings("http://elsewhere", transport=page)["server"].status == "wrong"


def test_metrics_that_are_kept_from_clients_are_passed_over(live: LiveServer) -> None:
    class WithoutMetrics(httpx.HTTPTransport):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            if request.url.path == "/metrics":
                return httpx.Response(404)
            return super().handle_request(request)

    assert findings(live.url, transport=WithoutMetrics())["metrics"].status == "ok"
