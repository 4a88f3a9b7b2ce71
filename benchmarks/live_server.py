"""`promptmux serve` in a process of its own, measured from outside. Refuses to know what is asked of it."""

import argparse
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import httpx

from server.embedded import default_cache_dir

READY_TIMEOUT_S = 300.0


class BenchmarkError(RuntimeError):
    """The server did not do what was asked of it."""


class LiveServer:
    """A server on a free port of loopback. Use as a context manager: it is ready inside, and gone afterwards."""

    def __init__(self, args: argparse.Namespace, data_dir: Path, dtype: str, flags: Sequence[str] = ()) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-c", "from server.cli import main; main()", "serve"]
        command += [args.backbone] if args.backbone else []
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--data-dir", str(data_dir), "--dtype", dtype]
        command += ["--num-threads", str(args.threads), "--cache-dir", str(default_cache_dir()), "--audit-share", "0"]
        command += ["--log-level", "error", *flags]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def __enter__(self) -> Self:
        try:
            self.wait_until(lambda: httpx.get(f"{self.url}/readyz").status_code == 200)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.terminate()
        self._process.wait(timeout=60)

    def wait_until(self, is_so: Callable[[], bool], *, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Ask again and again. Raises BenchmarkError when it is not so in time, or the server has ended."""
        end_s = time.monotonic() + timeout_s
        while time.monotonic() < end_s:
            if self._process.poll() is not None:
                raise BenchmarkError(f"the server ended with code {self._process.returncode}")
            try:
                if is_so():
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.25)
        raise BenchmarkError(f"the server did not get there in {timeout_s:.0f} s")

    @property
    def compiled_sizes(self) -> list[int]:
        """Sizes of steps that are served compiled."""
        sizes: list[int] = httpx.get(f"{self.url}/version").json()["backbone"]["compiled_sizes"]
        return sizes

    def wait_until_compiled(self) -> None:
        """Wait until nothing is compiled any more beside serving."""
        self.wait_until(lambda: httpx.get(f"{self.url}/version").json()["backbone"]["compiled"] != "compiling")
