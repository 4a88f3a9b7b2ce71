"""The run behind `promptmux bench`: from options that agree with each other to a report that is printed and written.

Owns what is checked before anything slow begins, progress, the form of the report, and what its failures exit with.
"""

import asyncio
import contextlib
import dataclasses
import datetime
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from server.bench.environment import describe_environment
from server.bench.load import Failure, LoadPlan, RequestRecord
from server.bench.measurement import Measurement, WarmUpError, measure
from server.bench.online import CONNECT_ERROR
from server.bench.plots import PlotsUnavailableError, require_matplotlib, write_plots
from server.bench.profiling import Profiler
from server.bench.report import Report
from server.bench.summary import Slo, summarize
from server.bench.workload import BenchRequest, Lengths, PromptPicker, RequestSource, WorkloadError
from server.cli.bench_targets import OfflineOptions, OnlineOptions, offline_target, online_target
from server.cli.output import ExitCode, fail, print_json, print_table, say, to_stderr

_STDOUT = "-"
_WARM_UP_SEED = 1
_EXIT_CODES = {
    400: ExitCode.REFUSED,
    401: ExitCode.DENIED,
    403: ExitCode.DENIED,
    404: ExitCode.NOT_FOUND,
    429: ExitCode.BUSY,
    503: ExitCode.BUSY,
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """The load, the requests and the results; which server or engine is not among them."""

    concurrency: int | None
    rate: float | None
    num_requests: int | None
    duration_s: float | None
    warm_up: int
    prompt_tokens: str
    new_tokens: str
    seed: int
    zipf: float | None
    slo_ttft_ms: float | None
    slo_itl_ms: float | None
    json_file: str | None
    plot_folder: Path | None
    profile_file: Path | None


def run_bench(which: OnlineOptions | OfflineOptions, options: BenchOptions) -> None:
    """Measures, prints and writes. Ends with code 1 (`typer.Exit`) when a request failed."""
    _check_outputs(options)
    lengths = _lengths(options.prompt_tokens, "--prompt-tokens"), _lengths(options.new_tokens, "--new-tokens")
    report, measured = asyncio.run(_measure(which, options, *lengths))
    _publish(report, measured, options)
    if report.summary.num_failed:
        fail(f"{report.summary.num_failed} of {report.summary.num_requests} requests failed")


async def _measure(
    which: OnlineOptions | OfflineOptions, options: BenchOptions, prompt_tokens: Lengths, new_tokens: Lengths
) -> tuple[Report, Measurement]:
    opening = offline_target(which) if isinstance(which, OfflineOptions) else online_target(which)
    async with opening as target:

        def source(*seed: int) -> RequestSource:
            return RequestSource(
                vocab_size=target.vocab_size,
                prompt_tokens=prompt_tokens,
                new_tokens=new_tokens,
                picker=PromptPicker(target.num_prompts, zipf=options.zipf, seed=options.seed),
                seed=seed,
            )

        plan = LoadPlan(
            concurrency=options.concurrency,
            rate=options.rate,
            num_requests=options.num_requests,
            duration_s=options.duration_s,
            seed=options.seed,
        )
        num_warm_up = options.warm_up
        if num_warm_up and target.is_compiled:
            # Steps of every size that the load will have are to be on trial before it.
            num_warm_up = max(num_warm_up, options.concurrency or 0)
        profiler = Profiler(options.profile_file) if options.profile_file is not None else None
        try:
            with _progress(plan) as on_record:
                measured = await measure(
                    target.target,
                    source(options.seed),
                    plan,
                    # Other tokens than those that are measured: a cache of texts must not know them already.
                    warm_up=_rounds(source(options.seed, _WARM_UP_SEED), num_warm_up),
                    warm_up_concurrency=options.concurrency or max(num_warm_up, 1),
                    is_settled=target.is_settled,
                    read_metrics=target.read_metrics,
                    around=profiler or contextlib.nullcontext(),
                    on_record=on_record,
                )
        except WarmUpError as error:
            _fail_warm_up(error.failure)
        except OSError as error:
            fail(f"cannot write the trace: {error}")
        description = target.describe()
    slo = Slo(
        ttft_s=None if options.slo_ttft_ms is None else options.slo_ttft_ms / 1e3,
        itl_s=None if options.slo_itl_ms is None else options.slo_itl_ms / 1e3,
    )
    report = Report(
        mode=target.mode,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seed=options.seed,
        target=description,
        options={
            "loop": "closed" if options.rate is None else "open",
            "concurrency": options.concurrency,
            "rate": options.rate,
            "num_requests": options.num_requests,
            "duration_s": options.duration_s,
            "warm_up": options.warm_up,
            "prompt_tokens": str(prompt_tokens),
            "new_tokens": str(new_tokens),
            "vocab_size": target.vocab_size,
            "num_prompts": target.num_prompts,
            "zipf": options.zipf,
        },
        environment=describe_environment(),
        summary=summarize(measured.result, slo),
        slo=slo,
        steps=measured.steps,
        operators=profiler.operators if profiler is not None else None,
    )
    return report, measured


def _rounds(source: RequestSource, count: int) -> Iterator[list[BenchRequest]]:
    while True:
        yield source.take(count)


def _check_outputs(options: BenchOptions) -> None:
    """What cannot be written is better known before the load than after it."""
    files = {"--json": options.json_file if options.json_file != _STDOUT else None, "--profile": options.profile_file}
    for flag, file in files.items():
        if file is not None and not Path(file).absolute().parent.is_dir():
            fail(f"{flag}: the folder of {file} does not exist", code=ExitCode.USAGE)
    if options.plot_folder is not None:
        if options.plot_folder.exists() and not options.plot_folder.is_dir():
            fail(f"--plot: {options.plot_folder} is no folder", code=ExitCode.USAGE)
        try:
            require_matplotlib()
        except PlotsUnavailableError as error:
            fail(f"--plot: {error}", code=ExitCode.USAGE)


def _lengths(text: str, flag: str) -> Lengths:
    try:
        return Lengths.parse(text, flag)
    except WorkloadError as error:
        fail(f"{error.field}: {error}", code=ExitCode.USAGE, hint=f"{flag} 32 or {flag} lognormal:24:0.9:4-128")


@contextlib.contextmanager
def _progress(plan: LoadPlan) -> Iterator[Callable[[RequestRecord], None]]:
    """A bar on stderr, where that is a terminal, moved on by each request that ends."""
    console = to_stderr()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("requests, {task.fields[failed]} failed, {task.fields[tokens]} new tokens"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("measuring", total=plan.num_requests, failed=0, tokens=0)
        num_failed = num_tokens = 0

        def on_record(record: RequestRecord) -> None:
            nonlocal num_failed, num_tokens
            num_failed += record.failure is not None
            num_tokens += len(record.token_times_s)
            progress.update(task, advance=1, failed=num_failed, tokens=num_tokens)

        yield on_record


def _publish(report: Report, measured: Measurement, options: BenchOptions) -> None:
    """The tables, or JSON in their place; then the files."""
    document = report.to_json()
    if options.json_file == _STDOUT:
        print_json(document)
    else:
        for table in report.tables():
            print_table(table.columns, table.rows)
            typer.echo()
    if measured.steps is None and report.mode == "online":
        say("the server's /metrics told nothing of the engine's steps")
    try:
        if options.json_file not in (None, _STDOUT):
            Path(options.json_file).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        if options.plot_folder is not None:
            for path in write_plots(options.plot_folder, measured.result, measured.steps):
                say(f"wrote {path}")
    except OSError as error:
        fail(f"cannot write the results: {error}")


def _fail_warm_up(failure: Failure) -> NoReturn:
    code = ExitCode.UNREACHABLE if failure.kind == CONNECT_ERROR else ExitCode.FAILED
    fail(
        f"no request of the warm-up was answered; the first failed with {failure.kind}: {failure.message}",
        code=_EXIT_CODES.get(failure.status or 0, code),
        hint="--vocab-size, --prompt-tokens and --new-tokens say what is sent" if failure.status == 400 else None,
    )
