"""The engine called in process: no HTTP, no store.

Owns the way from requests to rows and back. As the target of a load it stamps tokens on the engine's thread, and wakes
the event loop only when a request ends: what measures must not take the engine's time.
"""

import asyncio
import contextlib
import hashlib
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from prompt_store.manifest import SoftPrompt
from server.bench.load import Answer, Failure
from server.bench.workload import BenchRequest, Workload
from server.engine.backbone import Backbone
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.request import PromptRef, RowOutput, RowRequest, SamplingParams
from server.errors import EngineFailedError, PromptmuxError
from server.metrics import Metrics

Prompts = Sequence[npt.NDArray[np.float32]]

_TENANT = "bench"
_STOP_TIMEOUT_S = 30.0
_LOOK_S = 1.0


@dataclass(slots=True)
class _OpenRow:
    """A row that runs. `on_end` is called on the engine thread."""

    on_end: Callable[[], None]
    token_ids: list[int] = field(default_factory=list)
    token_times_s: list[float] = field(default_factory=list)
    num_cached_tokens: int = 0
    ended_s: float = 0.0
    error: PromptmuxError | None = None


class OfflineEngine:
    """Runs requests of a workload's prompts. Use as a context manager."""

    def __init__(self, backbone: Backbone, config: EngineConfig) -> None:
        self.metrics = Metrics()
        self._prompts: dict[str, tuple[Prompts, int]] = {}
        self._registered: list[tuple[Prompts, list[PromptRef]]] = []
        self._engine = Engine(backbone, config, self.metrics, self._load_prompt)
        self._numbers = itertools.count()
        self._open: dict[str, _OpenRow] = {}

    def __enter__(self) -> "OfflineEngine":
        self._engine.start(self._deliver)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._engine.stop(timeout_s=_STOP_TIMEOUT_S)

    def forget_prefixes(self) -> None:
        """Make the next run cold: every prompt is read and compiled again."""
        for key in self._prompts:
            self._engine.evict(key)
        while any(self._engine.residency(key) != "store" for key in self._prompts):
            self._check_alive()
            time.sleep(0.01)

    def run(self, workload: Workload) -> list[list[int]]:
        """Submit everything at once; returns the new tokens of each request.

        Raises what a row ended with, EngineFailedError when the engine ends before them.
        """
        refs = self.register(workload.prompts)
        ended = threading.Semaphore(0)
        rows = [_OpenRow(ended.release) for _ in workload.requests]
        self._submit(workload.requests, refs, rows)
        for _ in rows:
            while not ended.acquire(timeout=_LOOK_S):
                self._check_alive()
        for row in rows:
            if row.error is not None:
                raise row.error
        return [row.token_ids for row in rows]

    def register(self, prompts: Prompts) -> list[PromptRef]:
        """Make prompts known, as a store would; nothing is compiled before a row needs it."""
        for known, refs in self._registered:
            # The same object again: its digests are not taken twice, least of all while a run is timed.
            if known is prompts:
                return refs
        refs = []
        for index, values in enumerate(prompts):
            digest = hashlib.sha256(values.tobytes()).hexdigest()
            key = f"{index}-{digest}"
            self._prompts.setdefault(key, (prompts, index))
            refs.append(
                PromptRef(
                    tenant=_TENANT,
                    task=f"task{index}",
                    version=1,
                    digest=digest,
                    prefix_key=key,
                    kind="embeddings",
                    num_virtual_tokens=len(values),
                )
            )
        self._registered.append((prompts, refs))
        return refs

    async def answer(self, request: BenchRequest, refs: Sequence[PromptRef]) -> Answer:
        """Run one request and wait for its end."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        row = _OpenRow(lambda: _wake(loop, ended))
        try:
            self._submit([request], refs, [row])
        except PromptmuxError as error:
            row.error, row.ended_s = error, time.monotonic()
        else:
            try:
                await self._end_of(ended)
            except EngineFailedError as error:
                row.error, row.ended_s = error, time.monotonic()
        failure = None
        if row.error is not None:
            failure = Failure(kind=row.error.code, message=row.error.message, status=row.error.status)
        return Answer(
            token_times_s=row.token_times_s,
            ended_s=row.ended_s,
            num_cached_tokens=row.num_cached_tokens,
            failure=failure,
        )

    async def _end_of(self, ended: asyncio.Event) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), _LOOK_S)
                return
            self._check_alive()

    def _check_alive(self) -> None:
        """Raises EngineFailedError when nobody is left who could end a row."""
        failure = self._engine.status().failure
        if failure is not None:
            raise EngineFailedError(f"the engine has failed: {failure}")

    def _submit(self, requests: Sequence[BenchRequest], refs: Sequence[PromptRef], rows: Sequence[_OpenRow]) -> None:
        """Raises what the engine refuses rows with; none of them runs then."""
        submitted = [
            RowRequest(
                row_id=str(next(self._numbers)),
                tenant=_TENANT,
                token_ids=request.token_ids,
                prompt=refs[request.prompt] if request.prompt is not None else None,
                sampling=SamplingParams(max_tokens=request.num_new_tokens, temperature=0.0, ignore_eos=True),
            )
            for request in requests
        ]
        opened = {request.row_id: row for request, row in zip(submitted, rows, strict=True)}
        self._open.update(opened)
        try:
            self._engine.submit(submitted)
        except PromptmuxError:
            for row_id in opened:
                del self._open[row_id]
            raise

    def _load_prompt(self, ref: PromptRef) -> SoftPrompt:
        prompts, index = self._prompts[ref.prefix_key]
        return SoftPrompt(kind="embeddings", values=prompts[index])

    def _deliver(self, outputs: Sequence[RowOutput]) -> None:
        """On the engine thread: every token of a step is stamped with the same time."""
        now_s = time.monotonic()
        for output in outputs:
            row = self._open[output.row_id]
            row.token_ids.extend(output.token_ids)
            row.token_times_s.extend([now_s] * len(output.token_ids))
            row.num_cached_tokens += output.num_cached
            if output.is_last:
                row.error, row.ended_s = output.error, now_s
                del self._open[output.row_id]
                row.on_end()


class OfflineTarget:
    """The engine as the target of a load over one set of prompts."""

    def __init__(self, engine: OfflineEngine, prompts: Prompts) -> None:
        self._engine = engine
        self._refs = engine.register(prompts)

    async def answer(self, request: BenchRequest) -> Answer:
        return await self._engine.answer(request, self._refs)


def _wake(loop: asyncio.AbstractEventLoop, ended: asyncio.Event) -> None:
    # After Ctrl-C the loop is closed while rows still end, and says so with a RuntimeError.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(ended.set)
