"""A server over the echo engine on a real port, silent; and one whose streams a test writes byte by byte."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import structlog

from tests.unit.api.live_server import LiveServer, running_server

RawServer = Callable[[bytes], AbstractContextManager[str]]


@pytest.fixture
def live(tmp_path: Path) -> Iterator[LiveServer]:
    was_configured, config = structlog.is_configured(), structlog.get_config()
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    with running_server(tmp_path / "data") as server:
        yield server
    structlog.reset_defaults()
    if was_configured:
        structlog.configure(**config)


@pytest.fixture
def raw_server() -> RawServer:
    """Answers every request with the same bytes and closes the connection: what no sound server does."""
    return _raw_server


@contextmanager
def _raw_server(reply: bytes) -> Iterator[str]:
    started, stopped = threading.Event(), asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []
    ports: list[int] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if b"content-length" in line)
        await reader.readexactly(length)
        writer.write(reply)
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            ports.append(server.sockets[0].getsockname()[1])
            started.set()
            await stopped.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert started.wait(10)
    try:
        yield f"http://127.0.0.1:{ports[0]}"
    finally:
        loops[0].call_soon_threadsafe(stopped.set)
        thread.join(10)
        assert not thread.is_alive()
