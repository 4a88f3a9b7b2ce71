"""The states of a server as seen from outside: loading, ready, draining, failed."""

import threading
from pathlib import Path

import httpx
import pytest

from server import __version__
from tests.fakes import EchoServerParts
from tests.unit.api.live_server import LiveServer, running_server

PROBES = ("/livez", "/readyz", "/health")


def probe(live: LiveServer) -> list[tuple[int, str]]:
    with live.client() as client:
        answers = [client.get(path) for path in PROBES]
    return [(a.status_code, a.json().get("status") or a.json()["error"]["code"]) for a in answers]


def test_ready_server(server: LiveServer) -> None:
    assert probe(server) == [(200, "alive"), (200, "ready"), (200, "ready")]
    with server.client() as client:
        version = client.get("/version").json()
    backbone = server.runtime.parts.backbone
    assert version == {
        "version": __version__,
        "backbone": {
            "name": backbone.name,
            "fingerprint": backbone.fingerprint,
            "path": backbone.path,
            "dtype": backbone.dtype_name,
            "device": backbone.device_name,
            "max_model_len": backbone.max_model_len,
            "kernel": backbone.kernel,
            "quantization": backbone.quantization,
            "compiled": backbone.compiled_state,
            "compiled_sizes": [4, 64],
        },
    }


def test_loading_server_is_alive_and_not_ready(data_dir: Path) -> None:
    parts = EchoServerParts()
    parts.load_gate.clear()
    with running_server(data_dir, parts=parts, wait=False) as live:
        assert probe(live) == [(200, "alive"), (503, "loading"), (503, "loading")]
        with live.client() as client:
            assert client.get("/version").json() == {"version": __version__, "backbone": None}
        refused = live.post({"model": "tiny/echo", "prompt": "x"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "loading")
        assert 1 <= int(refused.headers["retry-after"]) <= 30
        parts.load_gate.set()
        live.wait_until(lambda: live.runtime.state == "ready")
        assert live.post({"model": "tiny/echo", "prompt": "x"}).status_code == 200


def test_server_that_cannot_load_says_so_and_stays_up(data_dir: Path) -> None:
    parts = EchoServerParts()
    parts.load_error = RuntimeError("no such model")
    with running_server(data_dir, parts=parts) as live:
        assert live.runtime.state == "failed"
        assert live.runtime.failure == "no such model"
        assert probe(live) == [(503, "engine_failed")] * 3
        assert live.post({"model": "x", "prompt": "x"}).json()["error"]["code"] == "engine_failed"


def test_folder_of_another_server_is_a_failure_to_start(data_dir: Path) -> None:
    with running_server(data_dir), running_server(data_dir) as second:
        assert second.runtime.state == "failed"
        assert second.runtime.failure


def test_draining_server_refuses_the_new_and_finishes_the_running(data_dir: Path) -> None:
    with running_server(data_dir) as live:
        live.engine.gate.clear()
        answers: list[httpx.Response] = []
        body = {"model": "tiny/echo", "prompt": "x", "temperature": 0, "max_tokens": 64}
        running = threading.Thread(target=lambda: answers.append(live.post(body)))
        running.start()
        live.engine.wait_for(lambda engine: engine.num_rows == 1)
        loop = live.runtime._loop
        assert loop is not None
        loop.call_soon_threadsafe(live.runtime.start_drain)
        live.wait_until(lambda: live.runtime.state == "draining")

        assert probe(live) == [(200, "alive"), (503, "draining"), (503, "draining")]
        refused = live.post(body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert live.metric("draining") == 1
        live.engine.gate.set()
        running.join()

    assert answers[0].json()["choices"][0]["text"] == "[bare]x"


def test_server_stopped_while_loading_leaves_its_folder_free(data_dir: Path) -> None:
    parts = EchoServerParts()
    parts.load_gate.clear()
    with running_server(data_dir, parts=parts, wait=False):
        pass
    loader = next((thread for thread in threading.enumerate() if thread.name == "promptmux-load"), None)
    if loader is not None:
        loader.join(10)

    with running_server(data_dir) as live:
        assert live.runtime.state == "ready"


def test_metrics_show_the_engine_as_it_is_now(server: LiveServer) -> None:
    with server.client() as client:
        response = client.get("/metrics")

    assert response.headers["content-type"].startswith("text/plain")
    assert "promptmux_kv_cache_usage_ratio 0.5\n" in response.text
    assert 'promptmux_build_info{backbone="tiny/echo"' in response.text


def test_hanging_engine_is_noticed(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.runtime.watch.MIN_SILENCE_S", 0.1)
    monkeypatch.setattr("server.runtime.watch.WATCH_INTERVAL_S", 0.02)
    with running_server(data_dir) as live:
        live.engine.heartbeat_age_s = 1000.0
        live.engine.usual_step_s = 0.01
        assert probe(live)[0] == (200, "alive")  # nothing to do: nothing hangs
        live.engine.gate.clear()
        answers: list[httpx.Response] = []
        running = threading.Thread(target=lambda: answers.append(live.post({"model": "tiny/echo", "prompt": "x"})))
        running.start()
        running.join()
        assert probe(live)[0] == (503, "engine_failed")

    assert answers[0].json()["error"]["code"] == "engine_failed"
