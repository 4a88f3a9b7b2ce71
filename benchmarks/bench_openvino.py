"""How fast is the engine beside OpenVINO GenAI's continuous batching, which serves no soft prompts?

Both have the same weights bit by bit (written to an unquantised GGUF file), dtype, threads, rows a batch, tokens a step
and requests, and answer in alternating rounds; the peer runs in a process of its own and sleeps while we are timed. The
peer reads the bare requests; promptmux reads them bare, and with 64 prompts of k=20. Before the clock starts, both
answer a few requests in fp32: equal greedy tokens show that it is one model.

The peer's interpreter: `python -m venv DIR && DIR/bin/pip install openvino-genai`, then `--openvino-python
DIR/bin/python`. Without it the question cannot be asked, and the benchmark says so and ends well.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.gguf_export import write_gguf
from benchmarks.machine import describe_machine, report
from benchmarks.openvino_peer import PRECISIONS, OpenVinoPeer, PeerRun
from benchmarks.rounds import (
    Ratio,
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
from server.engine.config import EngineConfig

LENGTHS = ("fixed", "lognormal")
NUM_COMPARED = 8
MIN_EQUAL = 6


class NotTheSameModelError(RuntimeError):
    """In fp32 the peer's greedy tokens are not ours: whatever was timed would compare two models."""


def main() -> None:
    args = _parse()
    machine = describe_machine()
    if args.openvino_python is None:
        print(json.dumps({"benchmark": "openvino", "skipped": "no --openvino-python (or $OPENVINO_PYTHON)"}))
        return
    folder = backbone_folder(args)
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "backbone.gguf"
        write_gguf(Path(folder), model)
        equal = _compare_tokens(args, folder, model)
        _measure(args, machine, folder, model, equal)


def _compare_tokens(args: argparse.Namespace, folder: str, model: Path) -> str:
    """How many of a few fp32 answers are equal. Raises NotTheSameModelError when they are too few to be near-ties."""
    backbone = load_backbone(args, dtype="float32", device="cpu")
    load = make_workload(
        embeddings_of(backbone), num_requests=NUM_COMPARED, num_prompts=0, k=1, new_tokens="fixed", seed=args.seed
    )
    with OfflineEngine(backbone, EngineConfig()) as engine:
        ours = engine.run(load)
    with _peer(args, model, "float32", "f32") as peer:
        theirs = _run(peer, load).tokens
    equal = sum(a == b for a, b in zip(ours, theirs, strict=True))
    if equal < MIN_EQUAL:
        raise NotTheSameModelError(f"in fp32 only {equal} of {NUM_COMPARED} answers of the peer are ours")
    return f"{equal} of {NUM_COMPARED}"


def _measure(args: argparse.Namespace, machine: dict[str, object], folder: str, model: Path, equal: str) -> None:
    backbone = load_backbone(args, device="cpu")
    embeddings = embeddings_of(backbone)
    dtype = backbone.dtype_name
    loads = {
        (prompts, lengths): make_workload(
            embeddings, num_requests=args.requests, num_prompts=prompts, k=args.k, new_tokens=lengths, seed=args.seed
        )
        for lengths in LENGTHS
        for prompts in (0, args.requests)
    }
    config = EngineConfig(max_rows=args.max_rows, max_step_tokens=args.max_step_tokens)
    same, compressed = PRECISIONS[dtype], "u8"
    peer_cpu_s: list[float] = []
    with (
        OfflineEngine(backbone, config) as engine,
        _peer(args, model, dtype, same) as peer,
        _peer(args, model, dtype, compressed) as peer_u8,
    ):
        peers = {
            f"OpenVINO GenAI, {same} keys and values": peer,
            f"OpenVINO GenAI, {compressed} (its default)": peer_u8,
        }

        def fresh(prompts: int, lengths: str, number: int) -> Workload:
            return refresh(loads[prompts, lengths], backbone.vocab_size, seed=args.seed, number=number)

        def run_ours(prompts: int, lengths: str, number: int) -> float:
            load = fresh(prompts, lengths, number)
            before_s = sum(p.cpu_s() for p in peers.values())
            seconds = timed(lambda: engine.run(load))
            peer_cpu_s.append(sum(p.cpu_s() for p in peers.values()) - before_s)
            return seconds

        def run_peer(which: OpenVinoPeer, lengths: str, number: int) -> float:
            return _run(which, fresh(0, lengths, number)).seconds

        systems: dict[str, Callable[[int], float]] = {}
        for lengths in LENGTHS:
            for prompts, name in ((0, "promptmux, no prompt"), (args.requests, f"promptmux, {args.requests} prompts")):
                systems[f"{lengths}: {name}"] = partial(run_ours, prompts, lengths)
            for name, which in peers.items():
                systems[f"{lengths}: {name}"] = partial(run_peer, which, lengths)
        for run in systems.values():
            run(args.rounds)
        for lengths in LENGTHS:
            settle(backbone, partial(run_ours, args.requests, lengths))
        peer_cpu_s.clear()
        seconds = interleave(systems, args.rounds)
        about = peer.about
    num_tokens = {name: loads[0, name.partition(":")[0]].num_new_tokens for name in seconds}
    ratios: dict[str, Ratio] = {}
    for lengths in LENGTHS:
        for ours in ("no prompt", f"{args.requests} prompts"):
            for theirs in peers:
                goal = "≥ 1.0" if lengths == "fixed" and theirs == next(iter(peers)) else ""
                name = f"{lengths}: promptmux, {ours} ÷ {theirs}"
                ratios[name] = ratio(
                    seconds[f"{lengths}: {theirs}"], seconds[f"{lengths}: promptmux, {ours}"], goal=goal
                )
    disturbance = statistics.median(peer_cpu_s)
    table = [
        *speed_table(seconds, num_tokens),
        "",
        *ratio_table(ratios),
        "",
        f"The peer: openvino {about['openvino']}, openvino_genai {about['openvino_genai']}, {about['precision']}, "
        f"{about['threads']} threads, {about['max_rows']} rows, {about['max_step_tokens']} tokens a step. In fp32 "
        f"{equal} greedy answers equal ours. CPU seconds of the sleeping peers in one of our turns: {disturbance:.2f}.",
    ]
    result = {
        "seconds": rounded(seconds),
        "num_new_tokens": num_tokens,
        "ratios": plain(ratios),
        "same_as_peer_in_fp32": equal,
        "peer": about,
        "peer_cpu_s_in_our_turns": [round(s, 2) for s in peer_cpu_s],
    }
    report("openvino", args, machine, dtype=dtype, table=table, result=result)


def _peer(args: argparse.Namespace, model: Path, dtype: str, kv_precision: str) -> OpenVinoPeer:
    return OpenVinoPeer(
        args.openvino_python,
        model,
        dtype=dtype,
        kv_precision=kv_precision,
        threads=args.threads,
        max_rows=args.max_rows,
        max_step_tokens=args.max_step_tokens,
    )


def _run(peer: OpenVinoPeer, load: Workload) -> PeerRun:
    return peer.run([r.token_ids for r in load.requests], [r.num_new_tokens for r in load.requests])


def _parse() -> argparse.Namespace:
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument(
        "--openvino-python",
        default=os.environ.get("OPENVINO_PYTHON"),
        help="interpreter that has openvino-genai; default: $OPENVINO_PYTHON",
    )
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--max-rows", type=int, default=EngineConfig().max_rows)
    parser.add_argument("--max-step-tokens", type=int, default=EngineConfig().max_step_tokens)
    args = parse(parser)
    if args.quick:
        args.requests = 8
    return args


if __name__ == "__main__":
    main()
