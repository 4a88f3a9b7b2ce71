"""What `promptmux bench` measures: a running server that is asked what it has, or an engine as serve would make it.

Owns the way from options to a target that is ready, and what the report says of it. Refuses to know the load.
"""

import asyncio
import dataclasses
import os
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import httpx

from server.bench.load import Target
from server.bench.measurement import Look
from server.cli.http_client import ServerClient
from server.cli.output import ExitCode, fail, to_stderr
from server.cli.setting_flags import resolve_or_fail
from server.engine.config import EngineConfig
from server.settings import Settings

_LOOK_S = 0.2


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BenchTarget:
    """A target that answers. Prompts are known by index; client tokens are ids below `vocab_size`.

    `describe` says what was measured, once it has been. `is_compiled`: there are compiled steps, which are on trial
    until `is_settled`.
    """

    mode: Literal["offline", "online"]
    target: Target
    read_metrics: Look
    num_prompts: int
    vocab_size: int
    describe: Callable[[], Mapping[str, Any]]
    is_compiled: bool = False
    is_settled: Callable[[], bool] = lambda: True


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OnlineOptions:
    """A running server. `tasks` None are all that the key may call; none at all is the bare backbone."""

    url: str
    key: str | None
    tasks: Sequence[str] | None
    vocab_size: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OfflineOptions:
    """An engine with the settings that serve would have (`settings` are flags), and random prompts of k vectors."""

    settings: Mapping[str, object]
    config: Path | None
    num_prompts: int
    k: int
    seed: int


@asynccontextmanager
async def online_target(options: OnlineOptions) -> AsyncIterator[BenchTarget]:
    """A server that cannot be reached, or does not know a task, ends the command (`typer.Exit`)."""
    from server.bench.online import OnlineTarget

    tasks = options.tasks
    with ServerClient(options.url, options.key) as client:
        version = client.server_version()
        models = client.models()
        backbone = next((str(item["id"]) for item in models if item.get("root") == item["id"]), None)
        if backbone is None:
            fail(f"{client.url} lists no backbone", code=ExitCode.UNREACHABLE, hint="check --url")
        if tasks is None:
            tasks = [str(item["id"]) for item in models if item["id"] != backbone]
            if not tasks:
                fail(
                    "this key may call no task",
                    code=ExitCode.NOT_FOUND,
                    hint="--no-prompt measures the backbone alone; `promptmux push` makes a task",
                )
        else:
            for reference in tasks:
                client.model(reference)
    async with OnlineTarget(options.url, options.key, backbone=backbone, tasks=tasks) as target:
        yield BenchTarget(
            mode="online",
            target=target,
            read_metrics=target.metrics,
            num_prompts=len(tasks),
            vocab_size=options.vocab_size,
            # A name and a password may stand before the host.
            describe=lambda: {"url": str(httpx.URL(options.url).copy_with(userinfo=b"")), **version},
        )


@asynccontextmanager
async def offline_target(options: OfflineOptions) -> AsyncIterator[BenchTarget]:
    """A backbone that cannot be loaded ends the command (`typer.Exit`)."""
    settings = resolve_or_fail(options.settings, options.config).settings
    num_prompts, k = options.num_prompts, options.k
    if not sys.stderr.isatty():
        # Libraries draw their progress bars with tqdm; in a log file they are noise.
        os.environ.setdefault("TQDM_DISABLE", "1")
    with to_stderr().status("loading the backbone"):
        from server.app import load_configured_backbone
        from server.bench.offline import OfflineEngine, OfflineTarget
        from server.bench.workload import RandomPrompts
        from server.embedded import EmbeddedBackboneError
        from server.engine.backbone import Backbone
        from server.engine.checkpoint import BackboneError

        try:
            backbone = load_configured_backbone(settings)
        except (BackboneError, EmbeddedBackboneError) as error:
            fail(str(error), hint="a model folder, a hub id or a GGUF file; none: the embedded backbone")
    assert isinstance(backbone, Backbone)
    weight: Any = backbone.model.get_input_embeddings().weight
    embeddings = weight.detach().float().cpu().numpy()
    config = _engine_config(settings, k)
    try:
        engine = OfflineEngine(backbone, config)
    except BackboneError as error:
        fail(str(error), code=ExitCode.USAGE, hint="--no-deterministic serves it")
    except ValueError as error:
        fail(str(error), code=ExitCode.USAGE, hint="more --kv-cache-bytes, or a smaller --max-model-len")
    prompts = RandomPrompts(embeddings, num_prompts=num_prompts, k=k, seed=options.seed + 1)
    with engine:
        with to_stderr().status("compiling steps"):
            # The state is a thread's, that sets no event.
            while backbone.compiled_state == "compiling":  # noqa: ASYNC110
                await asyncio.sleep(_LOOK_S)

        async def read_metrics() -> str:
            return engine.metrics.render()[0].decode()

        yield BenchTarget(
            mode="offline",
            target=OfflineTarget(engine, prompts),
            read_metrics=read_metrics,
            num_prompts=num_prompts,
            vocab_size=len(embeddings),
            describe=lambda: _describe(backbone, config, k if num_prompts else 0),
            is_compiled=backbone.compiled_state == "trial",
            is_settled=lambda: backbone.is_settled,
        )


def _engine_config(settings: Settings, k: int) -> EngineConfig:
    """The engine's part of the settings, with room for the prompts' virtual tokens."""
    from server.app import make_engine_config

    config = make_engine_config(settings)
    return dataclasses.replace(config, max_virtual_tokens=max(settings.max_virtual_tokens, k))


def _describe(backbone: Any, config: EngineConfig, k: int) -> dict[str, Any]:
    import torch

    return {
        "backbone": {
            "name": backbone.name,
            "fingerprint": backbone.fingerprint,
            "path": backbone.path,
            "dtype": backbone.dtype_name,
            "device": backbone.device_name,
            "max_model_len": backbone.max_model_len,
            "kernel": backbone.kernel,
            "quantization": backbone.quantization,
            "weight_form": backbone.linears.form if backbone.linears is not None else None,
            "compiled": backbone.compiled_state,
            "compiled_sizes": backbone.compiled_sizes,
        },
        "virtual_tokens": k,
        # By the names that the settings have.
        "engine": {
            "num_threads": torch.get_num_threads(),
            "max_rows": config.max_rows,
            "max_step_tokens": config.max_step_tokens,
            "prefill_chunk": config.prefill_chunk,
            "deterministic": config.is_deterministic,
            "text_cache": config.keeps_texts,
            "audit_share": config.audit_share,
            "kv_cache_bytes": config.kv_cache_bytes,
            "prefix_cache_bytes": config.prefix_cache_bytes,
            "host_prompt_bytes": config.host_prompt_bytes,
        },
    }
