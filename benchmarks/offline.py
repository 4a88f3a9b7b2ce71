"""The engine called in process, for benchmarks: no HTTP, no store."""

import itertools
import threading
import time
from collections.abc import Sequence

from benchmarks.workload import Workload
from prompt_store.manifest import SoftPrompt
from server.engine.backbone import Backbone
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.request import PromptRef, RowOutput, RowRequest, SamplingParams
from server.metrics import Metrics


class OfflineEngine:
    """Runs whole workloads and waits for their end. Use as a context manager."""

    def __init__(self, backbone: Backbone, config: EngineConfig) -> None:
        self.metrics = Metrics()
        self._prompts: dict[str, SoftPrompt] = {}
        self._engine = Engine(backbone, config, self.metrics, lambda ref: self._prompts[ref.prefix_key])
        self._numbers = itertools.count()
        self._answers: dict[str, list[int]] = {}
        self._num_open = 0
        self._done = threading.Event()
        self._failure: BaseException | None = None

    def __enter__(self) -> "OfflineEngine":
        self._engine.start(self._deliver)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._engine.stop(timeout_s=30)

    def forget_prefixes(self) -> None:
        """Make the next run cold: every prompt is read and compiled again."""
        for key in self._prompts:
            self._engine.evict(key)
        while any(self._engine.residency(key) != "store" for key in self._prompts):
            time.sleep(0.01)

    def run(self, workload: Workload) -> list[list[int]]:
        """Submit everything at once; returns the new tokens of each request. Raises what a row ended with."""
        run = next(self._numbers)
        refs = [self._ref(values, i) for i, values in enumerate(workload.prompts)]
        rows = [
            RowRequest(
                row_id=f"{run}-{i}",
                tenant="bench",
                token_ids=request.token_ids,
                prompt=refs[request.prompt] if request.prompt is not None else None,
                sampling=SamplingParams(max_tokens=request.num_new_tokens, temperature=0.0, ignore_eos=True),
            )
            for i, request in enumerate(workload.requests)
        ]
        self._answers = {row.row_id: [] for row in rows}
        self._num_open = len(rows)
        self._done.clear()
        self._engine.submit(rows)
        self._done.wait()
        if self._failure is not None:
            raise self._failure
        return [self._answers[row.row_id] for row in rows]

    def _ref(self, values: object, index: int) -> PromptRef:
        prompt = SoftPrompt(kind="embeddings", values=values)  # type: ignore[arg-type]
        key = f"{index}-{hash(prompt.values.tobytes()) & 0xFFFFFFFF:08x}"
        self._prompts.setdefault(key, prompt)
        return PromptRef(
            tenant="bench",
            task=f"task{index}",
            version=1,
            digest=key,
            prefix_key=key,
            kind="embeddings",
            num_virtual_tokens=prompt.num_virtual_tokens,
        )

    def _deliver(self, outputs: Sequence[RowOutput]) -> None:
        for output in outputs:
            self._answers[output.row_id].extend(output.token_ids)
            if output.error is not None:
                self._failure = output.error
            if output.is_last:
                self._num_open -= 1
        if self._num_open == 0:
            self._done.set()
