"""How commands speak: tables for people, `--json` for programs, exit codes for scripts, errors that say what to do.

Results go to stdout, everything else to stderr. Text that came from a server or a file is printed as it is: never as
rich markup, and without control characters that could drive a terminal.
"""

import enum
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text


class ExitCode(enum.IntEnum):
    """What a command's exit code means. 2 is the code of wrong usage everywhere."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    NOT_FOUND = 4
    CONFLICT = 5
    DENIED = 6
    REFUSED = 7
    BUSY = 8


EXIT_CODE_MEANINGS = {
    ExitCode.OK: "done",
    ExitCode.FAILED: "failed",
    ExitCode.USAGE: "wrong usage",
    ExitCode.UNREACHABLE: "server not reached",
    ExitCode.NOT_FOUND: "not found",
    ExitCode.CONFLICT: "conflict",
    ExitCode.DENIED: "key missing or not allowed",
    ExitCode.REFUSED: "file or value refused",
    ExitCode.BUSY: "busy (try again)",
}
EXIT_CODE_HELP = "Exit codes: " + ", ".join(f"{code} {text}" for code, text in EXIT_CODE_MEANINGS.items()) + "."

_SHORT_DIGEST = 12


def to_stderr() -> Console:
    """A console on stderr, made anew each time so that it follows a redirected stream."""
    return Console(stderr=True, highlight=False)


def fail(message: str, *, code: ExitCode = ExitCode.FAILED, hint: str | None = None) -> NoReturn:
    """Ends the command: one line that says what is wrong, one that says what to do next."""
    console = to_stderr()
    console.print(Text.assemble(("error: ", "bold red"), plain(message)), soft_wrap=True)
    if hint is not None:
        console.print(Text.assemble(("  try: ", "bold"), hint), soft_wrap=True)
    raise typer.Exit(code)


def say(message: str) -> None:
    """A line for the person at the terminal, on stderr."""
    to_stderr().print(Text(plain(message)), soft_wrap=True)


def is_terminal() -> bool:
    """Whether someone looks at stderr: progress is shown to people alone."""
    return sys.stderr.isatty()


def short_digest(digest: object) -> str | None:
    """Enough of a digest to tell it from others."""
    return None if digest is None else str(digest).removeprefix("sha256:")[:_SHORT_DIGEST]


def when(created: object) -> str | None:
    """A time in seconds since 1970 (UTC) as people write it; anything else as it is."""
    if isinstance(created, int | float) and not isinstance(created, bool):
        return datetime.fromtimestamp(created, UTC).strftime("%Y-%m-%d %H:%M")
    return None if created is None else str(created)


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on stdout. None is shown as a dash."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row))
    console = Console(highlight=False)
    if not console.is_terminal:
        # In a pipe there is no width to fit into: nothing is wrapped.
        console.width = 10_000
    console.print(table)


def plain(text: str) -> str:
    """The text without control characters other than line breaks."""
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return plain(str(value))
