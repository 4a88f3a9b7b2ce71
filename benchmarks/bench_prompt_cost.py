"""What does a soft prompt cost: 64 rows with 64 prompts of k=20 and of k=100, with one prompt, and with none?

All run in turn, many rounds, on one engine; ratios are taken round by round. The physics: a compiled prompt costs
attention over k more columns; which prompts they are, and how many, costs nothing but the reading of k columns a
prompt that would otherwise be shared.
"""

import argparse
from functools import partial

from benchmarks.machine import describe_machine, report
from benchmarks.rounds import (
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
from server.engine.config import EngineConfig

NONE = "no prompt"
GOALS = {20: "≥ 0.97", 100: "≥ 0.93"}


def main() -> None:
    args = _parse()
    machine = describe_machine()
    backbone = load_backbone(args)
    embeddings = embeddings_of(backbone)

    def workload(num_prompts: int, k: int) -> Workload:
        return make_workload(
            embeddings,
            num_requests=args.requests,
            num_prompts=num_prompts,
            k=k,
            new_tokens="fixed",
            seed=args.seed,
        )

    one = f"one prompt, k={args.k[0]}"
    many = {k: f"{args.requests} prompts, k={k}" for k in args.k}
    loads = {
        NONE: workload(0, 1),
        one: workload(1, args.k[0]),
        **{name: workload(args.requests, k) for k, name in many.items()},
    }
    with OfflineEngine(backbone, EngineConfig(prefix_cache_bytes=4 << 30)) as engine:

        def run(name: str, number: int) -> float:
            load = refresh(loads[name], backbone.vocab_size, seed=args.seed, number=number)
            return timed(lambda: engine.run(load))

        for name in loads:
            run(name, args.rounds)
        settle(backbone, partial(run, NONE))
        seconds = interleave({name: partial(run, name) for name in loads}, args.rounds)
    ratios = {
        f"{name} ÷ {NONE}": ratio(seconds[NONE], seconds[name], goal=GOALS.get(k, "")) for k, name in many.items()
    }
    ratios[f"{many[args.k[0]]} ÷ one prompt"] = ratio(seconds[one], seconds[many[args.k[0]]])
    num_tokens = {name: load.num_new_tokens for name, load in loads.items()}
    table = [*speed_table(seconds, num_tokens), "", *ratio_table(ratios)]
    report(
        "prompt-cost",
        args,
        machine,
        dtype=backbone.dtype_name,
        table=table,
        result={"seconds": rounded(seconds), "num_new_tokens": num_tokens, "ratios": plain(ratios)},
    )


def _parse() -> argparse.Namespace:
    parser = make_parser(__doc__, rounds=9)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--k", type=int, nargs="+", default=[20, 100])
    args = parse(parser)
    if args.quick:
        args.requests = 8
    return args


if __name__ == "__main__":
    main()
