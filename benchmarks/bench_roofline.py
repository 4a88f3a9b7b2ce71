"""How near is a decode step to what the machine can do, at 1, 8, 16, 32 and 64 rows?

In every round the machine's read bandwidth and its peak of products are measured anew, with the same threads, and then
a step at each number of rows: the median time between two deliveries of tokens while all rows decode, which holds
everything a step costs (scheduling, plan, isolation check, forward, sampling, delivery), and the engine's own times of
these parts. The limit is the greater of weights ÷ bandwidth and products ÷ peak; a second column adds the reading of
the rows' keys and values, which the goal leaves out.
"""

import argparse
import statistics
from functools import partial
from typing import Any

from benchmarks.decode_timer import DecodeTimer, StepTimes
from benchmarks.machine import describe_machine, report
from benchmarks.roofline import Machine, Work, count_work, measure_machine
from benchmarks.rounds import (
    Ratio,
    backbone_folder,
    embeddings_of,
    load_backbone,
    make_parser,
    parse,
    plain,
    ratio,
    ratio_table,
    settle,
)
from server.engine.checkpoint import DTYPES
from server.engine.config import EngineConfig
from server.engine.own_thread import run_in_own_thread

GOALS = {1: "≥ 0.65", 32: "≥ 0.5"}


def main() -> None:
    args = _parse()
    machine = describe_machine()
    folder = backbone_folder(args)
    backbone = load_backbone(args)
    dtype = DTYPES[backbone.dtype_name]
    work = count_work(folder, dtype)
    embeddings = embeddings_of(backbone)
    limits: list[Machine] = []
    steps: dict[int, list[StepTimes]] = {rows: [] for rows in args.rows}
    config = EngineConfig(max_rows=max(args.rows), audit_share=0.0)
    with DecodeTimer(backbone, config, embeddings, k=args.k, seed=args.seed) as timer:

        def warm_up(_: int) -> None:
            for rows in args.rows:
                timer.measure(rows, num_steps=args.steps)

        settle(backbone, warm_up, runs=1)
        for _ in range(args.rounds):
            limits.append(run_in_own_thread(partial(measure_machine, backbone.device, dtype, quick=args.quick)))
            for rows in args.rows:
                steps[rows].append(timer.measure(rows, num_steps=args.steps))
    ratios: dict[str, Ratio] = {}
    for rows, times in steps.items():
        measured_s = [t.step_s for t in times]
        weights_s = [work.limit_s(limit, rows) for limit in limits]
        ratios[f"{rows} rows: roofline ÷ step"] = ratio(weights_s, measured_s, goal=GOALS.get(rows, ""))
        with_kv_s = [
            work.limit_s(limit, rows, int(rows * t.mean_columns * backbone.bytes_per_token))
            for limit, t in zip(limits, times, strict=True)
        ]
        ratios[f"{rows} rows: roofline with keys and values ÷ step"] = ratio(with_kv_s, measured_s)
    report(
        "roofline",
        args,
        machine,
        dtype=backbone.dtype_name,
        table=[*_table(work, limits, steps), "", *ratio_table(ratios)],
        result=_result(work, limits, steps) | {"ratios": plain(ratios)},
    )


def _table(work: Work, limits: list[Machine], steps: dict[int, list[StepTimes]]) -> list[str]:
    bandwidth = statistics.median(limit.read_bytes_per_s for limit in limits)
    peak = statistics.median(limit.flops_per_s for limit in limits)
    lines = [
        f"Weights {work.weight_bytes / 1e6:.0f} MB, {work.flops_per_row / 1e9:.3f} GFLOP a row; read bandwidth "
        f"{bandwidth / 1e9:.1f} GB/s, products {peak / 1e9:.0f} GFLOP/s (medians of the rounds).",
        "",
        "| rows | tokens/s | step, ms | limit, ms | plan | forward | sample | deliver | rest |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for rows, times in steps.items():
        step_s = statistics.median(t.step_s for t in times)
        limit_s = statistics.median(work.limit_s(limit, rows) for limit in limits)
        parts = {name: statistics.median(t.parts_s[name] for t in times) for name in times[0].parts_s}
        # Parts are means, so what is left is taken from the mean step.
        rest_s = statistics.median(t.mean_step_s - sum(t.parts_s.values()) for t in times)
        cells = [step_s, limit_s, *parts.values(), rest_s]
        lines.append(f"| {rows} | {rows / step_s:.0f} | " + " | ".join(f"{1000 * s:.2f}" for s in cells) + " |")
    return lines


def _result(work: Work, limits: list[Machine], steps: dict[int, list[StepTimes]]) -> dict[str, Any]:
    return {
        "weight_bytes": work.weight_bytes,
        "flops_per_row": work.flops_per_row,
        "read_gb_per_s": [round(limit.read_bytes_per_s / 1e9, 2) for limit in limits],
        "gflop_per_s": [round(limit.flops_per_s / 1e9, 1) for limit in limits],
        "step_ms": {rows: [round(1000 * t.step_s, 3) for t in times] for rows, times in steps.items()},
        "parts_ms": {
            rows: [{name: round(1000 * s, 3) for name, s in t.parts_s.items()} for t in times]
            for rows, times in steps.items()
        },
    }


def _parse() -> argparse.Namespace:
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16, 32, 64])
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--steps", type=int, default=48, help="decode steps whose median is taken")
    args = parse(parser)
    if args.quick:
        args.rows, args.steps = args.rows[:2], 8
    return args


if __name__ == "__main__":
    main()
