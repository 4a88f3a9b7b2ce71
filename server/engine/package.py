"""A compiled package's place in the cache: its key, its making once among processes, its loading, and sweeping up.

Refuses to know models and steps: it is told a model's fingerprint, and hands back what torch loaded.
"""

import contextlib
import hashlib
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock, Timeout

from server.engine.built_files import discard, is_whole, keep_newest, may_execute
from server.engine.compile_child import CompilerError, run_child
from server.engine.compile_worker import CompileRequest
from server.engine.kernels import native
from server.engine.packed_weights import Quantization, WeightForm

logger = logging.getLogger(__name__)

_SOURCES = (
    "attention.py",
    "compile_worker.py",
    "forward.py",
    "kernels/batch.py",
    "linear.py",
    "model_limits.py",
    "packed_weights.py",
)
_POLL_S = 0.2
_NUM_KEPT = 3
_LOADING = ".loading-"
_ABANDONED_S = 3600.0


class Package:
    """One backbone's package, there or not. Any thread may call its methods; `handle` is its graph's number."""

    def __init__(
        self,
        folder: Path,
        *,
        fingerprint: str,
        dtype: torch.dtype,
        form: WeightForm,
        quantization: Quantization,
        cache_dir: Path,
    ) -> None:
        """`folder` is where the model is loaded from. The native library has been loaded."""
        model = "\0".join((fingerprint, str(dtype), form, quantization))
        key = _key(model, folder / "config.json")
        self.handle = int(key[:15], 16)
        self._folder = cache_dir / "compiled"
        self._model_digest = hashlib.sha256(model.encode()).hexdigest()[:16]
        self.path = self._folder / f"{self._model_digest}-{key[:32]}.pt2"
        self.request = CompileRequest(
            folder=str(folder),
            dtype=str(dtype).removeprefix("torch."),
            form=form,
            quantization=quantization,
            handle=self.handle,
            package=str(self.path),
            scratch=str(self.path.with_suffix(".build")),
            native_folder=str(native.load_native(may_build=False).parent),
        )

    @property
    def inode(self) -> int | None:
        """Which file is there, whole; None: none."""
        return self.path.stat().st_ino if is_whole(self.path) else None

    def make(self, stop: threading.Event, *, model_bytes: int, unless: int | None = None) -> None:
        """Have the package made (minutes) unless it is there, or another process makes it first; until `stop` is set.

        A package whose inode is `unless` does not count: it is made again. Raises CompilerError, OSError, or
        NativeUnavailableError when there is no compiler.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        if not may_execute(self._folder):
            raise CompilerError(f"{self._folder} must not hold code (it is mounted noexec)")
        lock = FileLock(self.path.with_suffix(".lock"))
        while not stop.is_set():
            try:
                lock.acquire(timeout=0)
            except Timeout:
                stop.wait(_POLL_S)
                continue
            try:
                if (inode := self.inode) is None or inode == unless:
                    self._run_child(stop, model_bytes)
                return
            finally:
                lock.release()

    def load(self) -> Any:
        """What torch makes of it, without its weights. Takes a second or two. Raises what torch and zipfile raise."""
        # Imported here: it takes a second, which only a backbone with a package should pay.
        from torch.export.pt2_archive._package import AOTICompiledModel

        # Unpacked here, not by torch: that does so under /tmp, which may be mounted noexec, and leaves it there if it
        # fails. What has been mapped stays when the folder is gone.
        with tempfile.TemporaryDirectory(prefix=_LOADING, dir=self._folder) as unpacked:
            with zipfile.ZipFile(self.path) as archive:
                archive.extractall(unpacked)
            loader = torch._C._aoti.AOTIModelPackageLoader(unpacked, "model", False, 1, -1)
        with contextlib.suppress(OSError):
            os.utime(self.path)  # in use: not among the oldest
        return AOTICompiledModel(loader)

    def _run_child(self, stop: threading.Event, model_bytes: int) -> None:
        """Under the lock."""
        discard(self.path)
        self._sweep()
        scratch = Path(self.request.scratch)
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        start = time.monotonic()
        try:
            run_child(self.request, model_bytes=model_bytes, log=self.path.with_suffix(".log"), stop=stop)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        if not stop.is_set():
            logger.info("the forward pass was compiled in %.0f s", time.monotonic() - start)
            self._prune()

    def _sweep(self) -> None:
        """Remove what killed processes left behind; what another process is at work on stays."""
        for scratch in self._folder.glob("*.build"):
            with contextlib.suppress(Timeout), FileLock(scratch.with_suffix(".lock"), timeout=0):
                shutil.rmtree(scratch, ignore_errors=True)
        for unpacked in self._folder.glob(f"{_LOADING}*"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - unpacked.stat().st_mtime > _ABANDONED_S:
                    shutil.rmtree(unpacked, ignore_errors=True)

    def _prune(self) -> None:
        """Of this model's packages, made of older sources or by other versions, keep the newest few."""
        keep_newest(self._folder.glob(f"{self._model_digest}-*.pt2"), _NUM_KEPT)
        for log in self._folder.glob(f"{self._model_digest}-*.log"):
            if log != self.path.with_suffix(".log") and not log.with_suffix(".pt2").exists():
                log.unlink(missing_ok=True)


def _key(model: str, config: Path) -> str:
    """Digest of all that decides a package's contents: the model, its configuration, versions, instructions, our code.

    A configuration can change without the weights: windows, soft caps and epsilons are numbers in the graph.
    """
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for name in _SOURCES:
        digest.update(name.encode() + b"\0" + (folder / name).read_bytes() + b"\0")
    digest.update(hashlib.sha256(config.read_bytes()).digest())
    capabilities = ",".join(f"{name}={has}" for name, has in sorted(torch.cpu.get_capabilities().items()))
    library = native.library_path(Path(), native.usable_levels()[0]).name
    versions = (sys.version, torch.__version__, transformers.__version__, capabilities, library)
    digest.update("\0".join((model, *versions)).encode())
    return digest.hexdigest()
