"""A process for the tests of signals: the real `DrainingServer` around the smallest app that can drain.

    python -m tests.unit.cli.drainable_app [--fail] [--timeout SECONDS] [--hangs]

`/stream` sends a line, waits until `/finish` is called or the runtime stops, and tells in a last line which it was.
"""

import argparse
import asyncio
import threading
from types import SimpleNamespace
from typing import Any

from server.cli.draining import DrainingServer
from server.cli.serve import bind
from server.errors import InvalidRequestError
from server.settings import Settings


class Keys:
    def check(self, authorization: str | None) -> None:
        pass


class TinyRuntime:
    """What the process uses of a runtime."""

    def __init__(self, *, fails: bool) -> None:
        self.state = "failed" if fails else "ready"
        self.failure = "no such folder: /models/x" if fails else None
        self.parts = SimpleNamespace(backbone=SimpleNamespace(name="tiny"))
        self.keys = Keys()
        self.num_reloads = 0
        self.finished = asyncio.Event()
        self.stopped = asyncio.Event()

    async def wait_until_settled(self) -> None:
        await asyncio.sleep(0)

    async def wait_until_engine_failed(self) -> None:
        await asyncio.Event().wait()

    async def call(self, function: Any, *arguments: Any) -> Any:
        return function(*arguments)

    def reload(self) -> None:
        self.num_reloads += 1
        raise InvalidRequestError("no such setting", param="max_rwos")

    def start_drain(self) -> None:
        self.state = "draining"

    async def stop(self) -> None:
        self.stopped.set()
        # The rest of a stream is written by its own task.
        await asyncio.sleep(0.05)


class TinyApp:
    def __init__(self, runtime: TinyRuntime) -> None:
        self.state = SimpleNamespace(runtime=runtime)
        self._runtime = runtime

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while (message := await receive())["type"] != "lifespan.shutdown":
                await send({"type": message["type"] + ".complete"})
            await send({"type": "lifespan.shutdown.complete"})
            return
        status = 503 if self._runtime.state == "draining" and scope["path"] != "/finish" else 200
        if scope["path"] == "/reloaded" and not self._runtime.num_reloads:
            status = 404
        await send({"type": "http.response.start", "status": status, "headers": []})
        if scope["path"] == "/finish":
            self._runtime.finished.set()
        if scope["path"] == "/stream" and status == 200:
            await send({"type": "http.response.body", "body": b"begun\n", "more_body": True})
            waits = [asyncio.ensure_future(event.wait()) for event in (self._runtime.finished, self._runtime.stopped)]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
            last = b"finished\n" if self._runtime.finished.is_set() else b"error\n"
            await send({"type": "http.response.body", "body": last, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fail", action="store_true")
    parser.add_argument("--timeout", type=float, default=30.0)
    parser.add_argument("--hangs", action="store_true", help="a thread goes on when all else has ended")
    arguments = parser.parse_args()
    if arguments.hangs:
        threading.Thread(target=threading.Event().wait).start()
    settings = Settings(port=0, drain_timeout_s=arguments.timeout)
    server = DrainingServer(TinyApp(TinyRuntime(fails=arguments.fail)), settings)
    return server.serve_on(bind("127.0.0.1", 0))


if __name__ == "__main__":
    raise SystemExit(main())
