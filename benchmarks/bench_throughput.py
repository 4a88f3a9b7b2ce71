"""How fast are 64 requests over 64 soft prompts, beside what a user would write without promptmux?

All systems run the same backbone in the same dtype with the same threads on the same requests, in turn; medians are
compared, and the ratios round by round. New tokens a second count only tokens that were asked for: a static batch works
on until its longest row is done, and the rest is waste. The physics: a decode step reads all weights once, whatever the
number of rows, so a batch of 64 costs little more than one row until the products themselves become the limit.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial

from benchmarks.machine import describe_machine, report
from benchmarks.peers import PeftOneAtATime, StaticBatch, load_stock_model
from benchmarks.rounds import (
    Ratio,
    Seconds,
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
from server.bench.offline import OfflineEngine
from server.bench.workload import Workload, make_workload
from server.engine.checkpoint import DTYPES
from server.engine.config import EngineConfig
from server.engine.own_thread import run_in_own_thread

PEFT = "PEFT one at a time"
MUX = "promptmux"
COLD = "promptmux, prompts not yet compiled"
STATIC = "static batch of "
SORTED = ", sorted by new tokens"

System = Callable[[Workload], list[list[int]]]


def main() -> None:
    args = _parse()
    machine = describe_machine()
    folder = backbone_folder(args)
    backbone = load_backbone(args)
    embeddings = embeddings_of(backbone)
    loads = {
        lengths: make_workload(
            embeddings,
            num_requests=args.requests,
            num_prompts=args.requests,
            k=args.k,
            new_tokens=lengths,
            seed=args.seed,
        )
        for lengths in ("fixed", "lognormal")
    }
    dtype = DTYPES[backbone.dtype_name]
    model = run_in_own_thread(partial(load_stock_model, folder, dtype))
    peft = run_in_own_thread(partial(PeftOneAtATime, folder, dtype, loads["fixed"]))
    config = EngineConfig(max_rows=args.max_rows, max_step_tokens=args.max_step_tokens, audit_share=args.audit_share)
    with OfflineEngine(backbone, config) as engine:

        def cold(load: Workload) -> list[list[int]]:
            engine.forget_prefixes()
            return engine.run(load)

        systems: dict[tuple[str, str], System] = {
            ("fixed", PEFT): peft.run,
            ("fixed", COLD): cold,
            ("fixed", MUX): engine.run,
            ("lognormal", MUX): engine.run,
        }
        for size in args.static:
            for lengths, load in loads.items():
                systems[lengths, f"{STATIC}{size}"] = StaticBatch(model, load, size).run
            bound = StaticBatch(model, loads["lognormal"], size, sort_by_new_tokens=True)
            systems["lognormal", f"{STATIC}{size}{SORTED}"] = bound.run
        answers: dict[tuple[str, str], list[list[int]]] = {}

        def run(system: tuple[str, str], number: int) -> float:
            load = refresh(loads[system[0]], backbone.vocab_size, seed=args.seed, number=number)

            def answer() -> None:
                # A peer that ran on this thread would leave a team of threads beside the engine's (decision 11).
                answers[system] = run_in_own_thread(partial(systems[system], load))

            return timed(answer)

        for (lengths, _), system in systems.items():
            run_in_own_thread(partial(system, Workload(loads[lengths].prompts, loads[lengths].requests[:8])))
        for lengths in loads:
            settle(backbone, partial(run, (lengths, MUX)))
        seconds = interleave({f"{system[0]}: {system[1]}": partial(run, system) for system in systems}, args.rounds)
    num_tokens = {name: loads[name.partition(":")[0]].num_new_tokens for name in seconds}
    ours, theirs = answers["fixed", MUX], answers["fixed", PEFT]
    same = f"{sum(a == b for a, b in zip(ours, theirs, strict=True))} of {len(ours)} whole sequences"
    ratios = _ratios(seconds)
    table = [*speed_table(seconds, num_tokens), "", *ratio_table(ratios), "", f"Greedy output equal to PEFT's: {same}."]
    report(
        "throughput",
        args,
        machine,
        dtype=backbone.dtype_name,
        table=table,
        result={
            "seconds": rounded(seconds),
            "num_new_tokens": num_tokens,
            "same_as_peft": same,
            "ratios": plain(ratios),
        },
    )


def _ratios(seconds: Seconds) -> dict[str, Ratio]:
    def best(lengths: str, *, is_sorted: bool) -> str:
        names = [n for n in seconds if n.startswith(f"{lengths}: {STATIC}") and n.endswith(SORTED) == is_sorted]
        return min(names, key=lambda name: statistics.median(seconds[name]))

    mux = seconds[f"fixed: {MUX}"]
    ratios = {
        f"fixed: ÷ {PEFT}": ratio(seconds[f"fixed: {PEFT}"], mux, goal="≥ 20"),
        f"fixed: not yet compiled ÷ {PEFT}": ratio(seconds[f"fixed: {PEFT}"], seconds[f"fixed: {COLD}"]),
    }
    for lengths, is_sorted, goal in (("fixed", False, "≥ 1.5"), ("lognormal", False, "≥ 2.5"), ("lognormal", True, "")):
        name = best(lengths, is_sorted=is_sorted)
        label = f"{lengths}: ÷ best static batch{' that knows all lengths' if is_sorted else ''}"
        ratios[f"{label} ({name.partition(STATIC)[2].removesuffix(SORTED)} rows)"] = ratio(
            seconds[name], seconds[f"{lengths}: {MUX}"], goal=goal
        )
    return ratios


def _parse() -> argparse.Namespace:
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--static", type=int, nargs="+", default=[8, 16, 32, 64], help="rows of the static batches")
    parser.add_argument("--max-rows", type=int, default=EngineConfig().max_rows)
    parser.add_argument("--max-step-tokens", type=int, default=EngineConfig().max_step_tokens)
    parser.add_argument("--audit-share", type=float, default=EngineConfig().audit_share)
    args = parse(parser)
    if args.quick:
        args.requests, args.static = 8, [8]
    return args


if __name__ == "__main__":
    main()
