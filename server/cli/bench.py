"""`promptmux bench`: a load against a running server, or against the engine in this process, and what came of it.

Owns the options, what they exclude, progress and exit codes. Refuses to know how a load is sent and how its numbers are
made (`server.bench`), which it imports only when it runs.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from server.cli.connection import resolve_connection
from server.cli.http_client import DEFAULT_URL
from server.cli.output import ExitCode, fail
from server.cli.setting_flags import ConfigFile, with_setting_flags
from server.settings import GROUPS, flag_name

ENGINE_GROUPS = ("Model", "Batch", "Memory", "Isolation")
DEFAULT_REQUESTS = 64
DEFAULT_CONCURRENCY = 64
DEFAULT_PROMPTS = 64

_ONLINE, _LOAD, _REQUESTS, _PROMPTS, _RESULTS = "Server", "Load", "Requests", "Soft prompts", "Results"
# Parameters that only one kind of run has a use for, by the name that the user wrote.
_ONLINE_ONLY = {"url": "--url", "key": "--key", "task": "--task", "vocab_size": "--vocab-size"}
_OFFLINE_ONLY = {
    "model": "MODEL",
    "num_prompts": "--num-prompts",
    "k": "-k",
    "profile": "--profile",
    "config": "--config",
    **{name: flag_name(name) for group in ENGINE_GROUPS for name in GROUPS[group] if name != "model"},
}
_PROMPT_OPTIONS = {"task": "--task", "num_prompts": "--num-prompts", "k": "-k", "zipf": "--zipf"}


@partial(with_setting_flags, groups=ENGINE_GROUPS)
def bench(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="With --offline: the backbone, as for serve.", show_default=False),
    ] = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Run the engine in this process: no HTTP, no server.")
    ] = False,
    url: Annotated[
        str | None,
        typer.Option(
            envvar="PROMPTMUX_URL", show_default=DEFAULT_URL, help="Address of the server.", rich_help_panel=_ONLINE
        ),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(envvar="PROMPTMUX_KEY", help="API key, where the server asks for one.", rich_help_panel=_ONLINE),
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=65536,
            help="Closed loop: so many requests at once, each followed by the next.",
            show_default=str(DEFAULT_CONCURRENCY),
            rich_help_panel=_LOAD,
        ),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            min=1e-6, max=1e6, help="Open loop: Poisson arrivals, so many requests a second.", rich_help_panel=_LOAD
        ),
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=10_000_000,
            help="End after so many requests.",
            show_default=f"{DEFAULT_REQUESTS}, without --duration",
            rich_help_panel=_LOAD,
        ),
    ] = None,
    duration: Annotated[
        float | None,
        typer.Option(
            min=0.001, max=1e7, help="Send for so many seconds; what runs then ends and counts.", rich_help_panel=_LOAD
        ),
    ] = None,
    warmup: Annotated[
        int, typer.Option(min=0, max=1_000_000, help="Requests sent first and not counted.", rich_help_panel=_LOAD)
    ] = 8,
    prompt_tokens: Annotated[
        str,
        typer.Option(
            metavar="LENGTHS",
            help="Client tokens a request: N, LOW-HIGH (uniform) or lognormal:MEDIAN:SIGMA:LOW-HIGH.",
            rich_help_panel=_REQUESTS,
        ),
    ] = "8-64",
    new_tokens: Annotated[
        str,
        typer.Option(
            metavar="LENGTHS", help="New tokens a request, all of them made (EOS ends none).", rich_help_panel=_REQUESTS
        ),
    ] = "32",
    seed: Annotated[
        int, typer.Option(min=0, max=2**32, help="Of lengths, tokens, arrivals and prompts.", rich_help_panel=_REQUESTS)
    ] = 0,
    vocab_size: Annotated[
        int,
        typer.Option(
            min=4,
            max=2**31,
            help="Client tokens are random ids below it; at most the server's vocabulary.",
            rich_help_panel=_REQUESTS,
        ),
    ] = 1000,
    task: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK[@V]",
            help="Send to this task; repeat it for several. None: to all that the key may call.",
            rich_help_panel=_PROMPTS,
        ),
    ] = None,
    no_prompt: Annotated[
        bool, typer.Option("--no-prompt", help="The bare backbone, without soft prompts.", rich_help_panel=_PROMPTS)
    ] = False,
    num_prompts: Annotated[
        int,
        typer.Option(min=1, max=1_000_000, help="With --offline: so many random prompts.", rich_help_panel=_PROMPTS),
    ] = DEFAULT_PROMPTS,
    k: Annotated[
        int,
        typer.Option(
            "-k", min=1, max=65536, help="With --offline: virtual tokens of a prompt.", rich_help_panel=_PROMPTS
        ),
    ] = 20,
    zipf: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=100,
            metavar="S",
            help="Draw prompts by Zipf's law: the r-th with a weight of 1/r^S. None: all take turns.",
            rich_help_panel=_PROMPTS,
        ),
    ] = None,
    slo_ttft_ms: Annotated[
        float | None,
        typer.Option(min=0, help="Goodput: time to first token of a good request.", rich_help_panel=_RESULTS),
    ] = None,
    slo_itl_ms: Annotated[
        float | None,
        typer.Option(min=0, help="Goodput: mean time between the tokens of a good request.", rich_help_panel=_RESULTS),
    ] = None,
    json_file: Annotated[
        str | None,
        typer.Option("--json", metavar="FILE", help="Write the report as JSON; - is stdout.", rich_help_panel=_RESULTS),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Write pictures (needs the extra `bench`: matplotlib).", rich_help_panel=_RESULTS
        ),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="With --offline: write a Chrome trace of the run and print the operators that took longest.",
            rich_help_panel=_RESULTS,
        ),
    ] = None,
    config: ConfigFile = None,
    **flags: Any,
) -> None:
    """Measure a running server, or with --offline the engine alone: latencies, tokens a second, step times.

    Exits with 1 when any request failed, after the report. The settings below are those of serve; they are for
    --offline.
    """
    given = {name for name in context.params if str(context.get_parameter_source(name)).endswith("COMMANDLINE")}
    _refuse(given, _ONLINE_ONLY if offline else _OFFLINE_ONLY, "needs a server" if offline else "needs --offline")
    if no_prompt:
        _refuse(given, _PROMPT_OPTIONS, "contradicts --no-prompt")
    if rate is not None:
        _refuse(given, {"concurrency": "--concurrency"}, "contradicts --rate: a loop is closed or open")
    # Imported here: numpy and httpx are slow to import, and --help needs neither.
    from server.cli.bench_run import BenchOptions, run_bench
    from server.cli.bench_targets import OfflineOptions, OnlineOptions

    chosen: OfflineOptions | OnlineOptions
    if offline:
        prompts = 0 if no_prompt else num_prompts
        chosen = OfflineOptions(settings={"model": model, **flags}, config=config, num_prompts=prompts, k=k, seed=seed)
    else:
        url, key = resolve_connection(url, key)
        chosen = OnlineOptions(url=url, key=key, tasks=() if no_prompt else task or None, vocab_size=vocab_size)
    run_bench(
        chosen,
        BenchOptions(
            concurrency=None if rate is not None else concurrency or DEFAULT_CONCURRENCY,
            rate=rate,
            num_requests=DEFAULT_REQUESTS if requests is None and duration is None else requests,
            duration_s=duration,
            warm_up=warmup,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            seed=seed,
            zipf=zipf,
            slo_ttft_ms=slo_ttft_ms,
            slo_itl_ms=slo_itl_ms,
            json_file=json_file,
            plot_folder=plot,
            profile_file=profile,
        ),
    )


def _refuse(given: set[str], options: Mapping[str, str], why: str) -> None:
    """Ends the command when one of `options` was written on the command line."""
    for name, written in options.items():
        if name in given:
            fail(f"{written} {why}", code=ExitCode.USAGE, hint="`promptmux bench --help` tells what goes together")
