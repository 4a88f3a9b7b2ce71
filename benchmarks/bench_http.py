"""What does HTTP cost? 64 concurrent streams of a whole server ÷ the same engine called in process.

The server is `promptmux serve` in a process of its own, with a store that holds every prompt; its clients are plain
sockets in this process, which read each stream to its end and parse only its last events, so that the client takes
little of the machine (its CPU seconds are in the result). The engine without HTTP is in a third process. The two are
timed in turn, with the same prompts, the same client tokens and the same settings; whoever is not timed sleeps.
"""

import argparse
import asyncio
import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import IO

from peft import PromptTuningConfig, TaskType
from safetensors.numpy import save

from benchmarks.live_server import BenchmarkError, LiveServer
from benchmarks.machine import describe_machine, report
from benchmarks.rounds import (
    SETTLING_RUNS,
    backbone_folder,
    embeddings_of,
    interleave,
    load_backbone,
    make_parser,
    parse,
    plain,
    ratio,
    ratio_table,
    refresh,
    rounded,
    settle,
    speed_table,
    timed,
)
from prompt_store.store import PromptStore
from server.bench.offline import OfflineEngine
from server.bench.workload import Workload, make_workload
from server.engine.backbone import Backbone
from server.engine.config import EngineConfig
from server.settings import Settings

ENGINE, HTTP = "engine in process", "HTTP streams"
TENANT = "default"


def main() -> None:
    args = _parse()
    if args.engine:
        _serve_pipe(args)
        return
    machine = describe_machine()
    with tempfile.TemporaryDirectory() as scratch:
        dtype, vocab_size, load = _register(args, Path(scratch))
        with _EnginePeer(args) as engine, _Server(args, Path(scratch), dtype) as server:
            systems: dict[str, Callable[[int], float]] = {
                ENGINE: engine.run,
                HTTP: partial(server.run, load, vocab_size, args.seed),
            }
            engine.settle()
            server.settle(systems[HTTP])
            cpu_s = _client_cpu_s()
            seconds = interleave(systems, args.rounds)
            cpu_s = _client_cpu_s() - cpu_s
            compiled_sizes = server.compiled_sizes
    ratios = {f"{HTTP} ÷ {ENGINE}": ratio(seconds[ENGINE], seconds[HTTP], goal="≥ 0.9")}
    num_tokens = dict.fromkeys(seconds, load.num_new_tokens)
    share = cpu_s / sum(seconds[HTTP])
    table = [
        *speed_table(seconds, num_tokens),
        "",
        *ratio_table(ratios),
        "",
        f"The clients took {100 * share:.0f}% of one core while HTTP was timed; they are in its time.",
        f"Sizes of steps that the server served compiled: {', '.join(map(str, compiled_sizes)) or 'none'}.",
    ]
    report(
        "http",
        args,
        machine,
        dtype=dtype,
        table=table,
        result={
            "seconds": rounded(seconds),
            "num_new_tokens": num_tokens,
            "client_cpu_s": round(cpu_s, 3),
            "compiled_sizes": compiled_sizes,
            "ratios": plain(ratios),
        },
    )


def _register(args: argparse.Namespace, data_dir: Path) -> tuple[str, int, Workload]:
    """Fill a store with the workload's prompts as uploads do; the dtype, the vocabulary's size and the workload."""
    backbone = Backbone.load(backbone_folder(args), dtype=args.dtype)
    load = _workload(args, backbone)
    config = PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM, num_virtual_tokens=args.k, token_dim=backbone.hidden_size
    ).to_dict()
    config_bytes = json.dumps(config, default=sorted).encode()
    with PromptStore.open(data_dir, backbone=backbone.shape(Settings.model_validate({}).max_virtual_tokens)) as store:
        for index, values in enumerate(load.prompts):
            store.upload(TENANT, f"task-{index}", file=save({"prompt_embeddings": values}), config=config_bytes)
    return backbone.dtype_name, backbone.vocab_size, load


def _workload(args: argparse.Namespace, backbone: Backbone) -> Workload:
    load = make_workload(
        embeddings_of(backbone),
        num_requests=args.streams,
        num_prompts=args.streams,
        k=args.k,
        new_tokens="fixed",
        seed=args.seed,
    )
    requests = [dataclasses.replace(request, num_new_tokens=args.new_tokens) for request in load.requests]
    return Workload(load.prompts, requests)


