"""`promptmux check`: the isolation self-check of a running server, as a table and an exit code."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli.connection import Json, Key, Url, complete_task, resolve_connection
from server.cli.http_client import DEFAULT_URL, EXIT_CODES, UNREACHABLE_HINT
from server.cli.inputs import read_inputs
from server.cli.output import ExitCode, fail, is_terminal, print_json, print_table, say, short_digest, to_stderr

if TYPE_CHECKING:
    from server.check.report import CheckReport
    from server.check.run import CheckOptions


def check(
    tasks: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TASK[@V]...",
            help="Tasks, or versions of them. None: a sample of all that the key may call.",
            autocompletion=complete_task,
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option("--input", metavar="TEXT", help="Ask this instead of the built-in texts. Repeat it for several."),
    ] = None,
    inputs: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Ask the texts of this file: lines, or JSON lines with `prompt`."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="How often all are asked together.")] = 3,
    max_tokens: Annotated[int, typer.Option(min=1, max=1024, help="New tokens an answer.")] = 16,
    concurrency: Annotated[int, typer.Option(min=2, max=1024, help="Requests at once.")] = 16,
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=10,
            help="Log-probabilities may differ by so much.",
            show_default="0.002 in float32, 0.3 in bfloat16, 0.1 in float16",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32, help="Of the orders, and of the sample of tasks.")] = 0,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Check a running server's isolation from outside: each task alone, then all mixed, must answer the same.

    Every answer must carry the digest of its task, and be the one that the task gave alone, but for near-ties. Exits
    with 1 on any mismatch. It is best run while little else is: answers alone are then really alone.
    """
    # Imported here: asyncio's client is needed by this command alone.
    from server.check.run import TEXTS, CheckOptions

    texts = [*(text or ()), *(item.prompt for item in (read_inputs(inputs) if inputs is not None else ()))] or list(
        TEXTS
    )
    options = CheckOptions(
        references=tasks or (),
        texts=list(dict.fromkeys(texts)),
        num_rounds=rounds,
        concurrency=concurrency,
        tolerance=tolerance,
        seed=seed,
    )
    url, key = resolve_connection(url, key)
    report = _run(url, key, options, max_tokens)
    if as_json:
        print_json(report.to_json())
    else:
        _show(report)
    if not report.is_sound:
        raise typer.Exit(ExitCode.FAILED)


def _run(url: str, key: str | None, options: "CheckOptions", max_tokens: int) -> "CheckReport":
    from server.check.asking import AskError, Server
    from server.check.run import IsolationCheck

    async def run(show: Callable[[str], None]) -> "CheckReport":
        async with Server(url, key, max_tokens=max_tokens) as server:
            return await IsolationCheck(server, options, show).run()

    try:
        if not is_terminal():
            return asyncio.run(run(lambda _: None))
        with to_stderr().status("looking at the tasks") as status:
            return asyncio.run(run(status.update))
    except AskError as error:
        if error.status is None:
            fail(f"{url}: {error}", code=ExitCode.UNREACHABLE, hint=UNREACHABLE_HINT)
        code = EXIT_CODES.get(error.status, ExitCode.FAILED)
        fail(str(error), code=code, hint="`promptmux ls` shows what can be checked")
    except (ValueError, TypeError) as error:
        fail(f"{url!r} is not an address: {error}", code=ExitCode.USAGE, hint=f"--url {DEFAULT_URL}")


def _show(report: "CheckReport") -> None:
    print_table(
        ("task", "digest", "verdict", "mixed answers", "tokens", "near-ties", "max gap"),
        [
            (
                item.subject.name,
                short_digest(item.subject.digest),
                item.verdict,
                item.num_mixed,
                item.num_tokens,
                item.num_near_ties,
                f"{item.max_gap:.2g}",
            )
            for item in report.subjects
        ],
    )
    for item in report.subjects:
        if item.subject.note is not None:
            say(f"{item.subject.name}: {item.subject.note}")
        if item.changed_to is not None:
            say(f"{item.subject.name}: rolled out to {short_digest(item.changed_to)} meanwhile; compared until then")
        for fault in [*item.faults, *item.errors[:3]]:
            say(f"{item.subject.name}: {fault}")
    for first, second in report.alike:
        say(f"warning: {first} and {second} answer all of these texts alike; a mix-up of the two would not be seen")
    if report.num_disturbed:
        say(f"warning: other requests were running at {report.num_disturbed} of the answers alone")
    if report.num_violations:
        say(f"the server's own check has stopped {report.num_violations} rows meanwhile")
    verdict = "isolation holds" if report.is_sound else "isolation does NOT hold, or could not be checked"
    say(f"{verdict} ({report.dtype}, log-probabilities within {report.tolerance:g})")
