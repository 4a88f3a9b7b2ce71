"""`python -m benchmarks.tuning data|plan|run|report`."""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.machine import RESULTS
from benchmarks.rounds import backbone_folder
from benchmarks.tuning.cells import METHODS, Cell, Recipe, plan, select
from benchmarks.tuning.figures import Results
from benchmarks.tuning.ledger import LedgerError, read_ledger
from benchmarks.tuning.options import Options
from benchmarks.tuning.plots import write_plots
from benchmarks.tuning.queue import labels_of, run_queue
from benchmarks.tuning.report import PageError, write_page
from benchmarks.tuning.tasks import ALL_TASKS, DEFAULT_TASKS, write_tasks
from server.embedded import default_cache_dir
from server.engine.checkpoint import DTYPES, choose_dtype
from tuning.examples import DataError

DEFAULT_SEEDS = (0, 1, 2)
ROOT = Path(__file__).resolve().parents[2]


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    commands = {"data": _data, "plan": _plan, "run": _run, "report": _report}
    try:
        commands[args.command](args)
    except (LedgerError, PageError, DataError) as error:
        raise SystemExit(f"error: {error}") from error


def _data(args: argparse.Namespace) -> None:
    folder = args.folder / "data"
    write_tasks(folder, args.tasks)
    print(f"wrote the splits of {', '.join(args.tasks)} to {folder}")


def _plan(args: argparse.Namespace) -> None:
    done = {record.key for record in read_ledger(args.ledger)}
    counts: dict[str, Counter[bool]] = {}
    for cell in _cells(args):
        counts.setdefault(cell.method, Counter())[cell.key in done] += 1
    for method, found in counts.items():
        print(f"{method:20} {found[True]:4} of {found.total():4}")


def _run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    deadline_s = None if args.deadline_minutes is None else time.monotonic() + 60 * args.deadline_minutes
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = Options(
        backbone=backbone_folder(args),
        dtype=choose_dtype(args.dtype, device),
        num_threads=args.threads,
        folder=args.folder,
        ledger=args.ledger,
        recipe=_recipe(args),
        together=args.together,
        max_tokens_per_pass=args.max_tokens_per_pass,
        activation_checkpointing=args.checkpointing,
        deadline_s=deadline_s,
    )
    outcome = run_queue(_cells(args), options)
    print(f"{outcome.num_made} cells made, {outcome.num_left} left", file=sys.stderr)


def _report(args: argparse.Namespace) -> None:
    results = Results(read_ledger(args.ledger))
    write_page(args.page, results, _cells(args), images=args.images)
    for path in write_plots(args.images, results):
        print(f"wrote {path}")
    print(f"wrote {args.page}")


def _cells(args: argparse.Namespace) -> list[Cell]:
    return list(select(plan(args.tasks, args.seeds, labels_of(args.tasks)), args.only))


def _recipe(args: argparse.Namespace) -> Recipe:
    return Recipe(num_steps=args.steps, batch_size=args.batch_size, eval_every=args.eval_every)


def _parser() -> argparse.ArgumentParser:
    usual = Recipe()
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--tasks", nargs="+", choices=ALL_TASKS, default=list(DEFAULT_TASKS), metavar="TASK")
    common.add_argument("--seeds", nargs="+", type=int, default=list(DEFAULT_SEEDS), metavar="SEED")
    common.add_argument("--only", nargs="+", choices=METHODS, default=[], metavar="METHOD", help=", ".join(METHODS))
    common.add_argument("--ledger", type=Path, default=RESULTS / "tuning" / "cells.jsonl", help="finished cells")
    common.add_argument(
        "--folder",
        type=Path,
        default=default_cache_dir() / "benchmarks" / "tuning",
        help="splits, trained prompts, unfinished training",
    )
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tuning", description="What prompts are worth.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("data", parents=[common], help="write the tasks' splits as JSON lines")
    commands.add_parser("plan", parents=[common], help="how many cells of each method are made")
    run = commands.add_parser("run", parents=[common], help="make the cells that are missing; stop it at any time")
    run.add_argument("--backbone", help="model folder; default: the embedded backbone")
    run.add_argument("--dtype", default="auto", choices=["auto", *DTYPES])
    run.add_argument("--threads", type=int, default=torch.get_num_threads())
    run.add_argument("--deadline-minutes", type=float, help="stop then; what is under way goes on at the next run")
    run.add_argument("--together", type=int, default=6, help="prompts that are trained in one pass, at most")
    run.add_argument("--max-tokens-per-pass", type=int, default=4096)
    run.add_argument("--checkpointing", action="store_true", help="activation checkpointing, for less memory")
    run.add_argument("--steps", type=int, default=usual.num_steps)
    run.add_argument("--batch-size", type=int, default=usual.batch_size)
    run.add_argument("--eval-every", type=int, default=usual.eval_every)
    report = commands.add_parser("report", parents=[common], help="write the page's tables and pictures")
    report.add_argument("--page", type=Path, default=ROOT / "docs" / "tuning-results.md")
    report.add_argument("--images", type=Path, default=ROOT / "docs" / "images")
    return parser


if __name__ == "__main__":
    main()
