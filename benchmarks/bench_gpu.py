"""On a GPU: how near is one row's decode step to the memory's limit, and how much faster are 64 rows than transformers?

The physics: a step of one row reads every weight once, so it takes at least weights ÷ bandwidth; what is above that is
the launching of kernels, attention and the host. The smaller the model, the more of it: the embedded backbone's 270 MB
take a tenth of a millisecond on a large GPU, less than the few hundred kernels of its step. Measure with a `--backbone`
of some billion weights.

The peer is transformers' continuous batching: the same weights, dtype, requests and tokens a step, without soft prompts
on either side. It runs on a CPU too, in small, which shows that the comparison works and nothing else.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.continuous_peer import ContinuousBatching
from benchmarks.decode_timer import DecodeTimer
from benchmarks.machine import describe_machine, report
from benchmarks.roofline import count_work, measure_machine
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
    speed_table,
    timed,
)
from server.bench.offline import OfflineEngine
from server.bench.workload import Workload, make_workload
from server.engine.backbone import Backbone
from server.engine.checkpoint import DTYPES
from server.engine.config import EngineConfig
from server.engine.own_thread import run_in_own_thread

MUX = "promptmux"
APART = "promptmux, steps not overlapped"
PEER = "transformers continuous batching"
OVERLAPS = {MUX: True, APART: False}

UNCOUNTED = 1_000_000
"""Rounds from this number on are not timed."""


def main() -> None:
    args = _parse()
    if args.device == "cuda" and not torch.cuda.is_available():
        print(
            "no CUDA device: there is nothing to measure. `--device cpu --quick` shows that the comparison with "
            "transformers runs.",
            file=sys.stderr,
        )
        return
    machine = describe_machine()
    backbone = load_backbone(args, device=args.device)
    ratios = _single_row(args, backbone) if backbone.device.type == "cuda" else {}
    seconds, num_tokens = _against_transformers(args, backbone)
    ratios[f"{args.requests} rows: ÷ {PEER}"] = ratio(seconds[PEER], seconds[MUX], goal="≥ 3")
    ratios[f"{args.requests} rows: overlapped ÷ not"] = ratio(seconds[APART], seconds[MUX])
    report(
        "gpu",
        args,
        machine,
        dtype=backbone.dtype_name,
        table=[*speed_table(seconds, dict.fromkeys(seconds, num_tokens)), "", *ratio_table(ratios)],
        result={"device": str(backbone.device), "seconds": rounded(seconds), "ratios": plain(ratios)},
    )


def _config(
    args: argparse.Namespace, backbone: Backbone, *, num_rows: int, columns: int, overlaps: bool
) -> EngineConfig:
    """Only one engine at a time lives on a backbone: the graphs of decode steps are those of the last one made."""
    return EngineConfig(
        max_rows=num_rows,
        max_step_tokens=args.max_step_tokens,
        kv_cache_bytes=max(columns, backbone.max_model_len) * backbone.bytes_per_token,
        audit_share=0.0,
        overlaps=overlaps,
        compiles=False,
    )


def _single_row(args: argparse.Namespace, backbone: Backbone) -> dict[str, Ratio]:
    """A decode step of one row without a prompt, beside the reading of all weights, measured in the same rounds."""
    weight_bytes = count_work(backbone_folder(args), backbone.dtype).weight_bytes
    embeddings = embeddings_of(backbone)
    measure = partial(measure_machine, backbone.device, backbone.dtype, quick=args.quick)
    limits_s: list[float] = []
    steps_s: dict[str, list[float]] = {name: [] for name in OVERLAPS}
    for _ in range(args.rounds):
        limits_s.append(weight_bytes / run_in_own_thread(measure).read_bytes_per_s)
        for name, overlaps in OVERLAPS.items():
            config = _config(args, backbone, num_rows=1, columns=0, overlaps=overlaps)
            with DecodeTimer(backbone, config, embeddings, k=0, seed=args.seed) as timer:
                timer.measure(1, num_steps=args.steps)
                steps_s[name].append(timer.measure(1, num_steps=args.steps).step_s)
    return {
        f"1 row, {name}: weights ÷ bandwidth ÷ step": ratio(limits_s, times, goal="≥ 0.8" if name == MUX else "")
        for name, times in steps_s.items()
    }


def _against_transformers(args: argparse.Namespace, backbone: Backbone) -> tuple[Seconds, int]:
    load = make_workload(
        embeddings_of(backbone),
        num_requests=args.requests,
        num_prompts=0,
        k=1,
        new_tokens="fixed",
        seed=args.seed,
    )
    # Room for every row twice over, on both sides: neither is to wait for memory, nor to take all of it.
    columns = 2 * sum(len(request.token_ids) + request.num_new_tokens + 32 for request in load.requests)
    dtype = DTYPES[backbone.dtype_name]
    peer = ContinuousBatching(backbone_folder(args), dtype, backbone.device, load, max_step_tokens=args.max_step_tokens)

    def answers_of(name: str, work: Callable[[Workload], list[list[int]]], number: int) -> float:
        """Seconds for the round's requests, after a round that nobody counts."""
        work(refresh(load, backbone.vocab_size, seed=args.seed, number=UNCOUNTED + number))
        fresh = refresh(load, backbone.vocab_size, seed=args.seed, number=number)
        answers: list[list[int]] = []
        seconds = timed(lambda: answers.extend(work(fresh)))
        if [len(tokens) for tokens in answers] != [request.num_new_tokens for request in load.requests]:
            raise RuntimeError(f"{name} gave other numbers of tokens than were asked for")
        return seconds

    def run_ours(name: str, number: int) -> float:
        config = _config(args, backbone, num_rows=args.requests, columns=columns, overlaps=OVERLAPS[name])
        with OfflineEngine(backbone, config) as engine:
            return answers_of(name, engine.run, number)

    with peer:
        systems = {name: partial(run_ours, name) for name in OVERLAPS} | {PEER: partial(answers_of, PEER, peer.run)}
        return interleave(systems, args.rounds), load.num_new_tokens


def _parse() -> argparse.Namespace:
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--max-step-tokens", type=int, default=EngineConfig().max_step_tokens)
    parser.add_argument("--steps", type=int, default=128, help="decode steps of one row whose median is taken")
    args = parse(parser)
    if args.quick:
        args.requests, args.steps = 8, 8
    return args


if __name__ == "__main__":
    main()
