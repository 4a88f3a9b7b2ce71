"""Rounds: systems timed in turn in one run, the ratios of their times, and the command line that benchmarks share.

Owns how figures are compared. A machine drifts (other guests, heat, the page cache), so two systems are never timed one
after the other in blocks: every round runs all of them, each round begins with another one, and ratios are taken round
by round. Refuses to know what is timed, and where results are kept (`benchmarks.machine`).
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from server.bench.workload import Workload
from server.embedded import default_cache_dir, ensure_embedded_backbone
from server.engine.backbone import Backbone
from server.engine.checkpoint import DTYPES
from server.engine.own_thread import run_in_own_thread

FIRST_SETTLING_ROUND = 1_000_000
SETTLING_RUNS = 5
"""Each size of step is tried both ways four times."""

Seconds = dict[str, list[float]]


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times as fast, as long or as large. `goal` is what was promised, as text ("≥ 0.97"), or empty."""

    of_medians: float
    by_round: float
    quartiles: tuple[float, float]
    goal: str = ""


def make_parser(doc: str | None, *, rounds: int) -> argparse.ArgumentParser:
    """The options that every benchmark has. `doc` is its docstring, whose first line is the question."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--backbone", help="model folder; default: the embedded backbone")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="small sizes and one round, to see that it runs")
    parser.add_argument("--output", type=Path, help="STEM of the kept STEM.md and STEM.json; default: in results/")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse, and set torch's threads. `--quick` means one round. Exits with 2 when a value is out of range."""
    args = parser.parse_args()
    for name in ("threads", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; it must be at least 1")
    if args.quick:
        args.rounds = 1
    torch.set_num_threads(args.threads)
    return args


def backbone_folder(args: argparse.Namespace) -> str:
    """The folder of `--backbone`, else of the embedded backbone, converted if need be."""
    return args.backbone or str(ensure_embedded_backbone(default_cache_dir(), progress=True))


def load_backbone(args: argparse.Namespace, **options: Any) -> Backbone:
    """The backbone of `--backbone` in `--dtype`, with the project's cache for what is compiled."""
    options = {"dtype": args.dtype} | options
    return Backbone.load(backbone_folder(args), cache_dir=default_cache_dir(), **options)


def settle(backbone: Backbone, run: Callable[[int], object], *, runs: int = SETTLING_RUNS) -> None:
    """Run until steps are served as they will be while they are timed: compiled, where that was seen to be faster.

    `run` is given round numbers that no timed round has.
    """
    run(FIRST_SETTLING_ROUND)
    while backbone.compiled_state == "compiling":
        time.sleep(0.5)
    for number in range(FIRST_SETTLING_ROUND + 1, FIRST_SETTLING_ROUND + 1 + runs):
        run(number)


def embeddings_of(backbone: Backbone) -> npt.NDArray[np.float32]:
    """The backbone's input embeddings `[vocab_size, hidden_size]`, from which workloads draw their prompts."""

    def copy() -> npt.NDArray[np.float32]:
        weight: Any = backbone.model.get_input_embeddings().weight
        embeddings: npt.NDArray[np.float32] = weight.detach().float().cpu().numpy()
        return embeddings

    return run_in_own_thread(copy)


def refresh(load: Workload, vocab_size: int, *, seed: int, number: int) -> Workload:
    """The same prompts, lengths and order, with the client tokens of round `number`.

    A round that repeats the tokens of the last one could find them in an engine's cache of text prefixes.
    """
    rng = np.random.default_rng((seed, number))
    requests = [
        dataclasses.replace(r, token_ids=tuple(rng.integers(3, vocab_size, len(r.token_ids)).tolist()))
        for r in load.requests
    ]
    return Workload(load.prompts, requests)


def timed(work: Callable[[], object]) -> float:
    """Seconds that a call took."""
    started_s = time.perf_counter()
    work()
    return time.perf_counter() - started_s


def interleave(systems: Mapping[str, Callable[[int], float]], rounds: int, *, show: bool = True) -> Seconds:
    """Run all systems `rounds` times in turn; each gets the round's number and returns the seconds that it took.

    The order turns by one a round, so that none always follows the same other.
    """
    seconds: Seconds = {name: [] for name in systems}
    names = list(systems)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(systems[name](number))
            if show:
                print(f"{number + 1}/{rounds} {name:44} {seconds[name][-1]:8.3f} s", file=sys.stderr, flush=True)
    return seconds


def ratio(above: Sequence[float], below: Sequence[float], *, goal: str = "") -> Ratio:
    """`above` ÷ `below`, measured in the same rounds. The ratio of speeds is that of seconds turned over."""
    by_round = [a / b for a, b in zip(above, below, strict=True)]
    low, middle, high = by_round * 3 if len(by_round) == 1 else statistics.quantiles(by_round, n=4, method="inclusive")
    return Ratio(
        of_medians=round(statistics.median(above) / statistics.median(below), 3),
        by_round=round(middle, 3),
        quartiles=(round(low, 3), round(high, 3)),
        goal=goal,
    )


def ratio_table(ratios: Mapping[str, Ratio]) -> list[str]:
    """Lines of markdown."""
    lines = ["| ratio | goal | of medians | by round: median (quartiles) |", "|---|---:|---:|---|"]
    for name, value in ratios.items():
        low, high = value.quartiles
        lines.append(f"| {name} | {value.goal} | {value.of_medians:g} | {value.by_round:g} ({low:g} to {high:g}) |")
    return lines


def speed_table(seconds: Seconds, num_tokens: Mapping[str, int]) -> list[str]:
    """Lines of markdown: new tokens a second of each system, and the seconds of its rounds."""
    lines = ["| system | tokens/s (median) | seconds |", "|---|---:|---|"]
    for name, times in seconds.items():
        rate = num_tokens[name] / statistics.median(times)
        lines.append(f"| {name} | {rate:.0f} | {', '.join(f'{s:.2f}' for s in times)} |")
    return lines


def plain(ratios: Mapping[str, Ratio]) -> dict[str, dict[str, Any]]:
    """What JSON holds of ratios."""
    return {name: dataclasses.asdict(value) for name, value in ratios.items()}


def rounded(seconds: Seconds) -> Seconds:
    return {name: [round(s, 4) for s in times] for name, times in seconds.items()}
