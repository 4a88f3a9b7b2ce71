"""Does the first token come later with a longer prompt: k=100 beside k=20 and none, the batch idle?

One request at a time with one new token, from its submission to its token's arrival in the caller's thread; prompts
compiled before. The lengths alternate, with other client tokens every round, so that nothing is found in a cache of
text prefixes. The physics: the same pass over the client's tokens, whose attention reads k more columns.
"""

import argparse
import statistics
from functools import partial

import numpy as np

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
    rounded,
    settle,
    timed,
)
from server.bench.offline import OfflineEngine
from server.bench.workload import BenchRequest, Workload, make_workload
from server.engine.config import EngineConfig

GOALS = {100: "≤ 1.05"}


def main() -> None:
    args = _parse()
    machine = describe_machine()
    backbone = load_backbone(args)
    embeddings = embeddings_of(backbone)
    prompts = {
        k: make_workload(
            embeddings, num_requests=1, num_prompts=min(k, 1), k=max(k, 1), new_tokens="fixed", seed=args.seed
        ).prompts
        for k in (0, *args.k)
    }
    names = {k: f"k={k}" if k else "no prompt" for k in prompts}
    with OfflineEngine(backbone, EngineConfig()) as engine:

        def run(k: int, number: int) -> float:
            token_ids = _client_tokens(args.tokens, backbone.vocab_size, seed=args.seed, number=number)
            load = Workload(prompts[k], [BenchRequest(0 if k else None, token_ids, 1)])
            return timed(lambda: engine.run(load))

        for k in prompts:
            settle(backbone, partial(run, k))
        seconds = interleave({names[k]: partial(run, k) for k in prompts}, args.rounds, show=False)
    ratios = {
        f"first token, {names[k]} ÷ no prompt": ratio(seconds[names[k]], seconds[names[0]], goal=GOALS.get(k, ""))
        for k in args.k
    }
    lines = ["| prompt | first token, ms: median | quartiles |", "|---|---:|---|"]
    for name, times in seconds.items():
        low, middle, high = statistics.quantiles([1000 * s for s in times], n=4, method="inclusive")
        lines.append(f"| {name} | {middle:.2f} | {low:.2f} to {high:.2f} |")
    report(
        "first-token",
        args,
        machine,
        dtype=backbone.dtype_name,
        table=[*lines, "", *ratio_table(ratios)],
        result={"client_tokens": args.tokens, "seconds": rounded(seconds), "ratios": plain(ratios)},
    )


def _client_tokens(num_tokens: int, vocab_size: int, *, seed: int, number: int) -> tuple[int, ...]:
    rng = np.random.default_rng((seed, number))
    return tuple(rng.integers(3, vocab_size, num_tokens).tolist())


def _parse() -> argparse.Namespace:
    parser = make_parser(__doc__, rounds=200)
    parser.add_argument("--tokens", type=int, default=32, help="client tokens of a request")
    parser.add_argument("--k", type=int, nargs="+", default=[20, 100])
    args = parse(parser)
    if args.quick:
        args.rounds = 20
    return args


if __name__ == "__main__":
    main()
