"""The runtime: one object that the API asks for everything, and the bridge between the event loop and the engine.

Owns the server's state (loading → ready → draining, or failed), the threads that keep blocking work off the loop, and
the way of a step's outputs to the requests that wait for them: one `call_soon_threadsafe` a step. Refuses to know HTTP
and tensors. Its methods belong to the event loop's thread.
"""

import asyncio
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import structlog

from prompt_store.store import PromptStore
from server.engine.request import RowOutput
from server.errors import DrainingError, EngineFailedError, InvalidRequestError, LoadingError, PromptmuxError
from server.metrics import Metrics
from server.runtime.generation import Generation, GenerationSpec, make_generation, tokenize
from server.runtime.meter import RequestMeter
from server.runtime.parts import LoadBackbone, MakeEngine, Parts, StartError, load_parts, open_store
from server.runtime.protocols import BackboneLike
from server.runtime.stats import TaskStatsTable
from server.runtime.streams import RowStream
from server.settings import Settings
from server.tenancy.keys import Caller, KeyRing

R = TypeVar("R")

RuntimeState = Literal["loading", "ready", "draining", "failed"]

# Text longer than this is tokenised in a thread: about the length whose tokens cost as much as the hop.
MAX_INLINE_CHARS = 4096
ENGINE_STOP_TIMEOUT_S = 5.0
WATCH_INTERVAL_S = 1.0
# A step on a slow machine may take many seconds; an engine with rows that makes none for so long hangs.
MAX_HEARTBEAT_AGE_S = 60.0
NUM_STORE_THREADS = 4
NUM_TOKENIZER_THREADS = 2
# An upload is held in memory while it is checked.
MAX_UPLOADS_AT_ONCE = 2

_log = structlog.get_logger("promptmux.runtime")


@dataclass(frozen=True, slots=True)
class RunningGeneration:
    """A submitted request: read `stream` to its end or close it."""

    generation: Generation
    stream: RowStream
    meter: RequestMeter


