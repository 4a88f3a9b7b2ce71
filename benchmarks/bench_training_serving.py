"""How much slower is light traffic while a fine-tuning job runs on the same server, and how fast is the job?

A whole server in a process of its own; streams over HTTP arrive as a Poisson process, far below what the server could
serve, to prompts that are resident. Every round measures three states in turn, each round beginning with another one:
traffic alone, traffic beside a job, the job alone. A job is made over OpenAI's fine-tuning API and cancelled when its
turn is over; it has more steps than it can do. Latencies are a client's, of all rounds together; ratios are round by
round. Examples a second come from the server's own counter, from the first step that ends in a turn to the last; it is
looked at once a second in all three states.
"""

import argparse
import asyncio
import contextlib
import json
import random
import re
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import httpx
import numpy as np

from benchmarks.live_server import BenchmarkError, LiveServer
from benchmarks.machine import describe_machine, report
from benchmarks.registry import Uploads
from benchmarks.rounds import backbone_folder, make_parser, parse, plain, ratio, ratio_table
from prompt_store.names import DEFAULT_TENANT
from prompt_store.store import PromptStore
from server.bench.load import LoadPlan, LoadResult, run_load
from server.bench.online import OnlineTarget
from server.bench.summary import time_to_first_token
from server.bench.workload import BenchRequest
from server.engine.backbone import Backbone

QUIET, BUSY, JOB_ALONE = "traffic alone", "traffic beside a job", "job alone"
STATES = (QUIET, BUSY, JOB_ALONE)
LATENCIES = ("first token", "whole request")
GOAL = 1.5
NUM_TASKS = 8
NUM_EXAMPLES = 2000
NUM_STEPS = 20_000
COUNTER = "promptmux_training_examples_total"
LOOK_S = 1.0
WARM_UP_S = 10.0
EXAMPLES_FILE = "bench.jsonl"


def main() -> None:
    args = _parse()
    machine = describe_machine()
    latencies: dict[str, list[dict[str, list[float]]]] = {QUIET: [], BUSY: []}
    speeds: dict[str, list[float]] = {BUSY: [], JOB_ALONE: []}
    with tempfile.TemporaryDirectory() as scratch:
        dtype, backbone_name, vocab_size = _register(args, Path(scratch))
        with LiveServer(args, Path(scratch), dtype, ["--allow-training"]) as server:
            jobs = _Jobs(server, backbone_name, args)
            traffic = _Traffic(server.url, backbone_name, vocab_size, args)
            traffic.run(10_000, duration_s=WARM_UP_S)
            server.wait_until_compiled()
            traffic.run(10_001, duration_s=WARM_UP_S)
            for number in range(args.rounds):
                first = number % len(STATES)
                for state in STATES[first:] + STATES[:first]:
                    with contextlib.nullcontext() if state == QUIET else jobs.running(), _Speed(server.url) as speed:
                        if state == JOB_ALONE:
                            time.sleep(args.duration)
                        else:
                            latencies[state].append(traffic.run(number, duration_s=args.duration))
                    if state != QUIET:
                        speeds[state].append(speed.examples_per_s())
                    print(f"{number + 1}/{args.rounds} {state}", file=sys.stderr, flush=True)
    _report(args, machine, dtype, latencies, speeds)


