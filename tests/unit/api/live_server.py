"""A server on a real port of loopback, in a thread, over the echo engine."""

import asyncio
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from server.app import create_app
from server.runtime.service import Runtime
from server.settings import Settings
from tests.fakes import EchoEngine, EchoServerParts, make_prompt_config, make_prompt_file

TIMEOUT_S = 10.0
# Nothing here is encrypted; httpx would read all certificates anew for each client.
_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


class LiveServer:
    """What a test needs of a running server."""

    def __init__(self, server: uvicorn.Server, parts: EchoServerParts, runtime: Runtime, port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.parts = parts
        self.runtime = runtime
        self._server = server

    @property
    def engine(self) -> EchoEngine:
        assert self.parts.engine is not None
        return self.parts.engine

    def client(self, **arguments: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=TIMEOUT_S, verify=_TLS, **arguments)

    def post(self, body: Any, **arguments: Any) -> httpx.Response:
        """One completion."""
        with self.client() as client:
            return client.post("/v1/completions", json=body, **arguments)

    def upload(self, task: str, value: float = 0.5, *, key: str | None = None, **fields: str) -> httpx.Response:
        files = {
            "file": ("adapter_model.safetensors", make_prompt_file(value)),
            "config": ("adapter_config.json", make_prompt_config()),
        }
        headers = {"authorization": f"Bearer {key}"} if key else {}
        with self.client() as client:
            return client.post(f"/v1/tasks/{task}/versions", data=fields, files=files, headers=headers)

    def metric(self, name: str, **labels: str) -> float:
        """A sample's value; 0 while there is no such series."""
        return self.runtime.metrics.registry.get_sample_value(f"promptmux_{name}", labels) or 0.0

    def wait_for_metric(self, expected: float, name: str, **labels: str) -> None:
        """A request is counted after its answer: waits until the sample has come to `expected`, at least."""
        self.wait_until(lambda: self.metric(name, **labels) >= expected)

    def wait_until(self, condition: Any) -> None:
        """Polls what no event tells of; fails when it does not come to hold."""
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            assert time.monotonic() < deadline, "it never came to hold"
            time.sleep(0.005)

    def wait_until_idle(self) -> None:
        self.wait_until(lambda: self.runtime.num_running_requests == 0)


@contextmanager
def running_server(
    data_dir: Path, *, parts: EchoServerParts | None = None, wait: bool = True, **settings: Any
) -> Iterator[LiveServer]:
    parts = parts or EchoServerParts()
    app = create_app(
        Settings(data_dir=data_dir, **settings), load_backbone=parts.load_backbone, make_engine=parts.make_engine
    )
    with serving(app) as (server, port):
        try:
            live = LiveServer(server, parts, app.state.runtime, port)
            if wait:
                live.wait_until(lambda: live.runtime.state != "loading")
            yield live
        finally:
            parts.load_gate.set()


@contextmanager
def serving(app: FastAPI) -> Iterator[tuple[uvicorn.Server, int]]:
    """The app on a port of its own, in a thread that ends with the block."""
    config = uvicorn.Config(
        app, port=0, log_config=None, access_log=False, lifespan="on", timeout_graceful_shutdown=1, ws="none"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), name="live-server")
    thread.start()
    try:
        yield server, _wait_for_port(server, thread)
    finally:
        server.should_exit = True
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()


def _wait_for_port(server: uvicorn.Server, thread: threading.Thread) -> int:
    deadline = time.monotonic() + TIMEOUT_S
    while not server.started:
        assert thread.is_alive(), "the server has ended"
        assert time.monotonic() < deadline, "the server did not start"
        time.sleep(0.002)
    port: int = server.servers[0].sockets[0].getsockname()[1]
    return port
