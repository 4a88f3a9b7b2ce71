"""Are 1,000 requests over 1,000 distinct prompts as fast as over one prompt?

Every request is answered, in both cases, on one engine, in alternating rounds, the prefixes of all prompts resident.
Apart from that, the same with none of them compiled. The physics: rows gather their prefixes by index, so that distinct
ones cost the reading of k columns a row, which a shared one costs too unless it stays in a cache of the CPU or GPU; a
cold prompt costs one pass over its k vectors.
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

ONE = "one prompt"


class PromptsNotResidentError(RuntimeError):
    """Prefixes made room for others during the rounds: what was timed was not warm."""


def main() -> None:
    args = _parse()
    machine = describe_machine()
    backbone = load_backbone(args)
    embeddings = embeddings_of(backbone)

    def workload(num_prompts: int) -> Workload:
        return make_workload(
            embeddings,
            num_requests=args.requests,
            num_prompts=num_prompts,
            k=args.k,
            new_tokens="fixed",
            seed=args.seed,
        )

    many = f"{args.prompts:,} prompts"
    cold = f"{many}, none compiled"
    loads = {many: workload(args.prompts), ONE: workload(1)}
    config = EngineConfig(
        prefix_cache_bytes=int(args.prefix_cache_gib * (1 << 30)),
        # All are submitted at once.
        max_waiting_rows=max(args.requests, EngineConfig().max_waiting_rows),
    )
    with OfflineEngine(backbone, config) as engine:

        def run(name: str, number: int) -> float:
            load = refresh(loads[name], backbone.vocab_size, seed=args.seed, number=number)
            return timed(lambda: engine.run(load))

        for name in loads:
            run(name, args.rounds)
        settle(backbone, partial(run, ONE), runs=1)
        evicted = _num_evicted(engine)
        seconds = interleave({name: partial(run, name) for name in loads}, args.rounds)
        if _num_evicted(engine) != evicted:
            raise PromptsNotResidentError(
                f"{args.prompts} prefixes of k={args.k} do not fit on the device: raise --prefix-cache-gib"
            )
        if args.cold_rounds:

            def run_cold(number: int) -> float:
                engine.forget_prefixes()
                return run(many, args.rounds + 1 + number)

            seconds |= interleave({cold: run_cold}, args.cold_rounds)
    ratios = {f"{many} ÷ {ONE}": ratio(seconds[ONE], seconds[many], goal="≥ 0.98")}
    num_tokens = dict.fromkeys(seconds, loads[ONE].num_new_tokens)
    table = [*speed_table(seconds, num_tokens), "", *ratio_table(ratios)]
    report(
        "many-prompts",
        args,
        machine,
        dtype=backbone.dtype_name,
        table=table,
        result={"seconds": rounded(seconds), "num_new_tokens": num_tokens, "ratios": plain(ratios)},
    )


def _num_evicted(engine: OfflineEngine) -> float:
    """Prefixes that have made room for others on the device since the engine began."""
    name = "promptmux_prompt_cache_evictions_total"
    return engine.metrics.registry.get_sample_value(name, {"tier": "device"}) or 0.0


def _parse() -> argparse.Namespace:
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--cold-rounds", type=int, default=1)
    parser.add_argument("--prefix-cache-gib", type=float, default=4.0, help="memory for prefixes on the device")
    args = parse(parser)
    if args.quick:
        args.requests = args.prompts = 16
    if not 1 <= args.prompts <= args.requests:
        parser.error(f"--prompts is {args.prompts}; it must be 1 to --requests ({args.requests})")
    return args


if __name__ == "__main__":
    main()