class _Traffic:
    """Streams to the tasks of the store, other client tokens every round."""

    def __init__(self, url: str, backbone: str, vocab_size: int, args: argparse.Namespace) -> None:
        self._url, self._backbone, self._vocab_size, self._args = url, backbone, vocab_size, args

    def run(self, number: int, *, duration_s: float) -> dict[str, list[float]]:
        """One turn of traffic: its latencies in seconds. Raises BenchmarkError when a request failed."""
        result = asyncio.run(self._send(number, duration_s))
        failures = [record.failure for record in result.records if record.failure is not None]
        if failures or not result.records:
            raise BenchmarkError(f"{len(failures)} of {len(result.records)} requests failed: {failures[:1]}")
        first = [time_to_first_token(record) for record in result.records]
        return {
            "first token": [seconds for seconds in first if seconds is not None],
            "whole request": [record.ended_s - record.due_s for record in result.records],
        }

    async def _send(self, number: int, duration_s: float) -> LoadResult:
        plan = LoadPlan(rate=self._args.rate, duration_s=duration_s, seed=self._args.seed + number)
        tasks = [f"task-{index}" for index in range(NUM_TASKS)]
        async with OnlineTarget(self._url, None, backbone=self._backbone, tasks=tasks) as target:
            return await run_load(target, self._requests(number), plan)

    def _requests(self, number: int) -> Iterator[BenchRequest]:
        rng = np.random.default_rng((self._args.seed, number))
        while True:
            token_ids = tuple(rng.integers(3, self._vocab_size, int(rng.integers(8, 65))).tolist())
            yield BenchRequest(int(rng.integers(NUM_TASKS)), token_ids, self._args.new_tokens)


class _Jobs:
    """Fine-tuning jobs of one server, over OpenAI's API."""

    def __init__(self, server: LiveServer, backbone: str, args: argparse.Namespace) -> None:
        self._server, self._backbone, self._args = server, backbone, args
        self._http = httpx.Client(base_url=server.url, timeout=60)
        answer = self._http.post(
            "/v1/files", data={"purpose": "fine-tune"}, files={"file": (EXAMPLES_FILE, _examples(args.seed))}
        )
        self._file: str = _checked(answer)["id"]

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """A job that has taken its first step inside, and has ended afterwards."""
        body = {
            "model": self._backbone,
            "training_file": self._file,
            "promptmux": {
                "task": "bench-training",
                "method": self._args.method,
                "num_virtual_tokens": self._args.k,
                "num_steps": NUM_STEPS,
                "batch_size": self._args.batch_size,
            },
        }
        before = _num_examples(self._server.url)
        job = _checked(self._http.post("/v1/fine_tuning/jobs", json=body))["id"]
        try:
            self._server.wait_until(lambda: _num_examples(self._server.url) > before)
            yield
            if (status := self._status(job)) != "running":
                raise BenchmarkError(f"the job is {status} before its turn is over")
        finally:
            self._http.post(f"/v1/fine_tuning/jobs/{job}/cancel")
            self._server.wait_until(lambda: self._status(job) not in ("queued", "running"))

    def _status(self, job: str) -> str:
        return str(_checked(self._http.get(f"/v1/fine_tuning/jobs/{job}"))["status"])


