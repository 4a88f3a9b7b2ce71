"""Times decode steps of a running engine from outside: the clock is read whenever tokens are delivered.

Owns keeping a batch at a known number of rows, all of them decoding, and cutting off the steps in which prompts were
still being read or rows had ended. Refuses to know how a step is run.
"""

import itertools
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import numpy.typing as npt

from prompt_store.manifest import SoftPrompt
from server.engine.backbone import Backbone
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.request import PromptRef, RowOutput, RowRequest, SamplingParams
from server.metrics import STEP_PHASES, Metrics

NUM_CLIENT_TOKENS = 8


@dataclass(frozen=True, slots=True)
class StepTimes:
    """One step, from delivery to delivery: median and mean; `parts_s` are the engine's own means of its phases.

    `mean_columns`: how many keys a row attended over, virtual ones included, on average.
    """

    step_s: float
    mean_step_s: float
    parts_s: dict[str, float]
    mean_columns: float


class DecodeTimer:
    """An engine whose deliveries are timed. Use as a context manager; one thread may call `measure`."""

    def __init__(
        self, backbone: Backbone, config: EngineConfig, embeddings: npt.NDArray[np.float32], *, k: int, seed: int
    ) -> None:
        """Every row has a prompt of `k` vectors of its own, or none if `k` is 0."""
        self._k = k
        self._rng = np.random.default_rng(seed)
        self._vocab_size = backbone.vocab_size
        values = [embeddings[self._rng.integers(3, len(embeddings), k)] for _ in range(config.max_rows if k else 0)]
        self._prompts = [SoftPrompt(kind="embeddings", values=value) for value in values]
        self._metrics = Metrics()
        self._engine = Engine(backbone, config, self._metrics, lambda ref: self._prompts[int(ref.prefix_key)])
        self._serials = itertools.count()
        self._done = threading.Event()
        self._open: set[str] = set()
        self._waiting_for_first: set[str] = set()
        self._stamps_s: list[float] = []
        self._sums: list[dict[str, float]] = []
        self._num_steps = 0
        self._failure: Exception | None = None

    def __enter__(self) -> "DecodeTimer":
        self._engine.start(self._deliver)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._engine.stop(timeout_s=30)

    def measure(self, num_rows: int, *, num_steps: int) -> StepTimes:
        """Run `num_rows` rows for `num_steps` steps beyond the last row's first token. Raises what a row ended with."""
        # Rows that were admitted first are ahead by the steps in which the others' prompts were read.
        num_new = num_steps + 2 + num_rows
        rows = [self._row(i, num_new) for i in range(num_rows)]
        self._open = {row.row_id for row in rows}
        self._waiting_for_first = set(self._open)
        self._stamps_s, self._sums, self._num_steps = [], [], num_steps
        self._done.clear()
        self._engine.submit(rows)
        self._done.wait()
        if self._failure is not None:
            raise self._failure
        before, after = self._sums
        parts_s = {name: (after[name] - before[name]) / num_steps for name in STEP_PHASES}
        step_s = statistics.median(b - a for a, b in itertools.pairwise(self._stamps_s))
        mean_step_s = (self._stamps_s[-1] - self._stamps_s[0]) / num_steps
        return StepTimes(step_s, mean_step_s, parts_s, self._k + NUM_CLIENT_TOKENS + num_steps / 2)

    def _row(self, index: int, num_new: int) -> RowRequest:
        ref = PromptRef(
            tenant="bench",
            task=f"task{index}",
            version=1,
            digest=str(index),
            prefix_key=str(index),
            kind="embeddings",
            num_virtual_tokens=self._k,
        )
        return RowRequest(
            row_id=f"row{next(self._serials)}",
            tenant="bench",
            token_ids=tuple(self._rng.integers(3, self._vocab_size, NUM_CLIENT_TOKENS).tolist()),
            prompt=ref if self._k else None,
            sampling=SamplingParams(max_tokens=num_new, temperature=0.0, ignore_eos=True),
        )

    def _deliver(self, outputs: Sequence[RowOutput]) -> None:
        """On the engine thread, once a step. Sums are read before the step's own delivery is added: they lag alike."""
        now_s = time.perf_counter()
        if not self._waiting_for_first and len(self._stamps_s) <= self._num_steps:
            self._stamps_s.append(now_s)
            # Twice in all: reading the sums takes as long as a small part of a step.
            if len(self._stamps_s) in (1, self._num_steps + 1):
                self._sums.append(self._phase_sums_s())
        for output in outputs:
            self._waiting_for_first.discard(output.row_id)
            if output.error is not None:
                self._failure = output.error
            if output.is_last:
                self._open.discard(output.row_id)
        if not self._open:
            self._done.set()

    def _phase_sums_s(self) -> dict[str, float]:
        samples = [sample for metric in self._metrics.step_seconds.collect() for sample in metric.samples]
        return {sample.labels["phase"]: sample.value for sample in samples if sample.name.endswith("_sum")}
