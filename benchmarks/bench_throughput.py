"""How fast are 64 requests over 64 soft prompts, beside what a user would write without promptmux?

All systems run the same backbone in the same dtype with the same threads, in turn, three times; medians are compared.
New tokens a second count only tokens that were asked for: a static batch works on until its longest row is done, and
the rest is waste. The physics: a decode step reads all weights once, whatever the number of rows, so a batch of 64
costs little more than one row until the products themselves become the limit; a soft prompt costs attention over k
more keys, and nothing else, once it is compiled.
"""

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.machine import describe_machine, keep
from benchmarks.offline import OfflineEngine
from benchmarks.peers import PeftOneAtATime, StaticBatch
from benchmarks.workload import Workload, make_workload
from server.embedded import default_cache_dir, ensure_embedded_backbone
from server.engine.backbone import DTYPES, Backbone
from server.engine.config import EngineConfig

PEFT = "PEFT one at a time"
COLD = "promptmux, prompts not yet compiled"
MUX = "promptmux, 64 prompts"
ONE = "promptmux, one prompt"
NONE = "promptmux, no prompt"

System = Callable[[Workload], list[list[int]]]


def main() -> None:
    args = _parse()
    torch.set_num_threads(args.threads)
    folder = args.backbone or str(ensure_embedded_backbone(default_cache_dir(), progress=True))
    backbone = Backbone.load(folder, dtype=args.dtype)
    weight: Any = backbone.model.get_input_embeddings().weight
    embeddings = weight.detach().float().numpy()

    def workload(num_prompts: int, new_tokens: str) -> Workload:
        return make_workload(
            embeddings,
            num_requests=args.requests,
            num_prompts=num_prompts,
            k=args.k,
            new_tokens=new_tokens,
            seed=args.seed,
        )

    config = EngineConfig(max_rows=args.max_rows, max_step_tokens=args.max_step_tokens, audit_share=args.audit_share)
    dtype = DTYPES[backbone.dtype_name]
    many = workload(args.requests, "fixed")
    with OfflineEngine(backbone, config) as engine:

        def cold(load: Workload) -> list[list[int]]:
            engine.forget_prefixes()
            return engine.run(load)

        peft = PeftOneAtATime(folder, dtype, many)
        static = {f"static batch of {size}": StaticBatch(folder, dtype, many, size).run for size in args.static}
        systems: list[tuple[str, str, System, Workload]] = [
            ("fixed", COLD, cold, many),
            ("fixed", PEFT, peft.run, many),
            ("fixed", MUX, engine.run, many),
            ("fixed", ONE, engine.run, workload(1, "fixed")),
            ("fixed", NONE, engine.run, workload(0, "fixed")),
        ]
        long_tail = workload(args.requests, "lognormal")
        systems.append(("lognormal", MUX, engine.run, long_tail))
        for name, run in static.items():
            systems.append(("fixed", name, run, many))
            systems.append(("lognormal", name, run, long_tail))
        seconds, answers = _measure(systems, args.repeats)
    result = _result(args, seconds, answers, {"fixed": many.num_new_tokens, "lognormal": long_tail.num_new_tokens})
    table = _table(result)
    print(table)
    keep(f"throughput-{backbone.dtype_name}{args.tag}", result, table)
    print(json.dumps(result))


def _measure(
    systems: list[tuple[str, str, System, Workload]], repeats: int
) -> tuple[dict[tuple[str, str], list[float]], dict[tuple[str, str], list[list[int]]]]:
    """Run all systems in turn, `repeats` times, after one warm-up of each on a few requests."""
    seconds: dict[tuple[str, str], list[float]] = {}
    answers: dict[tuple[str, str], list[list[int]]] = {}
    for _, _, run, load in systems:
        run(Workload(load.prompts, load.requests[:8]))
    for repeat in range(repeats):
        for lengths, name, run, load in systems:
            started_s = time.perf_counter()
            answers[lengths, name] = run(load)
            seconds.setdefault((lengths, name), []).append(time.perf_counter() - started_s)
            print(f"{repeat + 1}/{repeats} {lengths:10} {name:36} {seconds[lengths, name][-1]:7.2f} s", file=sys.stderr)
    return seconds, answers


def _result(
    args: argparse.Namespace,
    seconds: dict[tuple[str, str], list[float]],
    answers: dict[tuple[str, str], list[list[int]]],
    num_new_tokens: dict[str, int],
) -> dict[str, Any]:
    medians = {key: statistics.median(times) for key, times in seconds.items()}
    rates = {key: num_new_tokens[key[0]] / median for key, median in medians.items()}

    def best_static(lengths: str) -> float:
        return max(rate for (kind, name), rate in rates.items() if kind == lengths and name.startswith("static"))

    mux = rates["fixed", MUX]
    same = sum(a == b for a, b in zip(answers["fixed", MUX], answers["fixed", PEFT], strict=True))
    return {
        "benchmark": "throughput",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": ("python -m benchmarks.bench_throughput " + " ".join(sys.argv[1:])).strip(),
        "seed": args.seed,
        "dtype": args.dtype,
        "machine": describe_machine(),
        "seconds": {f"{kind}: {name}": [round(s, 3) for s in times] for (kind, name), times in seconds.items()},
        "tokens_per_s": {f"{kind}: {name}": round(rate, 1) for (kind, name), rate in rates.items()},
        "same_as_peft": f"{same} of {len(answers['fixed', MUX])} whole sequences",
        "ratios": {
            "fixed: ÷ PEFT one at a time": round(mux / rates["fixed", PEFT], 2),
            "fixed: ÷ best static batch": round(mux / best_static("fixed"), 2),
            "lognormal: ÷ best static batch": round(rates["lognormal", MUX] / best_static("lognormal"), 2),
            "64 prompts ÷ one prompt": round(mux / rates["fixed", ONE], 3),
            "64 prompts ÷ no prompt": round(mux / rates["fixed", NONE], 3),
        },
    }


def _table(result: dict[str, Any]) -> str:
    lines = ["| new tokens | system | tokens/s (median) | seconds |", "|---|---|---:|---|"]
    for key, rate in result["tokens_per_s"].items():
        kind, _, name = key.partition(": ")
        lines.append(f"| {kind} | {name} | {rate:.0f} | {', '.join(f'{s:.2f}' for s in result['seconds'][key])} |")
    lines += ["", "| ratio | value |", "|---|---:|"]
    lines += [f"| {name} | {value} |" for name, value in result["ratios"].items()]
    lines += ["", f"Greedy output equal to PEFT's: {result['same_as_peft']}."]
    return "\n".join(lines)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", help="model folder; default: the embedded backbone")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--static", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-rows", type=int, default=EngineConfig().max_rows)
    parser.add_argument("--max-step-tokens", type=int, default=EngineConfig().max_step_tokens)
    parser.add_argument("--audit-share", type=float, default=EngineConfig().audit_share)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tag", default="", help="appended to the name of the kept result")
    return parser.parse_args()


if __name__ == "__main__":
    main()
