"""A backbone's forward pass as a compiled package: made in the background, tried on real steps, used where faster.

Owns when the package is made (`server.engine.package`), the binding of weights, pool and step to it, and what serves a
step. Refuses to plan steps or to know models: it is given a step's tensors and an eager way to compute the same, and
returns logits. Whatever goes wrong, the eager way serves and the reason is logged and kept.

The first steps of every size are computed both ways by the engine's thread, on the same tensors; the eager answer is
the one that is used. A size is then served by what was faster there. Logits that differ by more than rounding may do
end the package for good.
"""

import logging
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from server.engine.gate import TOLERANCE
from server.engine.kernels.batch import NO_SLOT, PagedBatch
from server.engine.kv import KvPool
from server.engine.package import Package
from server.engine.packed_weights import Quantization, WeightForm
from server.engine.status import CompiledState
from server.engine.trial import Trial, difference_of_logits

logger = logging.getLogger(__name__)

_MIN_SIZE = 2
_STOP_TIMEOUT_S = 30.0

_handles: set[int] = set()
"""Handles in use: a graph has its handle for good, so that a second engine would read the first one's pool."""


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
        self._form = form
        # The child reads the files as they are stored, which may be wider than what is served.
        stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        loaded = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
        self._model_bytes = max(stored, loaded)
        self._package = Package(
            folder,
            fingerprint=fingerprint,
            dtype=dtype,
            form=form,
            quantization=quantization,
            cache_dir=cache_dir,
        )
        self.handle = self._package.handle
        self._step: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None
        self._constants: dict[str, torch.Tensor] = {}
        self._bound: KvPool | None = None
        self._trials: dict[int, Trial] = {}
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self.state: CompiledState = "off"
        self.reason: str | None = None

    @property
    def is_ready(self) -> bool:
        """Whether there is a loaded package that has not failed."""
        return self._step is not None

    @property
    def is_settled(self) -> bool:
        """Whether nothing is being compiled, and no size that was begun is still on trial. Any thread."""
        if self.state == "compiling":
            return False
        return self._step is None or all(trial.is_over for trial in list(self._trials.values()))

    @property
    def faster_sizes(self) -> list[int]:
        """Sizes served compiled: s stands for steps of s to 2s - 1 tokens."""
        return sorted(size for size, trial in list(self._trials.items()) if trial.is_over and trial.is_faster)

    def start(self) -> None:
        """Load the package, having it compiled first (minutes) where there is none; returns at once."""
        if self._thread is not None or self.state != "off":
            return
        if self._form == "onednn":
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
            self._thread.join(_STOP_TIMEOUT_S)
            if self._thread.is_alive():
                logger.warning("the thread that compiles does not end")
            else:
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
        trial = self._trials.setdefault(size, Trial())
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
        eager_s = time.perf_counter() - start
        difference = difference_of_logits(logits, expected)
        if difference is not None:
            trial.add(eager_s=eager_s, compiled_s=compiled_s, difference=difference)
            self._judge(size, trial)
        return expected

    def _judge(self, size: int, trial: Trial) -> None:
        fault = trial.fault(TOLERANCE[self._dtype])
        if fault is not None:
            self._end("failed", f"compiled {fault}, for {size} tokens or more")
        elif trial.is_over:
            logger.info(
                "steps of %d to %d tokens: compiled %.1f ms, eager %.1f ms",
                size, 2 * size - 1, statistics.median(trial.compiled_s) * 1e3, statistics.median(trial.eager_s) * 1e3,
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
        package = self._package
        try:
            found = package.inode
            if found is None:
                package.make(self._stop, model_bytes=self._model_bytes)
            try:
                self._load()
            except Exception as error:
                if found is None:
                    raise
                logger.warning("the compiled package is made again, it cannot be loaded: %s", error)
                package.make(self._stop, model_bytes=self._model_bytes, unless=found)
                self._load()
        except Exception as error:
            self._end("failed", f"{type(error).__name__}: {error}")

    def _load(self) -> None:
        if self._stop.is_set():
            return
        loaded = self._package.load()
        own = self._own_tensors()
        wanted = loaded.get_constant_fqns()
        missing = [name for name in wanted if name.removeprefix("model.") not in own]
        if missing:
            raise RuntimeError(f"the package wants weights that the model lacks: {', '.join(missing[:3])}")
        self._constants = {name: own[name.removeprefix("model.")] for name in wanted}
        loaded.load_constants(self._constants, check_full_update=True, user_managed=True)
        if not self._stop.is_set():
            self._step = loaded
            self.state = "trial"

    def _own_tensors(self) -> dict[str, torch.Tensor]:
        """Weights and buffers, tied ones under each of their names."""
        own: dict[str, torch.Tensor] = {}
        own |= self._model.named_parameters(remove_duplicate=False)
        own |= self._model.named_buffers(remove_duplicate=False)
        return own

    def _end(self, state: CompiledState, reason: str | None) -> None:
        self._step = None
        if self._stop.is_set() and state == "failed":
            return  # what was cut short has not failed
        self.state, self.reason = state, reason
        if self._bound is not None:
            torch.ops.promptmux.unbind_pool(self.handle)
            self._bound = None
        if reason is not None:
            logger.warning("steps run uncompiled: %s", reason)
