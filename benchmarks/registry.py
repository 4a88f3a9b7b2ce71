"""A registry of many tasks: filled as uploads fill it, and a whole server over it without a socket.

Owns what benchmarks of the store have in common. Prompts are random rows of the vocabulary, so that they are what a
prompt is initialised with; what they answer does not matter here.
"""

import argparse
import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from peft import PromptTuningConfig, TaskType
from safetensors.numpy import save

from benchmarks.rounds import embeddings_of
from prompt_store.store import PromptStore
from server.app import create_app
from server.embedded import default_cache_dir
from server.engine.backbone import Backbone
from server.runtime.service import Runtime
from server.settings import Settings


class Uploads:
    """Random prompts of `k` vectors for a backbone, as files that PEFT would have written."""

    def __init__(self, backbone: Backbone, *, k: int, seed: int) -> None:
        self.shape = backbone.shape(Settings.model_validate({}).max_virtual_tokens)
        self._embeddings = embeddings_of(backbone)
        self._rng = np.random.default_rng(seed)
        self._k = k
        config = PromptTuningConfig(
            task_type=TaskType.CAUSAL_LM, num_virtual_tokens=k, token_dim=backbone.hidden_size
        ).to_dict()
        self._config = json.dumps(config, default=sorted).encode()

    def put(self, store: PromptStore, tenant: str, task: str) -> float:
        """Upload a prompt of its own to a task; returns the seconds that the store took."""
        values: npt.NDArray[np.float32] = self._embeddings[
            self._rng.integers(3, len(self._embeddings), self._k)
        ].astype(np.float32)
        file = save({"prompt_embeddings": values})
        started_s = time.perf_counter()
        store.upload(tenant, task, file=file, config=self._config)
        return time.perf_counter() - started_s


def task_names(num_tasks: int, num_tenants: int) -> Iterator[tuple[str, str]]:
    """(tenant, task), the tenants in turn."""
    for number in range(num_tasks):
        yield f"tenant-{number % num_tenants:03}", f"task-{number // num_tenants:05}"


@contextlib.asynccontextmanager
async def serving(args: argparse.Namespace, data_dir: Path, **settings: object) -> AsyncIterator[tuple[Runtime, float]]:
    """The runtime of a server that is ready, and the seconds from its start until then."""
    app = create_app(
        Settings.model_validate(
            {
                "model": args.backbone,
                "dtype": args.dtype,
                "num_threads": args.threads,
                "data_dir": data_dir,
                "cache_dir": default_cache_dir(),
                "log_level": "error",
                **settings,
            }
        )
    )
    runtime: Runtime = app.state.runtime
    started_s = time.perf_counter()
    await runtime.start()
    try:
        await runtime.wait_until_settled()
        # What the loading thread found out arrives on the loop.
        await asyncio.sleep(0)
        runtime.check_ready()
        yield runtime, time.perf_counter() - started_s
    finally:
        await runtime.stop()
