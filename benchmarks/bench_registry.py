"""What does a registry of 10,000 tasks in 50 tenants cost: to start, to resolve a name, to list, to add to?

A store is filled as uploads fill it, and a whole server (without a socket) is started over an empty store and over
the full one, in alternating rounds; the difference is what registration adds to a start, and no prompt may be resident
after it. Then, on the full server: the time to resolve every name, first through the database and again from the cache;
a page of 100 tasks at the beginning and near the end of one large tenant's names; the whole list of models; and uploads
into the full store against uploads into a new one. The physics: a resolved name is a look into a dictionary; one that
is not cached is three look-ups by index; a page is one walk along an index, wherever it begins; an upload is a handful
of fsyncs, and what else it costs must not grow with what is there already.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.machine import describe_machine, report
from benchmarks.registry import Uploads, serving, task_names
from benchmarks.rounds import load_backbone, make_parser, parse
from prompt_store.store import PromptStore
from server.runtime.tasks import TaskService

LARGE_TENANT = "large"
PAGE = 100
NUM_LISTED = 50
NUM_UPLOADS = 200

Times = dict[str, list[float]]


def main() -> None:
    args = _parse()
    machine = describe_machine()
    backbone = load_backbone(args)
    uploads, dtype = Uploads(backbone, k=args.k, seed=args.seed), backbone.dtype_name
    del backbone
    names = list(task_names(args.tasks - args.large, args.tenants - 1))
    names += [(LARGE_TENANT, f"task-{number:05}") for number in range(args.large)]
    times: Times = {}
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        empty, full = Path(scratch) / "empty", Path(scratch) / "full"
        with PromptStore.open(full, backbone=uploads.shape) as store:
            print(f"registering {len(names):,} tasks", file=sys.stderr, flush=True)
            seconds = [uploads.put(store, tenant, task) for tenant, task in names]
            times["upload into a new store"] = seconds[:NUM_UPLOADS]
            times[f"upload into a store of {args.tasks:,}"] = [
                uploads.put(store, LARGE_TENANT, f"extra-{number}") for number in range(min(NUM_UPLOADS, len(names)))
            ]
        starts: Times = {"empty": [], "full": []}
        for number in range(args.rounds):
            for name, folder in sorted({"empty": empty, "full": full}.items(), reverse=number % 2 == 1):
                starts[name].append(asyncio.run(_start(args, folder)))
        times |= asyncio.run(_measure(args, full, names))
    report("registry", args, machine, dtype=dtype, table=_table(starts, times), result=_result(starts, times))


async def _start(args: argparse.Namespace, folder: Path) -> float:
    async with serving(args, folder) as (runtime, seconds):
        if runtime.parts.engine.status().prompts_resident:
            raise RuntimeError("prompts are resident after a start: they were loaded eagerly")
    return seconds


async def _measure(args: argparse.Namespace, folder: Path, names: Sequence[tuple[str, str]]) -> Times:
    async with serving(args, folder) as (runtime, _):
        return await asyncio.to_thread(_ask, runtime.parts.tasks, names)


def _ask(tasks: TaskService, names: Sequence[tuple[str, str]]) -> Times:
    """On one thread, as one of the server's store threads asks."""

    def resolve_all() -> list[float]:
        return [_timed(partial(tasks.resolve_all, tenant, (task,))) for tenant, task in names]

    tasks.list_tasks(LARGE_TENANT, limit=1, after=None)
    num_large = sum(tenant == LARGE_TENANT for tenant, _ in names)
    late = f"task-{max(num_large - PAGE - 1, 0):05}"
    return {
        "resolve a name, not cached": resolve_all(),
        "resolve a name, cached": resolve_all(),
        f"first page of {PAGE} tasks": [
            _timed(lambda: tasks.list_tasks(LARGE_TENANT, limit=PAGE, after=None)) for _ in range(NUM_LISTED)
        ],
        f"last page of {PAGE} of {num_large:,} tasks": [
            _timed(lambda: tasks.list_tasks(LARGE_TENANT, limit=PAGE, after=late)) for _ in range(NUM_LISTED)
        ],
        f"all {num_large:,} models of a tenant": [
            _timed(lambda: list(tasks.callable_pages(LARGE_TENANT))) for _ in range(NUM_LISTED // 10)
        ],
    }


def _timed(work: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    work()
    return time.perf_counter() - started_s


def _table(starts: Times, times: Times) -> list[str]:
    added = [full - empty for full, empty in zip(starts["full"], starts["empty"], strict=True)]
    lines = [
        "| start of a server, s | median | rounds | goal |",
        "|---|---:|---|---:|",
        *(
            f"| {name} | {statistics.median(seconds):.2f} | {', '.join(f'{s:.2f}' for s in seconds)} | {goal} |"
            for name, seconds, goal in (
                ("empty store", starts["empty"], ""),
                ("full store", starts["full"], "< 30"),
                ("difference", added, ""),
            )
        ),
        "",
        "| ms | p50 | p99 | goal (p99) |",
        "|---|---:|---:|---:|",
    ]
    for name, seconds in times.items():
        goal = "< 1" if name == "resolve a name, cached" else ""
        lines.append(f"| {name} | {_quantile(seconds, 50):.3f} | {_quantile(seconds, 99):.3f} | {goal} |")
    rates = {name: 1 / statistics.mean(seconds) for name, seconds in times.items() if name.startswith("upload")}
    lines += ["", "Uploads a second: " + "; ".join(f"{rate:.0f} ({name})" for name, rate in rates.items()) + "."]
    return lines


def _result(starts: Times, times: Times) -> dict[str, object]:
    return {
        "start_s": {name: [round(second, 3) for second in seconds] for name, seconds in starts.items()},
        "ms": {
            name: {"p50": round(_quantile(seconds, 50), 4), "p99": round(_quantile(seconds, 99), 4)}
            for name, seconds in times.items()
        },
    }


def _quantile(seconds: Sequence[float], percent: int) -> float:
    """In milliseconds."""
    if len(seconds) == 1:
        return seconds[0] * 1000
    return statistics.quantiles(seconds, n=100, method="inclusive")[percent - 1] * 1000


def _parse() -> argparse.Namespace:
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("--tasks", type=int, default=10_000)
    parser.add_argument("--tenants", type=int, default=50)
    parser.add_argument("--large", type=int, default=2_000, help="tasks of the largest tenant")
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--scratch", type=Path, help="folder for the stores; default: the system's for temporary files")
    args = parse(parser)
    if args.quick:
        args.tasks, args.tenants, args.large = 60, 5, 20
    if not (2 <= args.tenants <= args.tasks and 1 <= args.large < args.tasks):
        parser.error("--tenants must be 2 to --tasks, and --large below --tasks")
    return args


if __name__ == "__main__":
    main()
