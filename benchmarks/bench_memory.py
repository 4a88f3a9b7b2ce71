"""How much memory do 1,000 registered prompts cost a server that has none of them resident?

Whole servers (the ASGI app over a real store, without a socket) are started in processes of their own, in alternating
rounds with an empty store and with the prompts registered. Memory is what belongs to the process alone (Linux:
private pages of smaps_rollup), read when it is ready, and again after every task's name was listed and resolved, which
fills the store's caches. The difference between the two stores is what prompts cost beside the weights.
"""

import argparse
import asyncio
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
from peft import PromptTuningConfig, TaskType
from safetensors.numpy import save

from benchmarks.machine import describe_machine, report
from benchmarks.roofline import count_work
from benchmarks.rounds import backbone_folder, embeddings_of, make_parser, parse
from prompt_store.store import PromptStore
from server.app import create_app
from server.embedded import default_cache_dir
from server.engine.backbone import Backbone
from server.engine.checkpoint import DTYPES
from server.runtime.service import Runtime
from server.settings import Settings

TENANT = "bench"
GOAL_MB = 50
EMPTY = "no prompts"
READY, NAMED = "ready", "every name listed and resolved"


def main() -> None:
    args = _parse()
    if args.measure is not None:
        print(json.dumps(asyncio.run(_serve_and_measure(args))))
        return
    machine = describe_machine()
    with tempfile.TemporaryDirectory() as scratch:
        full_name = f"{args.prompts:,} prompts"
        stores = {EMPTY: Path(scratch) / "empty", full_name: Path(scratch) / "full"}
        dtype, weight_mb = _register(args, stores[full_name])
        measured: dict[str, list[dict[str, float]]] = {name: [] for name in stores}
        for number in range(args.rounds):
            for name in list(stores) if number % 2 == 0 else reversed(stores):
                measured[name].append(_run_server(args, dtype, stores[name], 0 if name == EMPTY else args.prompts))
                print(f"{number + 1}/{args.rounds} {name:16} {measured[name][-1]}", file=sys.stderr, flush=True)
    empty, full = measured.values()
    lines = [
        f"| private memory, MB (medians; weights {weight_mb:.0f}) | {' | '.join(stores)} | difference | goal |",
        "|---|---:|---:|---:|---:|",
    ]
    costs_mb: dict[str, list[float]] = {}
    for when in (READY, NAMED):
        costs_mb[when] = [round(b[when] - a[when], 1) for a, b in zip(empty, full, strict=True)]
        cells = [statistics.median(m[when] for m in runs) for runs in (empty, full)]
        cost = statistics.median(costs_mb[when])
        lines.append(f"| {when} | {cells[0]:.0f} | {cells[1]:.0f} | {cost:.1f} | < {GOAL_MB} |")
    report(
        "memory",
        args,
        machine,
        dtype=dtype,
        table=[*lines, "", f"Differences round by round: {costs_mb}."],
        result={"weight_mb": round(weight_mb, 1), "private_mb": measured, "cost_mb": costs_mb, "goal_mb": GOAL_MB},
    )


def _register(args: argparse.Namespace, data_dir: Path) -> tuple[str, float]:
    """Fill a store as uploads do; returns the serving dtype and the weights' size in MB."""
    backbone = Backbone.load(backbone_folder(args), dtype=args.dtype)
    embeddings = embeddings_of(backbone)
    rng = np.random.default_rng(args.seed)
    config = PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM, num_virtual_tokens=args.k, token_dim=backbone.hidden_size
    ).to_dict()
    config_bytes = json.dumps(config, default=sorted).encode()
    with PromptStore.open(data_dir, backbone=backbone.shape(Settings.model_validate({}).max_virtual_tokens)) as store:
        for i in range(args.prompts):
            values: npt.NDArray[np.float32] = embeddings[rng.integers(3, len(embeddings), args.k)]
            store.upload(TENANT, f"task-{i}", file=save({"prompt_embeddings": values}), config=config_bytes)
    # By the configuration: a served backbone may hold its weights packed, elsewhere than in the model's parameters.
    weights = count_work(backbone_folder(args), DTYPES[backbone.dtype_name])
    return backbone.dtype_name, weights.weight_bytes / 1e6


def _run_server(args: argparse.Namespace, dtype: str, data_dir: Path, num_prompts: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.bench_memory", "--measure", str(data_dir), "--dtype", dtype]
    command += ["--threads", str(args.threads), "--backbone", backbone_folder(args), "--prompts", str(num_prompts)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


async def _serve_and_measure(args: argparse.Namespace) -> dict[str, float]:
    settings = Settings.model_validate(
        {
            "model": args.backbone,
            "dtype": args.dtype,
            "num_threads": args.threads,
            "data_dir": args.measure,
            "cache_dir": default_cache_dir(),
            "log_level": "error",
        }
    )
    app = create_app(settings)
    runtime: Runtime = app.state.runtime
    await runtime.start()
    try:
        await runtime.wait_until_settled()
        runtime.check_ready()
        measured = {READY: _private_mb()}
        tasks = runtime.parts.tasks
        pages = await runtime.call(lambda: list(tasks.callable_pages(TENANT)))
        names = [task.task for page in pages for task in page]
        await runtime.call(tasks.resolve_all, TENANT, names)
        if len(names) != args.prompts or runtime.parts.engine.status().prompts_resident:
            raise RuntimeError(f"not {args.prompts} tasks, none resident: what is measured is not registration alone")
        del pages, names
        measured[NAMED] = _private_mb()
    finally:
        await runtime.stop()
    return measured


def _private_mb() -> float:
    """What the process alone holds, after what is free was given back: garbage differs from run to run."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    private_kb = 0
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith(("Private_Clean:", "Private_Dirty:")):
            private_kb += int(line.split()[1])
    return round(private_kb * 1024 / 1e6, 1)


def _parse() -> argparse.Namespace:
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parse(parser)
    if args.quick:
        args.prompts = 100
    return args


if __name__ == "__main__":
    main()
