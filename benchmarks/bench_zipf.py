"""Does Zipf traffic over 10,000 registered tasks keep the throughput of 16 hot tasks?

One server (without a socket) over one store with all tasks; requests of alternating rounds go through its runtime, from
the name to the last token. In one system the task of each request is drawn from all, the r-th with a probability in
proportion to 1/r; in the other from the first 16 alone, all alike. Which names are hot stays the same over the rounds,
as in life: rounds before the timed ones fill the caches. The physics: a cold task costs a read of its file and one pass
over its k vectors, both beside the rows that run; the budget for prefixes (`prefix_cache_bytes`) decides how many are
cold, so that the share of misses is in the table.
"""

import argparse
import asyncio
import tempfile
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.machine import describe_machine, report
from benchmarks.registry import Uploads, serving, task_names
from benchmarks.rounds import (
    interleave,
    load_backbone,
    make_parser,
    parse,
    plain,
    ratio,
    ratio_table,
    rounded,
    speed_table,
    timed,
)
from prompt_store.store import PromptStore
from server.bench.workload import PromptPicker
from server.engine.request import SamplingParams
from server.runtime.generation import GenerationSpec
from server.runtime.in_flight import RunningGeneration
from server.runtime.service import Runtime
from server.tenancy.keys import ALL_SCOPES, Caller

CALLER = Caller(tenant="tenant-000", scopes=ALL_SCOPES)
SEED_OF_TOKENS = 3


def main() -> None:
    args = _parse()
    machine = describe_machine()
    backbone = load_backbone(args)
    uploads, dtype = Uploads(backbone, k=args.k, seed=args.seed), backbone.dtype_name
    vocab_size = backbone.vocab_size
    del backbone
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        data_dir = Path(scratch) / "data"
        with PromptStore.open(data_dir, backbone=uploads.shape) as store:
            names = [name for name in task_names(args.tasks, 1) if uploads.put(store, *name)]
        with asyncio.Runner() as runner:
            runner.run(_bench(args, machine, dtype, vocab_size, data_dir, [task for _, task in names]))


async def _bench(
    args: argparse.Namespace, machine: dict[str, object], dtype: str, vocab_size: int, data_dir: Path, tasks: list[str]
) -> None:
    zipf, hot = f"Zipf over {args.tasks:,} tasks", f"{args.hot} hot tasks"
    pickers = {
        zipf: PromptPicker(args.tasks, zipf=args.exponent, seed=args.seed),
        hot: PromptPicker(args.hot, zipf=0.0, seed=args.seed + 1),
    }
    tokens = np.random.default_rng((args.seed, SEED_OF_TOKENS))
    loop = asyncio.get_running_loop()
    async with serving(
        args, data_dir, max_waiting_rows=args.requests, receipts_max_rows=0, prefix_cache_bytes=args.prefix_cache_bytes
    ) as (runtime, _):

        def run(name: str, number: int) -> float:
            """In a thread of its own, while the loop serves."""
            specs = [
                _spec(tasks[index or 0], tuple(tokens.integers(3, vocab_size, tokens.integers(8, 65)).tolist()), args)
                for index in pickers[name].pick(args.requests)
            ]
            return timed(lambda: asyncio.run_coroutine_threadsafe(_answer(runtime, specs), loop).result())

        def rounds() -> dict[str, list[float]]:
            for number in range(args.warm_rounds):
                for name in pickers:
                    run(name, number)
            while (backbone := runtime.backbone) is not None and backbone.compiled_state == "compiling":
                run(hot, 0)
            before.update(_misses(runtime))
            return interleave({name: partial(run, name) for name in pickers}, args.rounds)

        before: dict[str, float] = {}
        seconds = await asyncio.to_thread(rounds)
        misses = {tier: count - before[tier] for tier, count in _misses(runtime).items()}
    ratios = {f"{zipf} ÷ {hot}": ratio(seconds[hot], seconds[zipf], goal="≥ 0.8")}
    num_tokens = dict.fromkeys(seconds, args.requests * args.new_tokens)
    num_requests = 2 * args.rounds * args.requests
    shares = ", ".join(f"{tier} {count / num_requests:.1%}" for tier, count in misses.items())
    report(
        "zipf",
        args,
        machine,
        dtype=dtype,
        table=[
            *speed_table(seconds, num_tokens),
            "",
            *ratio_table(ratios),
            "",
            f"Rows of both systems whose prompt was not resident: {shares}.",
        ],
        result={
            "seconds": rounded(seconds),
            "num_new_tokens": num_tokens,
            "ratios": plain(ratios),
            "num_rows": num_requests,
            "num_misses": misses,
        },
    )


def _spec(task: str, token_ids: tuple[int, ...], args: argparse.Namespace) -> GenerationSpec:
    return GenerationSpec(
        prompts=(token_ids,),
        references=(task,),
        n=1,
        sampling=SamplingParams(max_tokens=args.new_tokens, temperature=0.0, ignore_eos=True),
    )


async def _answer(runtime: Runtime, specs: list[GenerationSpec]) -> None:
    """All at once, each to its end. Raises what a row ended with."""
    await asyncio.gather(*(_answer_one(runtime, spec) for spec in specs))


async def _answer_one(runtime: Runtime, spec: GenerationSpec) -> None:
    generation = await runtime.prepare(CALLER, spec)
    running: RunningGeneration = runtime.submit(generation, arrived_at_s=asyncio.get_running_loop().time())
    stream = running.stream
    try:
        while not stream.is_finished:
            for output in await stream.read():
                if output.error is not None:
                    raise output.error
    finally:
        stream.close()


def _misses(runtime: Runtime) -> dict[str, float]:
    name = "promptmux_prompt_cache_misses_total"
    registry = runtime.metrics.registry
    return {tier: registry.get_sample_value(name, {"tier": tier}) or 0.0 for tier in ("device", "host")}


def _parse() -> argparse.Namespace:
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("--tasks", type=int, default=10_000)
    parser.add_argument("--hot", type=int, default=16)
    parser.add_argument("--requests", type=int, default=500, help="of a round")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--exponent", type=float, default=1.0)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--warm-rounds", type=int, default=2)
    parser.add_argument("--prefix-cache-bytes", type=int, default=1 << 30, help="memory for prefixes on the device")
    parser.add_argument("--scratch", type=Path, help="folder for the store; default: the system's for temporary files")
    args = parse(parser)
    if args.quick:
        args.tasks, args.requests, args.new_tokens, args.warm_rounds = 64, 16, 8, 1
    if not 1 <= args.hot <= args.tasks:
        parser.error(f"--hot is {args.hot}; it must be 1 to --tasks ({args.tasks})")
    return args


if __name__ == "__main__":
    main()
