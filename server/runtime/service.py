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
from functools import partial
from typing import Any, Literal, TypeVar

import structlog

from prompt_store.store import PromptStore
from server.engine.request import PromptRef, RowOutput
from server.errors import DrainingError, EngineFailedError, LoadingError
from server.metrics import Metrics
from server.runtime.generation import Generation, GenerationSpec, check_budget, make_generation, tokenize
from server.runtime.in_flight import RequestsInFlight, RunningGeneration
from server.runtime.parts import LoadBackbone, MakeEngine, OpenedStore, Parts, StartError, load_parts, open_store
from server.runtime.protocols import BackboneLike, BackgroundRunner
from server.runtime.receipts import RequestOrigin, make_receipts
from server.runtime.reload import ReadSettings, Reloaded, default_limits, reload_settings
from server.runtime.runners import check_can_train, start_runners
from server.runtime.stats import TaskStatsTable
from server.runtime.store_errors import client_errors
from server.runtime.training import TrainingService, require_training
from server.runtime.watch import wait_for_failure
from server.settings import Settings
from server.tenancy.keys import Caller, KeyRing
from server.tenancy.quotas import QuotaKeeper

R = TypeVar("R")

RuntimeState = Literal["loading", "ready", "draining", "failed"]

# Text longer than this is tokenised in a thread: about the length whose tokens cost as much as the hop.
MAX_INLINE_CHARS = 4096
ENGINE_STOP_TIMEOUT_S = 5.0
NUM_STORE_THREADS = 4
NUM_TOKENIZER_THREADS = 2
# An upload is held in memory while it is checked.
MAX_UPLOADS_AT_ONCE = 2

_log = structlog.get_logger("promptmux.runtime")


