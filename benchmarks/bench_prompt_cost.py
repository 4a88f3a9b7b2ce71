"""What does a soft prompt cost: 64 rows with 64 prompts, with one prompt, and with none?

The three run in turn, many rounds, on one engine, so that a drift of the machine's speed meets all alike; medians are
compared, and the ratios round by round. The physics: a compiled prompt costs attention over k more columns, and the
copy of its keys and values into the row's slot; which prompts they are, and how many, costs nothing.
"""

import argparse
import datetime
import json
import statistics
import sys
import time
from typing import Any

import torch

from benchmarks.machine import describe_machine, keep
from benchmarks.offline import OfflineEngine
from benchmarks.workload import make_workload
from server.embedded import default_cache_dir, ensure_embedded_backbone
from server.engine.backbone import DTYPES, Backbone
from server.engine.config import EngineConfig


def main() -> None:
    args = _parse()
    folder = args.backbone or str(ensure_embedded_backbone(default_cache_dir(), progress=True))
    backbone = Backbone.load(folder, dtype=args.dtype)
    weight: Any = backbone.model.get_input_embeddings().weight
    embeddings = weight.detach().float().numpy()
    names = {args.requests: f"{args.requests} prompts", 1: "one prompt", 0: "no prompt"}
    loads = {
        name: make_workload(
            embeddings,
            num_requests=args.requests,
            num_prompts=num_prompts,
            k=args.k,
            new_tokens="fixed",
            seed=args.seed,
        )
        for num_prompts, name in names.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in loads}
    with OfflineEngine(backbone, EngineConfig()) as engine:
        for load in loads.values():
            engine.run(load)
        for round_number in range(args.rounds):
            # Each in turn goes first, so that none always follows the same other.
            order = list(loads)
            order = order[round_number % len(order) :] + order[: round_number % len(order)]
            for name in order:
                started_s = time.perf_counter()
                engine.run(loads[name])
                seconds[name].append(time.perf_counter() - started_s)
                print(f"{round_number + 1}/{args.rounds} {name:12} {seconds[name][-1]:6.2f} s", file=sys.stderr)
    many, one, none = (seconds[name] for name in loads)
    tokens = args.requests * 32
    result = {
        "benchmark": "prompt_cost",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": ("python -m benchmarks.bench_prompt_cost " + " ".join(sys.argv[1:])).strip(),
        "seed": args.seed,
        "dtype": backbone.dtype_name,
        "machine": describe_machine(),
        "seconds": {name: [round(s, 3) for s in times] for name, times in seconds.items()},
        "tokens_per_s": {name: round(tokens / statistics.median(times), 1) for name, times in seconds.items()},
        "ratios": {
            f"{args.requests} prompts ÷ one prompt": _ratios(one, many),
            f"{args.requests} prompts ÷ no prompt": _ratios(none, many),
        },
    }
    table = _table(result)
    print(table)
    keep(f"prompt-cost-{backbone.dtype_name}", result, table)
    print(json.dumps(result))


def _ratios(slow: list[float], fast: list[float]) -> dict[str, float]:
    """Speed ratios: of the medians, and the quartiles of the ratios round by round."""
    by_round = [a / b for a, b in zip(slow, fast, strict=True)]
    low, middle, high = statistics.quantiles(by_round, n=4)
    return {
        "of medians": round(statistics.median(slow) / statistics.median(fast), 3),
        "by round, median": round(middle, 3),
        "by round, quartiles": [round(low, 3), round(high, 3)],  # type: ignore[dict-item]
    }


def _table(result: dict[str, Any]) -> str:
    lines = ["| rows with | tokens/s (median) | seconds |", "|---|---:|---|"]
    for name, rate in result["tokens_per_s"].items():
        lines.append(f"| {name} | {rate:.0f} | {', '.join(f'{s:.2f}' for s in result['seconds'][name])} |")
    lines += ["", "| speed ratio | of medians | by round: median (quartiles) |", "|---|---:|---|"]
    for name, ratio in result["ratios"].items():
        low, high = ratio["by round, quartiles"]
        lines.append(f"| {name} | {ratio['of medians']} | {ratio['by round, median']} ({low} to {high}) |")
    return "\n".join(lines)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", help="model folder; default: the embedded backbone")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args


if __name__ == "__main__":
    main()
