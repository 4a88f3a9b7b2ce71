"""What a request costs a server with a prompt of k vectors, and with a text, in front of its item.

One request at a time in the engine itself, each answer of the same number of tokens. The engine runs in a process of
its own: beside a thread that has trained it would be slower (two OpenMP teams on the same cores). Refuses to know
answers: a random prompt of k vectors costs what a trained one does, once compiled.
"""

import asyncio
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from benchmarks.rounds import embeddings_of, settle
from benchmarks.tuning.ledger import Latency
from server.bench.load import Answer
from server.bench.offline import OfflineEngine, OfflineTarget
from server.bench.workload import BenchRequest
from server.embedded import default_cache_dir
from server.engine.backbone import Backbone
from server.engine.config import EngineConfig

NUM_WARM_UPS = 4
"""After these a prompt is compiled, and the beginning that all texts share is cached."""


class LatencyError(RuntimeError):
    """A request failed, or the process of the engine; the message says how."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyRun:
    """One cell's requests: its items' token ids, and the vectors before them (None: no prompt)."""

    key: str
    texts: Sequence[Sequence[int]]
    k: int | None
    num_items: int
    num_new_tokens: int


def measure_in_child(
    runs: Sequence[LatencyRun], *, folder: str, dtype: str, num_threads: int
) -> Iterator[tuple[str, Latency]]:
    """Each run's key and latency, as soon as it is measured. Raises LatencyError."""
    job = {"folder": folder, "dtype": dtype, "num_threads": num_threads, "runs": [asdict(run) for run in runs]}
    command = [sys.executable, "-m", "benchmarks.tuning.latency"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(job))
        process.stdin.close()
        for line in process.stdout:
            answer = json.loads(line)
            yield answer["key"], Latency.model_validate(answer["latency"])
    if process.returncode:
        raise LatencyError(f"the process of the engine ended with code {process.returncode}")


def measure(backbone: Backbone, run: LatencyRun) -> Latency:
    """Medians over the first items, after a few others. Raises LatencyError, also where the texts are too few."""
    if len(run.texts) < run.num_items + NUM_WARM_UPS:
        raise LatencyError(f"{len(run.texts)} items are too few for {run.num_items} and {NUM_WARM_UPS} of warm-up")
    embeddings = embeddings_of(backbone)
    rng = np.random.default_rng(0)
    prompts = [] if run.k is None else [embeddings[rng.integers(3, len(embeddings), run.k)].astype(np.float32)]
    requests = [BenchRequest(None if run.k is None else 0, tuple(ids), run.num_new_tokens) for ids in run.texts]
    with OfflineEngine(backbone, EngineConfig(audit_share=0.0)) as engine:
        target = OfflineTarget(engine, prompts)
        warm_ups = requests[run.num_items : run.num_items + NUM_WARM_UPS]
        settle(backbone, lambda _: asyncio.run(_one_at_a_time(target, warm_ups)))
        found = asyncio.run(_one_at_a_time(target, requests[: run.num_items]))
    return Latency(
        first_token_ms=round(statistics.median(first for first, _, _ in found) * 1e3, 3),
        whole_ms=round(statistics.median(whole for _, whole, _ in found) * 1e3, 3),
        num_text_tokens=round(statistics.median(len(ids) for ids in run.texts[: run.num_items])),
        num_cached_tokens=round(statistics.median(cached for _, _, cached in found)),
        num_new_tokens=run.num_new_tokens,
    )


async def _one_at_a_time(target: OfflineTarget, requests: Sequence[BenchRequest]) -> list[tuple[float, float, int]]:
    """Of each request the seconds to its first token and to its end, and its cached tokens."""
    now = asyncio.get_running_loop().time
    found = []
    for request in requests:
        started_s = now()
        answer: Answer = await target.answer(request)
        if answer.failure is not None:
            raise LatencyError(f"{answer.failure.kind}: {answer.failure.message}")
        found.append((answer.token_times_s[0] - started_s, answer.ended_s - started_s, answer.num_cached_tokens))
    return found


def main() -> None:
    """The child: a job on stdin, a line of JSON on stdout for each of its runs."""
    # Libraries may print: the pipe is for answers alone.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    job = json.loads(sys.stdin.read())
    torch.set_num_threads(job["num_threads"])
    backbone = Backbone.load(job["folder"], dtype=job["dtype"], cache_dir=default_cache_dir())
    for fields in job["runs"]:
        run = LatencyRun(**fields)
        answers.write(json.dumps({"key": run.key, "latency": measure(backbone, run).model_dump()}) + "\n")


if __name__ == "__main__":
    main()
