"""The process that serves the app: uvicorn, with a drain before its end and a word to the person at the terminal.

Owns signals, the order of the end (refuse new requests, let the running ones finish, end the rest with an error event,
close), the end of a process whose engine has failed, and the exit code. Refuses to know what a request is: it counts
uvicorn's open requests.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import Any, NoReturn

import structlog
import uvicorn
from rich.console import Console

from server.cli.hints import next_steps
from server.cli.output import ExitCode, say
from server.errors import AuthenticationError, PromptmuxError
from server.runtime.service import Runtime
from server.settings import Settings

# How long connections may linger once every request has ended; a client that reads nothing is not waited for.
_CLOSE_TIMEOUT_S = 5

_log = structlog.get_logger("promptmux.serve")


class DrainingServer(uvicorn.Server):
    """uvicorn, but a signal first drains: it listens, and answers 503, until the running requests are done."""

    def __init__(self, app: Any, settings: Settings) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                # Ours are set up already; the access line is the app's, with what uvicorn cannot know.
                log_config=None,
                access_log=False,
                server_header=False,
                ws="none",
                lifespan="on",
                timeout_graceful_shutdown=_CLOSE_TIMEOUT_S,
            )
        )
        self._runtime: Runtime = app.state.runtime
        self._settings = settings
        self._is_signalled = False
        self._signalled = asyncio.Event()
        self._exit_code = ExitCode.OK

    def serve_on(self, listener: socket.socket) -> NoReturn:
        """Serves until a signal or a failure ends it, and the process with it."""
        self.run(sockets=[listener])
        _log.info("stopped")
        # All that is to last is written. The interpreter's own end takes seconds, to free a backbone and whatever was
        # imported piece by piece, and a thread that hangs on the device could hold it up for ever.
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(self._exit_code)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Not uvicorn's own, which closes the sockets at once and raises the signal again afterwards."""
        if self._is_signalled:
            os._exit(128 + sig)
        self._is_signalled = True
        self._loop.call_soon_threadsafe(self._signalled.set)

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        # uvicorn takes over the signals in here.
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        port = self.servers[0].sockets[0].getsockname()[1]
        _log.info("listening", host=self._settings.host, port=port)
        self._watchers = [
            asyncio.create_task(self._drain_when_signalled()),
            asyncio.create_task(self._watch_loading(port)),
            asyncio.create_task(self._end_when_engine_failed()),
        ]
        self._loop.add_signal_handler(signal.SIGHUP, self._reload)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop.remove_signal_handler(signal.SIGHUP)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        await super().shutdown(sockets)

    def _reload(self) -> None:
        """Settings that are wrong are told, and the old ones stay in force."""
        try:
            self._runtime.reload()
        except PromptmuxError as error:
            _log.error("reload_failed", error=error.message, setting=error.param)

    async def _drain_when_signalled(self) -> None:
        await self._signalled.wait()
        deadline = self._loop.time() + self._settings.drain_timeout_s
        _log.info("draining", open_requests=len(self.server_state.tasks), timeout_s=self._settings.drain_timeout_s)
        self._runtime.start_drain()
        while self.server_state.tasks and (left_s := deadline - self._loop.time()) > 0:
            await asyncio.wait(set(self.server_state.tasks), timeout=left_s)
        await self._runtime.stop()
        self.should_exit = True

    async def _watch_loading(self, port: int) -> None:
        """Waits for the backbone, then says what to try; a backbone that does not load ends the process."""
        with _spinner():
            await self._runtime.wait_until_settled()
        if self._runtime.state == "failed":
            self._exit_code = ExitCode.FAILED
            self.should_exit = True
            say(f"error: {self._runtime.failure}")
        elif self._runtime.state == "ready":
            name = self._runtime.parts.backbone.name
            for line in next_steps(self._settings, name, port, has_keys=await self._has_keys()):
                say(line)

    async def _end_when_engine_failed(self) -> None:
        """Ends the process as a signal would, so that whoever supervises it starts another; probes see it first."""
        await self._runtime.wait_until_engine_failed()
        self._exit_code = ExitCode.FAILED
        say(f"error: the engine has failed: {self._runtime.failure}")
        await asyncio.sleep(self._settings.failure_grace_s)
        self._signalled.set()

    async def _has_keys(self) -> bool:
        try:
            await self._runtime.call(self._runtime.keys.check, None)
        except AuthenticationError:
            return True
        return False


def _spinner() -> AbstractContextManager[object]:
    return Console(stderr=True).status("loading the backbone") if sys.stderr.isatty() else nullcontext()