class Runtime:
    """Holds the parts of a server and its running requests.

    `load_backbone` and `make_engine` are called once, in a background thread that `start` begins.
    """

    def __init__(
        self, settings: Settings, metrics: Metrics, *, load_backbone: LoadBackbone, make_engine: MakeEngine
    ) -> None:
        self.settings = settings
        self.metrics = metrics
        self.started_at = int(time.time())
        self._load_backbone = load_backbone
        self._make_engine = make_engine
        self._state: RuntimeState = "loading"
        self._failure: str | None = None
        self._is_stopped = False
        self._store: PromptStore | None = None
        self._keys: KeyRing | None = None
        self._parts: Parts | None = None
        self._stats = TaskStatsTable()
        self._running: dict[str, RunningGeneration] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._settled = asyncio.Event()
        self._engine_failed = asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None
        self._store_threads = ThreadPoolExecutor(NUM_STORE_THREADS, thread_name_prefix="promptmux-store")
        self._tokenizer_threads = ThreadPoolExecutor(NUM_TOKENIZER_THREADS, thread_name_prefix="promptmux-tokenizer")
        self._uploads = asyncio.Semaphore(MAX_UPLOADS_AT_ONCE)
        metrics.draining.set(0)

    @property
    def state(self) -> RuntimeState:
        return self._state

    @property
    def failure(self) -> str | None:
        """Why the state is `failed`."""
        return self._failure

    @property
    def num_running_requests(self) -> int:
        return len({id(running) for running in self._running.values()})

    @property
    def parts(self) -> Parts:
        """The loaded parts. Raises LoadingError before they are there, EngineFailedError when they never will be."""
        if self._parts is None:
            if self._state == "failed":
                raise EngineFailedError("The server could not start; its log says why.")
            if self._state == "draining":
                raise DrainingError("The server is shutting down.")
            raise LoadingError("The backbone is loading.")
        return self._parts

    @property
    def backbone(self) -> BackboneLike | None:
        """None until it is loaded."""
        return self._parts.backbone if self._parts is not None else None

    @property
    def keys(self) -> KeyRing:
        """Usable before the backbone is there. Raises as `parts` does."""
        if self._keys is None:
            if self._state == "failed":
                raise EngineFailedError("The server could not start; its log says why.")
            raise LoadingError("The store is being opened.")
        return self._keys

    def check_ready(self) -> None:
        """Raises the 503 that tells why no request can be taken now."""
        if self._state == "draining":
            raise DrainingError("The server is shutting down.")
        if self._state == "failed":
            raise EngineFailedError("The engine has failed; the server must be restarted.")
        if self._parts is None:
            raise LoadingError("The backbone is loading.")

    def check_alive(self) -> None:
        """Raises EngineFailedError when only a restart helps."""
        if self._state == "failed":
            raise EngineFailedError("The engine has failed; the server must be restarted.")
        if self._parts is not None and (reason := self._find_failure()) is not None:
            raise EngineFailedError(f"The engine has failed: {reason}")

    def render_metrics(self) -> tuple[bytes, str]:
        """The exposition text and its content type, the engine's gauges as they are now."""
        if self._parts is not None:
            status = self._parts.engine.status()
            self.metrics.num_requests_running.set(status.num_running)
            self.metrics.num_requests_waiting.set(status.num_waiting)
            self.metrics.kv_cache_usage_ratio.set(status.kv_usage_ratio)
            self.metrics.prompts_resident.set(status.prompts_resident)
        return self.metrics.render()

    async def start(self) -> None:
        """Begins to load in the background and returns at once."""
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._load, name="promptmux-load", daemon=True).start()

    async def wait_until_settled(self) -> None:
        """Waits until loading has ended, well or not."""
        await self._settled.wait()

    async def wait_until_engine_failed(self) -> None:
        """Waits until the engine of a loaded server has failed and every running request was told; perhaps for ever."""
        await self._engine_failed.wait()

    def start_drain(self) -> None:
        """From now on new requests are refused; running ones go on. Returns at once; may be called twice."""
        if self._state in ("loading", "ready"):
            self._state = "draining"
        self.metrics.draining.set(1)
        if self._parts is not None:
            self._parts.engine.start_drain()

    async def stop(self) -> None:
        """Ends what still runs with an error, stops the engine and closes the store. May be called twice."""
        if self._is_stopped:
            return
        self._is_stopped = True
        self.start_drain()
        if self._watcher is not None:
            self._watcher.cancel()
        if self._parts is not None:
            await asyncio.to_thread(self._parts.engine.stop, ENGINE_STOP_TIMEOUT_S)
            # What the engine delivered last is already in the loop's queue; this lets it arrive.
            await asyncio.sleep(0)
            self._fail_running(DrainingError("The server is shutting down."))
        if self._parts is not None or self._state == "failed":
            # While the backbone still loads, the loading thread closes the store when it finds the server gone.
            await asyncio.to_thread(self._close_store)
        self._store_threads.shutdown(wait=False, cancel_futures=True)
        self._tokenizer_threads.shutdown(wait=False, cancel_futures=True)

    async def call(self, function: Callable[..., R], *args: Any, **kwargs: Any) -> R:
        """Runs a blocking call on the store in one of its threads."""
        return await asyncio.get_running_loop().run_in_executor(self._store_threads, partial(function, *args, **kwargs))

    def uploading(self) -> asyncio.Semaphore:
        """Held while an upload's bytes are in memory; not while they arrive, which the client may draw out."""
        return self._uploads

    async def prepare(self, caller: Caller, spec: GenerationSpec) -> Generation:
        """Resolves, tokenises and checks a request. Raises the errors of `server.errors`; nothing runs yet."""
        self.check_ready()
        parts = self.parts
        self._check_budget(spec)
        prompts = await self.call(parts.tasks.resolve_all, caller.tenant, spec.references)
        if spec.num_chars > MAX_INLINE_CHARS:
            token_ids = await asyncio.get_running_loop().run_in_executor(
                self._tokenizer_threads, tokenize, spec, parts.codec
            )
        else:
            token_ids = tokenize(spec, parts.codec)
        return make_generation(
            spec,
            generation_id=uuid.uuid4().hex,
            tenant=caller.tenant,
            token_ids=token_ids,
            prompts=prompts,
            max_model_len=parts.backbone.max_model_len,
        )

    def submit(self, generation: Generation, *, arrived_at_s: float) -> RunningGeneration:
        """Hands the rows to the engine, all or none. Raises UnavailableError when it takes none.

        `arrived_at_s` is on the monotonic clock.
        """
        self.check_ready()
        engine = self.parts.engine
        engine.submit(generation.rows)
        meter = RequestMeter(generation, arrived_at_s=arrived_at_s)
        stream = RowStream(
            [row.row_id for row in generation.rows], cancel=engine.cancel, on_end=partial(self._end_request, meter)
        )
        running = RunningGeneration(generation, stream, meter)
        # Outputs reach `_dispatch` through the loop, so none can have been missed since the submission.
        for row in generation.rows:
            self._running[row.row_id] = running
        return running

    def _check_budget(self, spec: GenerationSpec) -> None:
        num_tokens = spec.num_rows * spec.sampling.max_tokens
        if num_tokens > self.settings.max_request_tokens:
            raise InvalidRequestError(
                f"{len(spec.prompts)} prompts × n={spec.n} × max_tokens={spec.sampling.max_tokens} is {num_tokens} new "
                f"tokens; one request may ask for {self.settings.max_request_tokens}.",
                param="max_tokens",
            )
        if spec.num_rows > self.settings.max_waiting_rows:
            raise InvalidRequestError(
                f"The request has {spec.num_rows} sequences; one request may have {self.settings.max_waiting_rows}.",
                param="n",
            )

    def _load(self) -> None:
        """The body of the loading thread."""
        try:
            store = open_store(self.settings)
            self._store = store
            self._keys = KeyRing(store)
            parts = load_parts(
                self.settings,
                self.metrics,
                self._stats,
                store,
                load_backbone=self._load_backbone,
                make_engine=self._make_engine,
                deliver=self._deliver,
            )
        except Exception as error:
            reason = str(error) or type(error).__name__
            _log.error("start_failed", error=reason, exc_info=not isinstance(error, StartError))
            is_heard = self._to_loop(self._loading_failed, reason)
        else:
            is_heard = self._to_loop(self._loading_done, parts)
            if not is_heard:
                parts.engine.stop(ENGINE_STOP_TIMEOUT_S)
        if not is_heard:
            self._close_store()

    def _loading_done(self, parts: Parts) -> None:
        self._settled.set()
        if self._is_stopped:
            threading.Thread(target=self._discard, args=(parts,), name="promptmux-discard").start()
            return
        self._parts = parts
        self._watcher = asyncio.ensure_future(self._watch_engine())
        if self._state == "draining":
            parts.engine.start_drain()
            return
        self._state = "ready"
        _log.info("ready", backbone=parts.backbone.name, path=parts.backbone.path, dtype=parts.backbone.dtype_name)

    def _loading_failed(self, reason: str) -> None:
        self._failure = reason
        self._state = "failed"
        self._settled.set()
        if self._is_stopped:
            threading.Thread(target=self._close_store, name="promptmux-discard").start()

    def _discard(self, parts: Parts) -> None:
        """Ends what was loaded for a server that has stopped meanwhile."""
        parts.engine.stop(ENGINE_STOP_TIMEOUT_S)
        self._close_store()

    def _close_store(self) -> None:
        if self._store is not None:
            self._store.close()

    def _deliver(self, outputs: Sequence[RowOutput]) -> None:
        """Called on the engine's thread, once a step."""
        self._to_loop(self._dispatch, outputs)

    def _dispatch(self, outputs: Sequence[RowOutput]) -> None:
        for output in outputs:
            running = self._running.get(output.row_id)
            if running is not None:
                running.meter.observe(output)
                running.stream.push(output)

    def _end_request(self, meter: RequestMeter, stream: RowStream) -> None:
        for row_id in stream.row_ids:
            self._running.pop(row_id, None)
        meter.finish(self._stats)

    def _fail_running(self, error: PromptmuxError) -> None:
        self._dispatch([RowOutput(row_id=row_id, error=error) for row_id in list(self._running)])

    async def _watch_engine(self) -> None:
        """Ends all requests with an error when the engine dies or hangs: it may be past telling them itself."""
        has_looked = True
        while True:
            try:
                reason = self._find_failure()
                has_looked = True
            except Exception:
                # Nobody else watches the engine: the watcher goes on, and says so once.
                if has_looked:
                    _log.exception("engine_not_watched")
                reason, has_looked = None, False
            if reason is not None:
                break
            await asyncio.sleep(WATCH_INTERVAL_S)
        _log.error("engine_failed", reason=reason)
        self._failure = reason
        self._state = "failed"
        try:
            self._fail_running(EngineFailedError("The engine has failed; the server must be restarted."))
        finally:
            self._engine_failed.set()

    def _find_failure(self) -> str | None:
        status = self.parts.engine.status()
        if status.failure is not None:
            return status.failure
        has_work = status.num_running + status.num_waiting > 0
        if has_work and status.heartbeat_age_s > MAX_HEARTBEAT_AGE_S:
            return f"no step for {status.heartbeat_age_s:.0f} s"
        return None

    def _to_loop(self, callback: Callable[..., None], *args: Any) -> bool:
        """False when the loop is gone: the server has ended."""
        try:
            assert self._loop is not None
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:
            return False
        return True