class Runtime:
    """Holds the parts of a server and its running requests.

    `load_backbone` and `make_engine` are called once, in a background thread that `start` begins.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        *,
        load_backbone: LoadBackbone,
        make_engine: MakeEngine,
        read_settings: ReadSettings | None = None,
    ) -> None:
        self.settings = settings
        self._read_settings = read_settings if read_settings is not None else lambda: self.settings
        self.metrics = metrics
        self.started_at = int(time.time())
        self._load_backbone = load_backbone
        self._make_engine = make_engine
        self._state: RuntimeState = "loading"
        self._failure: str | None = None
        self._is_stopped = False
        self._opened: OpenedStore | None = None
        self._runners: list[BackgroundRunner] = []
        self._training: TrainingService | None = None
        self._parts: Parts | None = None
        self._stats = TaskStatsTable()
        self._in_flight = RequestsInFlight(self._end_request)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._settled = asyncio.Event()
        self._engine_failed = asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None
        self._store_threads = ThreadPoolExecutor(NUM_STORE_THREADS, thread_name_prefix="promptmux-store")
        self._tokenizer_threads = ThreadPoolExecutor(NUM_TOKENIZER_THREADS, thread_name_prefix="promptmux-tokenizer")
        self._uploads = asyncio.Semaphore(MAX_UPLOADS_AT_ONCE)
        self._inspections = asyncio.Semaphore(1)
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
        return len(self._in_flight)

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
        return self._require_opened().keys

    @property
    def quotas(self) -> QuotaKeeper:
        """Usable before the backbone is there. Raises as `parts` does."""
        return self._require_opened().quotas

    @property
    def store(self) -> PromptStore:
        """For what concerns keys and tenants; its methods block. Raises as `parts` does."""
        return self._require_opened().store

    @property
    def training(self) -> TrainingService:
        """Raises PermissionDeniedError where no prompts are made, and as `parts` does."""
        return require_training(self._training if self.parts else None)

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
        if self._parts is not None and (reason := self._parts.engine.status().failure) is not None:
            raise EngineFailedError(f"The engine has failed: {reason}")

    def refresh_gauges(self) -> None:
        """Sets the engine's gauges, and the store's, to what they are now."""
        if self._opened is not None:
            self._opened.replicas.refresh_gauges()
        if self._parts is not None:
            status = self._parts.engine.status()
            self.metrics.num_requests_running.set(status.num_running)
            self.metrics.num_requests_waiting.set(status.num_waiting)
            self.metrics.kv_cache_usage_ratio.set(status.kv_usage_ratio)
            self.metrics.prompts_resident.set(status.prompts_resident)

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
        for runner in self._runners:
            runner.stop()
        if self._parts is not None:
            self._parts.engine.start_drain()

    async def stop(self) -> None:
        """Ends what still runs with an error, stops the engine and closes the store. May be called twice."""
        if self._is_stopped:
            return
        self._is_stopped = True
        self.start_drain()
        for runner in self._runners:
            await runner.wait_stopped()
        if self._watcher is not None:
            self._watcher.cancel()
        if self._parts is not None:
            await asyncio.to_thread(self._parts.engine.stop, ENGINE_STOP_TIMEOUT_S)
            # What the engine delivered last is already in the loop's queue; this lets it arrive.
            await asyncio.sleep(0)
            self._in_flight.fail(DrainingError("The server is shutting down."))
        if self._parts is not None or self._state == "failed":
            # While the backbone still loads, the loading thread closes the store when it finds the server gone.
            await asyncio.to_thread(self._close_store)
        self._store_threads.shutdown(wait=False, cancel_futures=True)
        self._tokenizer_threads.shutdown(wait=False, cancel_futures=True)

    def reload(self) -> Reloaded:
        """Reads the settings anew and puts in force what may change; or nothing, and raises InvalidRequestError."""
        reloaded = reload_settings(self.settings, self._read_settings)
        self.settings = reloaded.settings
        self.quotas.set_defaults(default_limits(self.settings))
        _log.info("reloaded", changed=reloaded.changed, needs_restart=reloaded.needs_restart)
        return reloaded

    async def call(self, function: Callable[..., R], *args: Any, **kwargs: Any) -> R:
        """Runs a blocking call on the store in one of its threads."""
        return await asyncio.get_running_loop().run_in_executor(self._store_threads, partial(function, *args, **kwargs))

    async def run_tokenizer(self, num_chars: int, function: Callable[..., R], *args: Any, **kwargs: Any) -> R:
        """Runs work on so many characters: at once when they are few, else in a thread of the tokenizer's."""
        if num_chars <= MAX_INLINE_CHARS:
            return function(*args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(
            self._tokenizer_threads, partial(function, *args, **kwargs)
        )

    def uploading(self) -> asyncio.Semaphore:
        """Held while an upload's bytes are in memory; not while they arrive, which the client may draw out."""
        return self._uploads

    def inspecting(self) -> asyncio.Semaphore:
        """Held while the numbers of a prompt are looked into."""
        return self._inspections

    async def resolve(self, caller: Caller, reference: str, *, origin: RequestOrigin | None = None) -> PromptRef | None:
        """What a reference stands for now; None for the bare backbone. Raises TaskNotFoundError.

        A request without `origin` never meets a canary.
        """
        return (await self._resolve_all(caller, (reference,), origin))[reference]

    async def prepare(self, caller: Caller, spec: GenerationSpec, *, origin: RequestOrigin | None = None) -> Generation:
        """Resolves, tokenises and checks a request. Raises the errors of `server.errors`; nothing runs yet.

        A request without `origin` is answered by active versions, never by canaries.
        """
        self.check_ready()
        parts = self.parts
        check_budget(spec, max_tokens=self.settings.max_request_tokens, max_rows=self.settings.max_waiting_rows)
        if not self.quotas.is_fresh(caller.tenant):
            with client_errors():
                await self.call(self.quotas.refresh, caller.tenant)
        prompts = await self._resolve_all(caller, spec.references, origin)
        max_model_len = parts.backbone.max_model_len
        token_ids = await self.run_tokenizer(spec.num_chars, tokenize, spec, parts.codec, max_model_len)
        return make_generation(
            spec,
            generation_id=uuid.uuid4().hex,
            tenant=caller.tenant,
            token_ids=token_ids,
            prompts=prompts,
            max_model_len=max_model_len,
        )

    def submit(
        self, generation: Generation, *, arrived_at_s: float, origin: RequestOrigin | None = None
    ) -> RunningGeneration:
        """Hands the rows to the engine, all or none.

        Raises UnavailableError when it takes none, QuotaExceededError when the tenant has used up its quota.

        `arrived_at_s` is on the monotonic clock. A request without `origin` leaves no receipt.
        """
        self.check_ready()
        engine = self.parts.engine
        reservation = self.quotas.reserve(
            generation.tenant,
            num_prompt_tokens=generation.num_prompt_tokens,
            num_new_tokens=generation.num_expected_tokens,
            num_rows=len(generation.rows),
        )
        try:
            engine.submit(generation.rows)
        except BaseException:
            self.quotas.cancel(reservation)
            raise
        # Outputs are dispatched through the loop, so none can have been missed since the submission.
        return self._in_flight.add(
            generation, reservation, arrived_at_s=arrived_at_s, origin=origin, cancel=engine.cancel
        )

    async def _resolve_all(
        self, caller: Caller, references: Sequence[str], origin: RequestOrigin | None
    ) -> dict[str, PromptRef | None]:
        """At once where the store remembers them: a hop to its threads costs more than all else of most requests."""
        tasks, request_id = self.parts.tasks, origin.request_id if origin is not None else None
        remembered = tasks.resolve_remembered(caller.tenant, references, request_id)
        if remembered is not None:
            return remembered
        return await self.call(tasks.resolve_all, caller.tenant, references, request_id)

    def _require_opened(self) -> OpenedStore:
        """Raises what tells why there is no store yet."""
        if self._opened is not None:
            return self._opened
        if self._state == "failed":
            raise EngineFailedError("The server could not start; its log says why.")
        raise LoadingError("The store is being opened.")

    def _load(self) -> None:
        """The body of the loading thread."""
        try:
            check_can_train(self.settings)
            opened = self._opened = open_store(self.settings, self.metrics)
            parts = load_parts(
                self.settings,
                self.metrics,
                self._stats,
                opened,
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
        self._training, self._runners = start_runners(self)
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
        if self._opened is not None:
            self._opened.close()

    def _deliver(self, outputs: Sequence[RowOutput]) -> None:
        """Called on the engine's thread, once a step."""
        self._to_loop(self._in_flight.dispatch, outputs)

    def _end_request(self, running: RunningGeneration) -> None:
        self.quotas.settle(running.reservation, num_new_tokens=running.meter.completion_tokens)
        running.meter.finish(self._stats)
        if running.origin is not None:
            self._require_opened().receipts.put(make_receipts(running.meter, running.origin))

    async def _watch_engine(self) -> None:
        """Ends all requests with an error when the engine dies or hangs: it may be past telling them itself."""
        reason = await wait_for_failure(self.parts.engine)
        _log.error("engine_failed", reason=reason)
        self._failure = reason
        self._state = "failed"
        try:
            self._in_flight.fail(EngineFailedError("The engine has failed; the server must be restarted."))
        finally:
            self._engine_failed.set()

    def _to_loop(self, callback: Callable[..., None], *args: Any) -> bool:
        """False when the loop is gone: the server has ended."""
        try:
            assert self._loop is not None
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:
            return False
        return True