class _Speed:
    """Looks at the counter of trained examples once a second, from a thread of its own. Use as a context manager."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._changes: list[tuple[float, float]] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="speed")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._is_over.set()
        self._thread.join()

    def examples_per_s(self) -> float:
        """Between the first step that ended meanwhile and the last. Raises BenchmarkError when there were not two."""
        if len(self._changes) < 2:
            raise BenchmarkError("the job took fewer than two steps in its turn: make turns longer or batches smaller")
        (first_s, first), (last_s, last) = self._changes[0], self._changes[-1]
        return (last - first) / (last_s - first_s)

    def _look(self) -> None:
        known = _num_examples(self._url)
        while not self._is_over.wait(LOOK_S):
            count = _num_examples(self._url)
            if count != known:
                known = count
                self._changes.append((time.monotonic(), count))


def _num_examples(url: str) -> float:
    """Examples that jobs have trained on since the server started."""
    found = re.search(rf"^{COUNTER} (\S+)$", httpx.get(f"{url}/metrics").text, re.MULTILINE)
    if found is None:
        raise BenchmarkError(f"the server has no metric {COUNTER}")
    return float(found[1])


def _report(
    args: argparse.Namespace,
    machine: dict[str, Any],
    dtype: str,
    latencies: dict[str, list[dict[str, list[float]]]],
    speeds: dict[str, list[float]],
) -> None:
    lines = [
        "| latency, ms | traffic alone: p50 | p99 | beside a job: p50 | p99 | requests |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    ratios = {}
    tables: dict[str, dict[str, list[float]]] = {}
    for name in LATENCIES:
        points = {state: np.percentile(_all(latencies[state], name), (50, 99)) * 1e3 for state in (QUIET, BUSY)}
        count = len(_all(latencies[QUIET], name)), len(_all(latencies[BUSY], name))
        cells = " | ".join(f"{point:.1f}" for state in (QUIET, BUSY) for point in points[state])
        lines.append(f"| {name} | {cells} | {count[0]}, {count[1]} |")
        tables[name] = {state: [round(float(p), 2) for p in points[state]] for state in points}
        for percentile in (50, 99):
            above, below = (
                [float(np.percentile(turn[name], percentile)) for turn in latencies[state]] for state in (BUSY, QUIET)
            )
            ratios[f"{name}, p{percentile}: beside a job ÷ alone"] = ratio(above, below, goal=f"≤ {GOAL}")
    ratios["job's examples/s: beside traffic ÷ alone"] = ratio(speeds[BUSY], speeds[JOB_ALONE])
    means = {state: statistics.median(found) for state, found in speeds.items()}
    lines += ["", *ratio_table(ratios), ""]
    lines.append(f"The job trained {means[JOB_ALONE]:.1f} examples/s alone, {means[BUSY]:.1f} beside the traffic.")
    report(
        "training-serving",
        args,
        machine,
        dtype=dtype,
        table=lines,
        result={
            "rate": args.rate,
            "duration_s": args.duration,
            "new_tokens": args.new_tokens,
            "latency_ms_p50_p99": tables,
            "examples_per_s": {state: [round(speed, 2) for speed in found] for state, found in speeds.items()},
            "ratios": plain(ratios),
        },
    )


def _all(turns: Sequence[dict[str, list[float]]], name: str) -> list[float]:
    return [seconds for turn in turns for seconds in turn[name]]


def _register(args: argparse.Namespace, data_dir: Path) -> tuple[str, str, int]:
    """Fill a store with prompts; the dtype, the backbone's name and the size of its vocabulary."""
    folder = backbone_folder(args)
    backbone = Backbone.load(folder, dtype=args.dtype)
    uploads = Uploads(backbone, k=args.k, seed=args.seed)
    with PromptStore.open(data_dir, backbone=uploads.shape) as store:
        for index in range(NUM_TASKS):
            uploads.put(store, DEFAULT_TENANT, f"task-{index}")
    return backbone.dtype_name, Path(folder).name, backbone.vocab_size


def _examples(seed: int) -> bytes:
    """Numbers and their digits in words: about 40 tokens of text, to be learnt or not."""
    rng = random.Random(seed)
    words = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    lines = []
    for _ in range(NUM_EXAMPLES):
        digits = [rng.randrange(10) for _ in range(12)]
        prompt = f"Write these digits in words: {' '.join(map(str, digits))} ->"
        lines.append(json.dumps({"prompt": prompt, "completion": " " + " ".join(words[digit] for digit in digits)}))
    return "\n".join(lines).encode()


def _checked(answer: httpx.Response) -> Any:
    if not answer.is_success:
        raise BenchmarkError(f"{answer.request.method} {answer.request.url.path}: {answer.status_code} {answer.text}")
    return answer.json()


def _parse() -> argparse.Namespace:
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("--rate", type=float, default=2.0, help="requests a second")
    parser.add_argument("--duration", type=float, default=60.0, help="seconds of a turn")
    parser.add_argument("--new-tokens", type=int, default=16, help="new tokens a request")
    parser.add_argument("--batch-size", type=int, default=16, help="examples a step of the job")
    parser.add_argument("--k", type=int, default=20, help="virtual tokens of all prompts")
    parser.add_argument("--method", default="prompt_tuning", help="of the job")
    args = parse(parser)
    if args.quick:
        args.duration, args.batch_size = 10.0, 2
    return args


if __name__ == "__main__":
    main()
