"""The child process that compiles (`server.engine.compile_worker`), as seen by its parent.

Owns its command line, its environment, and its end: it never outlives the server, and is the first to go when memory
runs out. Refuses to know where packages belong.
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from server.engine.compile_worker import CompileRequest
from server.engine.host_memory import available_bytes
from server.engine.kernels.native import find_compiler

logger = logging.getLogger(__name__)

_ROOM = 2.0
_POLL_S = 0.2
_TERM_S, _KILL_S = 3.0, 10.0


class CompilerError(RuntimeError):
    """The package cannot be made here, or its making failed; the message says why."""


def run_child(request: CompileRequest, *, model_bytes: int, log: Path, stop: threading.Event) -> None:
    """Have `request.package` made; returns early when `stop` is set. What the child says goes to `log`.

    It loads the model once more: it is not started where twice `model_bytes` are not free. Raises CompilerError;
    NativeUnavailableError when there is no C++ compiler.
    """
    compiler = find_compiler()
    room = available_bytes()
    if room is not None and room < _ROOM * model_bytes:
        raise CompilerError(
            f"{room >> 20} MiB of memory are free, too little to load {model_bytes >> 20} MiB of weights once more"
        )
    environment = os.environ | {
        "CXX": compiler,
        "OMP_NUM_THREADS": "1",
        "TMPDIR": request.scratch,
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": request.scratch,
    }
    # -P: the folder in which the server was started is no place to import from.
    command = [sys.executable, "-P", "-m", "server.engine.compile_worker"]
    with log.open("wb") as output:
        child = subprocess.Popen(  # noqa: S603
            command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            _send(child, request.to_json() + "\n")
            # Its standard input stays open: when this process ends, however it ends, the child reads so.
            while child.poll() is None and not stop.wait(_POLL_S):
                pass
        finally:
            _end(child)
    if child.returncode != 0 and not stop.is_set():
        raise CompilerError(f"the compiler's process ended with {child.returncode}: {_last_line(log)}")


def _send(child: "subprocess.Popen[bytes]", text: str) -> None:
    if child.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(text.encode())
            child.stdin.flush()


def _end(child: "subprocess.Popen[bytes]") -> None:
    for sent, timeout_s in ((signal.SIGTERM, _TERM_S), (signal.SIGKILL, _KILL_S)):
        if child.poll() is None:
            # The whole group: the C++ compiler is a child of the child.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, sent)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout_s)
    if child.returncode is None:
        logger.warning("process %d does not end", child.pid)
    if child.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            child.stdin.close()


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:500] if lines else "it said nothing"
