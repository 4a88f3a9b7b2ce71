"""A backbone's forward pass as a compiled package: made in the background, tried on real steps, used where faster.

Owns the package's place in the cache, the child process that makes it (`server.engine.compile_worker`), its loading,
and the trial that decides. Refuses to plan steps or to know models: it is given a step's tensors and an eager way to
compute the same, and returns logits. Whatever goes wrong, the eager way serves and the reason is logged and kept.

The first steps of every size are computed both ways by the engine's thread, on the same tensors; the eager answer is
the one that is used. A size is then served by what was faster there. Logits that differ by more than rounding may do
end the package for good.
"""

import contextlib
import hashlib
import logging
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import transformers
from filelock import FileLock, Timeout
from torch import nn

from server.engine.compile_worker import CompileRequest
from server.engine.gate import TOLERANCE
from server.engine.kernels import native
from server.engine.kernels.batch import NO_SLOT, PagedBatch
from server.engine.kv import KvPool
from server.engine.packed_weights import Quantization, WeightForm

logger = logging.getLogger(__name__)

CompiledState = Literal["idle", "compiling", "trial", "failed", "stopped"]

_NUM_TRIALS = 4
_WORTH = 0.97
_USUAL, _FAR = 2.0, 5.0
_MIN_SIZE = 2
_SOURCES = ("compile_worker.py", "linear.py", "packed_weights.py", "attention.py", "forward.py")
_POLL_S = 0.2

_handles: set[int] = set()
"""Handles in use: a graph has its handle for good, so that a second engine would read the first one's pool."""


@dataclass(slots=True)
class _Trial:
    """Seconds and differences of the steps of one size that were computed both ways."""

    eager_s: list[float] = field(default_factory=list)
    compiled_s: list[float] = field(default_factory=list)
    differences: list[float] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        return len(self.differences) >= _NUM_TRIALS

    @property
    def is_faster(self) -> bool:
        return min(self.compiled_s) < _WORTH * min(self.eager_s)


