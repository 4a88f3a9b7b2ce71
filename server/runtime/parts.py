"""What a loaded server consists of, and how it is put together in the background while the server already listens."""

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from prompt_store.errors import PromptStoreError
from prompt_store.manifest import StoreLimits
from prompt_store.store import PromptStore
from server import __version__
from server.errors import InvalidRequestError
from server.metrics import Metrics
from server.runtime.chat_template import ChatTemplate
from server.runtime.demo import load_demo_prompts
from server.runtime.protocols import BackboneLike, Deliver, EngineLike, LoadPrompt
from server.runtime.receipts import ReceiptWriter
from server.runtime.reload import default_limits
from server.runtime.replicas import ReplicaWatch
from server.runtime.stats import TaskStatsTable
from server.runtime.tasks import TaskService, load_prompt
from server.runtime.tokens import TokenCodec
from server.settings import Settings
from server.tenancy.keys import KeyRing
from server.tenancy.quotas import QuotaKeeper

RECEIPTS_STOP_TIMEOUT_S = 5.0

LoadBackbone = Callable[[Settings], BackboneLike]
MakeEngine = Callable[[BackboneLike, Settings, Metrics, LoadPrompt], EngineLike]


class StartError(RuntimeError):
    """The server cannot start; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedStore:
    """The store and what needs nothing but it: there before the backbone is."""

    store: PromptStore
    keys: KeyRing
    quotas: QuotaKeeper
    receipts: ReceiptWriter
    replicas: ReplicaWatch

    def close(self) -> None:
        """Writes the receipts that are queued, and gives the store free. Blocking; may be called twice."""
        self.replicas.stop()
        self.receipts.stop(RECEIPTS_STOP_TIMEOUT_S)
        self.store.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """`chat_template` is None where the backbone has none."""

    backbone: BackboneLike
    codec: TokenCodec
    chat_template: ChatTemplate | None
    engine: EngineLike
    tasks: TaskService

    def require_chat_template(self) -> ChatTemplate:
        """Raises InvalidRequestError when the backbone has no chat template."""
        if self.chat_template is None:
            raise InvalidRequestError(
                "messages: the backbone has no chat template; send its text to /v1/completions.", param="messages"
            )
        return self.chat_template


def open_store(settings: Settings, metrics: Metrics) -> OpenedStore:
    """The store, which does not know its backbone yet. Raises StartError, for instance when another server has it."""
    limits = StoreLimits(max_file_bytes=settings.max_upload_bytes, max_virtual_tokens=settings.max_virtual_tokens)
    try:
        store = PromptStore.open(settings.store_location, limits=limits, max_stale_s=settings.store_max_stale_s)
    except PromptStoreError as error:
        raise StartError(error.message) from error
    receipts = ReceiptWriter(store, metrics, max_rows=settings.receipts_max_rows)
    receipts.start()
    return OpenedStore(
        store=store,
        keys=KeyRing(store),
        quotas=QuotaKeeper(store, default_limits(settings)),
        receipts=receipts,
        replicas=ReplicaWatch(store, metrics),
    )


def load_parts(
    settings: Settings,
    metrics: Metrics,
    stats: TaskStatsTable,
    opened: OpenedStore,
    *,
    load_backbone: LoadBackbone,
    make_engine: MakeEngine,
    deliver: Deliver,
) -> Parts:
    """Loads the backbone, starts the engine, adds the demo prompts. Takes seconds; blocking.

    Raises what `load_backbone` and `make_engine` raise; no engine runs then.
    """
    store = opened.store
    backbone = load_backbone(settings)
    store.use_backbone(backbone.shape(settings.max_virtual_tokens))
    engine = make_engine(backbone, settings, metrics, partial(load_prompt, store, metrics))
    if settings.demo_dir is not None:
        load_demo_prompts(store, settings.demo_dir)
    engine.start(deliver)
    tasks = TaskService(store, engine, stats, metrics, backbone.name, quota_of=opened.quotas.quota_of)
    try:
        tasks.refresh()
        opened.replicas.start(tasks.refresh)
    except BaseException:
        engine.stop(0.0)
        raise
    metrics.set_build_info(
        version=__version__,
        torch=importlib.metadata.version("torch"),
        backbone=backbone.name,
        fingerprint=backbone.fingerprint,
        device=backbone.device_name,
        dtype=backbone.dtype_name,
        path=backbone.path,
    )
    return Parts(
        backbone=backbone,
        codec=TokenCodec(backbone.tokenizer, backbone.vocab_size),
        chat_template=ChatTemplate.of(backbone.tokenizer),
        engine=engine,
        tasks=tasks,
    )
