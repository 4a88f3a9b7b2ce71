"""How long until a change made at one replica of a shared store is in force at another?

Two processes, each with the store open as a server has it. One makes changes: uploads, roll-outs, roll-backs,
deletions, each of a prompt of 20 vectors of 576; the other resolves the task's name as fast as it can, as a busy server
does, and notes when the answer is the new one. The lag runs from the moment at which the change was acknowledged. Once
with PostgreSQL's notifications, and once without, where the half-second poll is all that there is. The physics: a
commit, a wake-up over a socket, one query by primary key; without a notification half the interval of the poll on
average and all of it at worst. Without `--url` a PostgreSQL of its own is started here, its writes made durable.
"""

import argparse
import itertools
import multiprocessing
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from multiprocessing.connection import Connection
from unittest.mock import patch

import numpy as np
from safetensors.numpy import save

from benchmarks.machine import describe_machine, report
from benchmarks.rounds import make_parser, parse
from prompt_store import follower
from prompt_store.errors import TaskNotFound
from prompt_store.manifest import BackboneShape
from prompt_store.store import PromptStore
from tests.postgresql import PostgresServer

# As large as a prompt for the embedded backbone.
HIDDEN, K = 576, 20
SHAPE = BackboneShape(
    name="replicated",
    fingerprint="ab" * 32,
    hidden_size=HIDDEN,
    num_layers=30,
    kv_heads=3,
    head_dim=64,
    dtype="float32",
    max_virtual_tokens=64,
    model_type="llama",
)
CONFIG = b'{"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM"}'
TENANT = "bench"
GOAL_S = 1.0
_GIVE_UP_S = 30.0

Lags = dict[str, list[float]]


def main() -> None:
    args = _parse()
    machine = describe_machine()
    if args.url is not None:
        lags = _measure_both(args.url, args)
    else:
        server = PostgresServer(durable=True)
        try:
            server.start()
            with server.database() as url:
                lags = _measure_both(url, args)
        finally:
            server.remove()
    report("replication", args, machine, dtype="float32", table=_table(lags), result={"lags": _summary(lags)})


def _measure_both(url: str, args: argparse.Namespace) -> dict[str, Lags]:
    return {
        "notified": _measure(url, args, hears=True, changes=args.changes),
        # Each takes a quarter of a second.
        "polled": _measure(url, args, hears=False, changes=max(args.changes // 10, 4)),
    }


def _measure(url: str, args: argparse.Namespace, *, hears: bool, changes: int) -> Lags:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    reader = context.Process(target=_read, args=(url, theirs, hears), daemon=True)
    reader.start()
    lags: Lags = {}
    try:
        with PromptStore.open(url, backbone=SHAPE) as store:
            ours.recv()
            for what, task, expected in itertools.islice(_changes(store, args.seed, hears), changes):
                acknowledged_s = time.monotonic()
                ours.send((task, expected))
                lags.setdefault(what, []).append(max(ours.recv() - acknowledged_s, 0.0))
        ours.send(None)
        reader.join()
    finally:
        reader.kill()
    return lags


def _changes(store: PromptStore, seed: int, hears: bool) -> Iterator[tuple[str, str, int | None]]:
    """Makes a change each time it is asked: what it was, the task, and the version that answers then."""
    for number in itertools.count():
        task = f"{'notified' if hears else 'polled'}-{seed}-{number}"
        for version in (1, 2):
            values = np.random.default_rng((seed, number, version)).normal(size=(K, HIDDEN)).astype(np.float32)
            store.upload(TENANT, task, file=save({"prompt_embeddings": values}), config=CONFIG)
            yield "upload", task, version
        store.rollback(TENANT, task)
        yield "roll-back", task, 1
        store.update_task(TENANT, task, active_version=2)
        yield "roll-out", task, 2
        store.delete_task(TENANT, task)
        yield "deletion", task, None


def _read(url: str, pipe: Connection, hears: bool) -> None:
    """The other replica: says when a task's name means what it was told."""
    deafness = nullcontext() if hears else patch.object(follower, "NOTIFICATION_CHANNEL", "nobody")
    with deafness, PromptStore.open(url, backbone=SHAPE) as store:
        pipe.send("ready")
        while (asked := pipe.recv()) is not None:
            task, expected = asked
            deadline_s = time.monotonic() + _GIVE_UP_S
            while _resolve(store, task) != expected and time.monotonic() < deadline_s:
                # Some microseconds for the follower's thread, as a server's other work leaves it.
                time.sleep(0)
            pipe.send(time.monotonic())


def _resolve(store: PromptStore, task: str) -> int | None:
    try:
        return store.resolve(TENANT, task).version
    except TaskNotFound:
        return None


def _table(lags: dict[str, Lags]) -> list[str]:
    lines = ["| lag, ms | changes | p50 | p99 | max | goal (p99) |", "|---|---:|---:|---:|---:|---:|"]
    for way, by_kind in lags.items():
        for kind, seconds in {**by_kind, "all": [lag for lags in by_kind.values() for lag in lags]}.items():
            goal = f"< {GOAL_S * 1000:.0f}" if kind == "all" else ""
            p50, p99, worst = (f"{value * 1000:.1f}" for value in _percentiles(seconds))
            lines.append(f"| {way}: {kind} | {len(seconds)} | {p50} | {p99} | {worst} | {goal} |")
    return lines


def _summary(lags: dict[str, Lags]) -> dict[str, dict[str, float]]:
    names = ("p50_s", "p99_s", "max_s")
    return {
        way: dict(zip(names, _percentiles([lag for lags in by_kind.values() for lag in lags]), strict=True))
        for way, by_kind in lags.items()
    }


def _percentiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    ordered = sorted(seconds)
    return statistics.median(ordered), ordered[min(int(len(ordered) * 0.99), len(ordered) - 1)], ordered[-1]


def _parse() -> argparse.Namespace:
    parser = make_parser(__doc__, rounds=1)
    parser.add_argument("--url", help="an empty database; default: a server of its own, which needs the binaries")
    parser.add_argument("--changes", type=int, default=2000)
    args = parse(parser)
    if args.quick:
        args.changes = min(args.changes, 40)
    return args


if __name__ == "__main__":
    main()