class CompiledForward:
    """One backbone's compiled step. `start` and `stop` from any thread; `run` from the engine's thread alone.

    `model` has been through `prepare_linears` with the given form and quantization, and runs under the engine's
    attention function; `folder` is where it was loaded from. The package's graph finds pool and step under `handle`.
    """

    def __init__(
        self,
        model: nn.Module,
        folder: Path,
        *,
        fingerprint: str,
        dtype: torch.dtype,
        form: WeightForm,
        quantization: Quantization,
        cache_dir: Path,
    ) -> None:
        self._model = model
        self._dtype = dtype
        key = _package_key(fingerprint, dtype, form, quantization)
        self.handle = int(key[:15], 16)
        self.package = cache_dir / "compiled" / f"{key[:32]}.pt2"
        self._scratch = self.package.with_suffix(".build")
        self._request = CompileRequest(
            folder=str(folder),
            dtype=str(dtype).removeprefix("torch."),
            form=form,
            quantization=quantization,
            handle=self.handle,
            package=str(self.package),
        )
        self._step: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None
        self._constants: dict[str, torch.Tensor] = {}
        self._bound: KvPool | None = None
        self._trials: dict[int, _Trial] = {}
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self.state: CompiledState = "idle"
        self.reason: str | None = None

    @property
    def is_ready(self) -> bool:
        """Whether there is a loaded package that has not failed."""
        return self._step is not None

    @property
    def faster_sizes(self) -> list[int]:
        """Sizes served compiled: s stands for steps of s to 2s - 1 tokens."""
        return sorted(size for size, trial in self._trials.items() if trial.is_over and trial.is_faster)

    def start(self) -> None:
        """Load the package, having it compiled first (minutes) where there is none; returns at once."""
        if self._thread is not None or self.state != "idle":
            return
        if self._request.form == "onednn":
            self._end("failed", "weights in oneDNN's own layout cannot be handed to a package")
        elif self.handle in _handles:
            self._end("failed", "another engine of this process runs the same backbone compiled")
        else:
            _handles.add(self.handle)
            self.state = "compiling"
            self._thread = threading.Thread(target=self._prepare, name="compile", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the child process, if one runs, and wait for it. No step may be running; later ones run eagerly."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            _handles.discard(self.handle)
        self._end("stopped", None)

    def run(
        self,
        eager: Callable[[], torch.Tensor],
        embeds: torch.Tensor,
        positions: torch.Tensor,
        logits_tokens: torch.Tensor,
        pool: KvPool,
        batch: PagedBatch,
    ) -> torch.Tensor:
        """Logits `[L, vocab_size]` of one step, by whichever way serves this size; never raises for the package.

        `embeds [T, hidden_size]`, `positions [T]` and `logits_tokens [L]` int64, L ≥ 1. `eager` computes the same from
        the same tensors, writing the same places of the pool.
        """
        if self._step is None:
            return eager()
        size = 1 << (max(len(positions), 1).bit_length() - 1)
        trial = self._trials.setdefault(size, _Trial())
        if trial.is_over and not trial.is_faster:
            return eager()
        try:
            start = time.perf_counter()
            logits = self._call(embeds, positions, logits_tokens, pool, batch)
            compiled_s = time.perf_counter() - start
        except Exception as error:
            self._end("failed", f"{type(error).__name__}: {error}")
            return eager()
        if trial.is_over:
            return logits
        # Eager second: what stays in the pool is what the answer was made of.
        start = time.perf_counter()
        expected = eager()
        trial.eager_s.append(time.perf_counter() - start)
        trial.compiled_s.append(compiled_s)
        trial.differences.append(_difference(logits, expected))
        self._judge(size, trial)
        return expected

    def _judge(self, size: int, trial: _Trial) -> None:
        allowed = TOLERANCE[self._dtype]
        # The gate's tolerance is for many rows together; a single one may lie farther off by rounding alone.
        worst = max(trial.differences)
        usual = statistics.median(trial.differences) if trial.is_over else 0.0
        if not worst <= _FAR * allowed or not usual <= _USUAL * allowed:
            self._end("failed", f"compiled logits differ by {worst:.1e} for {size} tokens (allowed {allowed:.0e})")
        elif trial.is_over:
            logger.info(
                "steps of %d to %d tokens: compiled %.1f ms, eager %.1f ms",
                size, 2 * size - 1, min(trial.compiled_s) * 1e3, min(trial.eager_s) * 1e3,
            )  # fmt: skip

    def _call(
        self,
        embeds: torch.Tensor,
        positions: torch.Tensor,
        logits_tokens: torch.Tensor,
        pool: KvPool,
        batch: PagedBatch,
    ) -> torch.Tensor:
        step = self._step
        if step is None:
            raise RuntimeError("there is no package")
        num_logits = len(logits_tokens)
        write_slots = batch.write_slots
        if (missing := _MIN_SIZE - len(positions)) > 0:
            embeds, positions = F.pad(embeds, (0, 0, 0, missing)), F.pad(positions, (0, missing))
            write_slots = F.pad(write_slots, (0, missing), value=NO_SLOT)
        if (missing := _MIN_SIZE - num_logits) > 0:
            logits_tokens = F.pad(logits_tokens, (0, missing))
        operators = torch.ops.promptmux
        if self._bound is not pool:
            operators.bind_pool(self.handle, pool.key_pages, pool.value_pages)
            self._bound = pool
        operators.set_step(self.handle, batch.page_table, batch.lengths, batch.query_starts, write_slots)
        try:
            return step(embeds.unsqueeze(0), positions.unsqueeze(0), logits_tokens)[:num_logits]
        finally:
            operators.clear_step(self.handle)

    def _prepare(self) -> None:
        try:
            self.package.parent.mkdir(parents=True, exist_ok=True)
            if not self.package.exists():
                self._compile()
            # Left behind where a server was killed while its child went on.
            shutil.rmtree(self._scratch, ignore_errors=True)
            if not self._stop.is_set():
                self._load()
        except Exception as error:
            self._end("failed", f"{type(error).__name__}: {error}")

    def _compile(self) -> None:
        """Have the child make the package, unless another process makes it first. Raises RuntimeError."""
        lock = FileLock(self.package.with_suffix(".lock"))
        while not self._stop.is_set():
            try:
                lock.acquire(timeout=0)
            except Timeout:
                self._stop.wait(_POLL_S)
                continue
            try:
                if not self.package.exists():
                    self._run_child()
                return
            finally:
                lock.release()

    def _run_child(self) -> None:
        log = self.package.with_suffix(".log")
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(self._scratch),
        }
        command = [sys.executable, "-m", "server.engine.compile_worker"]
        start = time.monotonic()
        try:
            with log.open("wb") as output:
                child = subprocess.Popen(  # noqa: S603
                    command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env=environment,
                    start_new_session=True,
                )  # fmt: skip
                try:
                    with contextlib.suppress(BrokenPipeError):
                        child.communicate(self._request.to_json().encode(), timeout=_POLL_S)
                except subprocess.TimeoutExpired:
                    while child.poll() is None and not self._stop.wait(_POLL_S):
                        pass
                finally:
                    if child.poll() is None:
                        # The whole group: the C++ compiler is a child of the child.
                        os.killpg(child.pid, signal.SIGTERM)
                    child.wait()
            if self._stop.is_set():
                return
            if child.returncode != 0:
                raise RuntimeError(f"the compiler's process ended with {child.returncode}: {_last_line(log)}")
            logger.info("the forward pass was compiled in %.0f s", time.monotonic() - start)
        finally:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _load(self) -> None:
        # Imported here: it takes a second, which only a backbone with a package should pay.
        from torch._inductor import aoti_load_package

        loaded: Any = aoti_load_package(str(self.package))
        # Tied weights under each of their names.
        own: dict[str, torch.Tensor] = {}
        own |= self._model.named_parameters(remove_duplicate=False)
        own |= self._model.named_buffers(remove_duplicate=False)
        wanted = loaded.get_constant_fqns()
        missing = [name for name in wanted if name.removeprefix("model.") not in own]
        if missing:
            raise RuntimeError(f"the package wants weights that the model lacks: {', '.join(missing[:3])}")
        self._constants = {name: own[name.removeprefix("model.")] for name in wanted}
        loaded.load_constants(self._constants, check_full_update=True, user_managed=True)
        self.state = "trial"
        self._step = loaded

    def _end(self, state: CompiledState, reason: str | None) -> None:
        self._step = None
        self.state, self.reason = state, reason
        if self._bound is not None:
            torch.ops.promptmux.unbind_pool(self.handle)
            self._bound = None
        if reason is not None:
            logger.warning("steps run uncompiled: %s", reason)


def _package_key(fingerprint: str, dtype: torch.dtype, form: WeightForm, quantization: Quantization) -> str:
    """Digest of all that decides a package's contents: weights' shapes, versions, instructions, and our own code."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for name in _SOURCES:
        digest.update(name.encode() + b"\0" + (folder / name).read_bytes() + b"\0")
    capabilities = ",".join(f"{name}={has}" for name, has in sorted(torch.cpu.get_capabilities().items()))
    library = native.library_path(Path(), native.usable_levels()[0]).name
    versions = (sys.version, torch.__version__, transformers.__version__, capabilities, library)
    digest.update("\0".join((fingerprint, str(dtype), form, quantization, *versions)).encode())
    return digest.hexdigest()


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root-mean-square difference over the expected logits' spread; NaN where there is one."""
    wide = expected.float()
    return float((found.float() - wide).square().mean().sqrt() / wide.std().clamp_min(1e-6))


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:500] if lines else "it said nothing"
