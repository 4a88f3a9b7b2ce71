"""`create_app(settings)`: the only place where the parts are put together."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI

from server import __version__
from server.api import (
    audit,
    chat,
    classify,
    compare,
    completions,
    files,
    fine_tuning,
    gates,
    health,
    inspect,
    keys,
    models,
    tasks,
    tenants,
    tokenize,
)
from server.api.auth import AuthMiddleware
from server.api.errors import install_error_handlers
from server.api.metrics_server import metrics_listener
from server.api.middleware import BodyLimitMiddleware, ObserveMiddleware
from server.api.openapi import install_openapi
from server.metrics import Metrics
from server.runtime.parts import LoadBackbone, MakeEngine
from server.runtime.protocols import BackboneLike, EngineLike, LoadPrompt
from server.runtime.reload import ReadSettings
from server.runtime.service import Runtime
from server.settings import Settings

if TYPE_CHECKING:
    from server.engine.config import EngineConfig

ROUTERS = (
    completions.router,
    chat.router,
    classify.router,
    tokenize.router,
    models.router,
    tasks.router,
    audit.router,
    inspect.router,
    compare.router,
    gates.router,
    files.router,
    fine_tuning.router,
    keys.router,
    tenants.router,
    health.router,
)


def create_app(
    settings: Settings,
    *,
    load_backbone: LoadBackbone | None = None,
    make_engine: MakeEngine | None = None,
    read_settings: ReadSettings | None = None,
) -> FastAPI:
    """The server as an ASGI app. Starting it begins to load the backbone; it answers meanwhile.

    `load_backbone` and `make_engine` replace the real ones in tests. `read_settings` reads anew what `settings` came
    from; without it a reload finds nothing new. `app.state.runtime` is the server's `Runtime`.
    """
    metrics = Metrics()
    runtime = Runtime(
        settings,
        metrics,
        load_backbone=load_backbone or load_configured_backbone,
        make_engine=make_engine or _make_engine,
        read_settings=read_settings,
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with metrics_listener(runtime):
            await runtime.start()
            try:
                yield
            finally:
                await runtime.stop()

    app = FastAPI(title="promptmux", version=__version__, lifespan=lifespan, redirect_slashes=False)
    app.state.runtime = runtime
    for router in ROUTERS:
        app.include_router(router)
    install_error_handlers(app)
    install_openapi(app)
    # The last one added is the outermost.
    app.add_middleware(AuthMiddleware, runtime=runtime)
    app.add_middleware(
        BodyLimitMiddleware,
        max_body_bytes=settings.max_body_bytes,
        max_upload_bytes=settings.max_upload_bytes,
        max_training_file_bytes=settings.max_training_file_bytes,
        body_timeout_s=settings.body_timeout_s,
    )
    app.add_middleware(
        ObserveMiddleware, metrics=metrics, routes=[route for router in ROUTERS for route in router.routes]
    )
    return app


def load_configured_backbone(settings: Settings) -> BackboneLike:
    """The backbone that the settings name, on their device. Takes seconds; raises what loading and converting raise."""
    # Torch takes seconds to import: it is needed here and nowhere before.
    import torch

    from server.embedded import convert_gguf, ensure_embedded_backbone
    from server.engine.backbone import Backbone
    from server.engine.threads import choose_threads

    torch.set_num_threads(settings.num_threads if settings.num_threads is not None else choose_threads())
    if settings.model is None:
        source, name = str(ensure_embedded_backbone(settings.cache_dir, progress=True)), None
    elif settings.model.endswith(".gguf") and Path(settings.model).is_file():
        source, name = str(convert_gguf(Path(settings.model), settings.cache_dir)), None
    else:
        source, name = settings.model, None
    return Backbone.load(
        source,
        dtype=settings.dtype,
        device=settings.device,
        max_model_len=settings.max_model_len,
        cache_dir=settings.cache_dir,
        name=name,
        quantization=settings.quantization,
    )


def make_engine_config(settings: Settings) -> "EngineConfig":
    """The engine's own part of the settings."""
    from server.engine.config import EngineConfig

    return EngineConfig(
        max_rows=settings.max_rows,
        max_step_tokens=settings.max_step_tokens,
        prefill_chunk=settings.prefill_chunk,
        max_waiting_rows=settings.max_waiting_rows,
        kv_cache_bytes=settings.kv_cache_bytes,
        prefix_cache_bytes=settings.prefix_cache_bytes,
        host_prompt_bytes=settings.host_prompt_bytes,
        max_virtual_tokens=settings.max_virtual_tokens,
        audit_share=settings.audit_share,
        keeps_texts=settings.text_cache == "on",
        is_deterministic=settings.deterministic == "on",
        overlaps=None if settings.overlap == "auto" else settings.overlap == "on",
        compiles=settings.compile == "auto",
        background_share=settings.training_share,
    )


def _make_engine(backbone: BackboneLike, settings: Settings, metrics: Metrics, load_prompt: LoadPrompt) -> EngineLike:
    from server.engine.backbone import Backbone
    from server.engine.engine import Engine

    assert isinstance(backbone, Backbone)
    return Engine(backbone, make_engine_config(settings), metrics, load_prompt)
