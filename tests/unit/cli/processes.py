"""Server processes that tests start, signal and wait for."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[3]
END_TIMEOUT_S = 30

StartProcess = Callable[..., tuple["subprocess.Popen[str]", str]]


def start(module: str, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-m", module, *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True)


def run_command(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """`promptmux` with these arguments, to its end: for what must refuse to serve, and would hang if it did not."""
    program = "from server.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=END_TIMEOUT_S,
        check=False,
    )


def wait_for_address(process: "subprocess.Popen[str]") -> str:
    """The address that it prints once it is ready."""
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"promptmux serves \S+ at (http://\S+)", line):
            return found[1]
    pytest.fail("the process ended before it was ready")


def wait_until_draining(url: str) -> None:
    """Asks until it says so; pytest's own time limit ends a wait in vain."""
    while True:
        try:
            if httpx.get(f"{url}/readyz", timeout=5).status_code == 503:
                return
        except httpx.TransportError as error:
            pytest.fail(f"it ended instead of draining: {error}")