class _Server(LiveServer):
    """`promptmux serve` and the clients of its streams."""

    def settle(self, run: Callable[[int], float]) -> None:
        """Bring every prompt, and wait until steps are served as they will be while they are timed."""
        run(10_000)
        self.wait_until_compiled()
        for number in range(SETTLING_RUNS):
            run(10_001 + number)

    def run(self, load: Workload, vocab_size: int, seed: int, number: int) -> float:
        bodies = [
            json.dumps(
                {
                    "model": f"task-{request.prompt}",
                    "prompt": list(request.token_ids),
                    "max_tokens": request.num_new_tokens,
                    "temperature": 0,
                    "ignore_eos": True,
                    "stream": True,
                    "stream_options": {"include_usage": True},
                }
            ).encode()
            for request in refresh(load, vocab_size, seed=seed, number=number).requests
        ]

        async def all_streams() -> list[int]:
            return await asyncio.gather(*(self._stream(body) for body in bodies))

        counts: list[int] = []
        seconds = timed(lambda: counts.extend(asyncio.run(all_streams())))
        if counts != [request.num_new_tokens for request in load.requests]:
            raise BenchmarkError(f"streams ended with {counts} tokens")
        return seconds

    async def _stream(self, body: bytes) -> int:
        """Read one stream to its end; the number of new tokens that its usage tells."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 24)
        head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        usage = answer.rfind(b'"completion_tokens":')
        if not answer.startswith(b"HTTP/1.1 200") or usage < 0 or b"data: [DONE]" not in answer:
            raise BenchmarkError(f"a stream failed: {answer[-500:]!r}")
        return int(answer[usage:].partition(b":")[2].partition(b",")[0])


class _EnginePeer:
    """The engine in a process of its own: a round's number goes in, its seconds come out."""

    def __init__(self, args: argparse.Namespace) -> None:
        command = [sys.executable, "-m", "benchmarks.bench_http", "--engine", *_options(args)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> "_EnginePeer":
        return self

    def __exit__(self, *exc_info: object) -> None:
        _pipe(self._process.stdin).close()
        self._process.wait(timeout=60)

    def settle(self) -> None:
        """Wait until it has said that it is ready."""
        self._read()

    def run(self, number: int) -> float:
        stdin = _pipe(self._process.stdin)
        stdin.write(f"{number}\n")
        stdin.flush()
        return self._read()

    def _read(self) -> float:
        line = _pipe(self._process.stdout).readline()
        if not line:
            raise BenchmarkError(f"the engine ended with code {self._process.wait()}")
        return float(line)


def _serve_pipe(args: argparse.Namespace) -> None:
    """The other end of `_EnginePeer`."""
    # Libraries may print: the pipe is for answers alone.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    backbone = load_backbone(args)
    load = _workload(args, backbone)
    with OfflineEngine(backbone, EngineConfig(audit_share=0.0)) as engine:

        def run(number: int) -> float:
            fresh = refresh(load, backbone.vocab_size, seed=args.seed, number=number)
            return timed(lambda: engine.run(fresh))

        settle(backbone, run)
        print(0.0, file=answers)
        for line in sys.stdin:
            print(run(int(line)), file=answers)


def _options(args: argparse.Namespace) -> Sequence[str]:
    names = ("backbone", "dtype", "threads", "seed", "streams", "new-tokens", "k")
    given = {name: getattr(args, name.replace("-", "_")) for name in names}
    return [part for name, value in given.items() if value is not None for part in (f"--{name}", str(value))]


def _pipe(pipe: IO[str] | None) -> IO[str]:
    if pipe is None:
        raise BenchmarkError("the engine has no pipe")
    return pipe


def _client_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _parse() -> argparse.Namespace:
    parser = make_parser(__doc__, rounds=7)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128, help="new tokens a stream")
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--engine", action="store_true", help=argparse.SUPPRESS)
    args = parse(parser)
    if args.quick:
        args.streams, args.new_tokens = 4, 16
    return args


if __name__ == "__main__":
    main()
