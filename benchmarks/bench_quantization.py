"""What does int8 weight-only quantization (`--quantization int8`) gain in speed, and what does it cost in quality?

Speed: a decode step (`benchmarks.decode_timer`) at 1 to 64 rows, int8 ÷ not quantised. Quality: the perplexity of plain
English, which is the project's own prose (docs/), in windows of 512 tokens, by the prompt log-probabilities that
the engine reports. Each measurement is a process of its own, because two engines in one process would slow each other
down (docs/decisions/0011); they alternate.
"""

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.decode_timer import DecodeTimer
from benchmarks.machine import describe_machine, report
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
from prompt_store.manifest import SoftPrompt
from server.engine.backbone import Backbone
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.request import PromptRef, RowOutput, RowRequest, SamplingParams
from server.metrics import Metrics

SIDES = ("none", "int8")
WINDOW = 512
PROSE = Path(__file__).parents[1] / "docs"


def main() -> None:
    args = _parse()
    if args.measure is not None:
        print(json.dumps(_measure(args)))
        return
    machine = describe_machine()
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for number in range(args.rounds):
        for side in SIDES if number % 2 == 0 else reversed(SIDES):
            runs[side].append(_run(args, side))
            print(f"{number + 1}/{args.rounds} {side:5} {runs[side][-1]}", file=sys.stderr, flush=True)
    # JSON has made strings of the numbers of rows.
    step_ms = {side: {rows: [run["step_ms"][str(rows)] for run in runs[side]] for rows in args.rows} for side in SIDES}
    plain_ms, int8_ms = step_ms.values()
    ratios: dict[str, Ratio] = {
        f"{rows} rows: speed, int8 ÷ not quantised": ratio(plain_ms[rows], int8_ms[rows]) for rows in args.rows
    }
    # The same text and the same weights: every run of a side gives the same number.
    perplexity = {side: statistics.median(run["perplexity"] for run in runs[side]) for side in SIDES}
    num_tokens = runs[SIDES[0]][0]["num_tokens"]
    table = [
        *ratio_table(ratios),
        "",
        f"Perplexity of {num_tokens:,} tokens of English: {perplexity['none']:.3f}, with int8 {perplexity['int8']:.3f} "
        f"({100 * (perplexity['int8'] / perplexity['none'] - 1):+.2f}%).",
    ]
    result = {"step_ms": step_ms, "perplexity": perplexity, "num_tokens": num_tokens, "ratios": plain(ratios)}
    report("quantization", args, machine, dtype=runs[SIDES[0]][0]["dtype"], table=table, result=result)


def _run(args: argparse.Namespace, side: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.bench_quantization", "--measure", side, "--dtype", args.dtype]
    command += ["--threads", str(args.threads), "--backbone", backbone_folder(args), "--seed", str(args.seed)]
    command += ["--windows", str(args.windows), "--rows", *map(str, args.rows), "--steps", str(args.steps)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    """One side, in this process."""
    backbone = load_backbone(args, quantization=args.measure)
    embeddings = embeddings_of(backbone)
    config = EngineConfig(max_rows=max(args.rows), audit_share=0.0)
    step_ms: dict[int, float] = {}
    windows = _windows(backbone, args.windows)
    with DecodeTimer(backbone, config, embeddings, k=20, seed=args.seed) as timer:

        def warm_up(_: int) -> None:
            for rows in args.rows:
                timer.measure(rows, num_steps=args.steps)

        settle(backbone, warm_up, runs=1)
        for rows in args.rows:
            step_ms[rows] = round(1000 * timer.measure(rows, num_steps=args.steps).step_s, 3)
    perplexity = _perplexity(backbone, windows)
    return {
        "dtype": backbone.dtype_name,
        "step_ms": step_ms,
        "perplexity": round(perplexity, 4),
        "num_tokens": sum(len(window) - 1 for window in windows),
    }


def _windows(backbone: Backbone, num_windows: int) -> list[tuple[int, ...]]:
    """The first `num_windows` windows of the prose: no code, tables or headings."""
    pages = [path.read_text() for path in sorted(PROSE.rglob("*.md"))]
    texts = [re.sub(r"```.*?```", "", page, flags=re.DOTALL) for page in pages]
    prose = "\n".join(line for text in texts for line in text.splitlines() if line and line[0] not in "#|<")
    token_ids = backbone.tokenizer(prose, add_special_tokens=False, verbose=False)["input_ids"]
    windows = [tuple(token_ids[i : i + WINDOW]) for i in range(0, len(token_ids) - WINDOW + 1, WINDOW)]
    return windows[:num_windows]


def _perplexity(backbone: Backbone, windows: Sequence[tuple[int, ...]]) -> float:
    """exp of the mean negative log-likelihood of each window's tokens but its first. Raises what a row ended with."""
    ended = threading.Semaphore(0)
    outputs: list[RowOutput] = []

    def deliver(news: Sequence[RowOutput]) -> None:
        outputs.extend(news)
        for _ in (output for output in news if output.is_last):
            ended.release()

    engine = Engine(backbone, EngineConfig(audit_share=0.0), Metrics(), _no_prompt)
    engine.start(deliver)
    try:
        sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        engine.submit(
            [
                RowRequest(row_id=f"window{i}", tenant="bench", token_ids=ids, prompt=None, sampling=sampling)
                for i, ids in enumerate(windows)
            ]
        )
        for _ in windows:
            ended.acquire()
    finally:
        engine.stop(timeout_s=30)
    for output in outputs:
        if output.error is not None:
            raise output.error
    entries = [entry for output in outputs for entry in output.prompt_logprobs or () if entry is not None]
    return math.exp(-statistics.fmean(entry.logprob for entry in entries))


def _no_prompt(ref: PromptRef) -> SoftPrompt:
    raise LookupError(f"no row has a prompt, least of all {ref.task}")


def _parse() -> argparse.Namespace:
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16, 32, 64])
    parser.add_argument("--steps", type=int, default=48, help="decode steps whose median is taken")
    parser.add_argument("--windows", type=int, default=24, help=f"windows of {WINDOW} tokens")
    parser.add_argument("--measure", choices=SIDES, help=argparse.SUPPRESS)
    args = parse(parser)
    if args.quick:
        args.rows, args.steps, args.windows = args.rows[:2], 8, 2
    return args


if __name__ == "__main__":
    main()
