"""How commands speak: tables for people, `--json` for programs, exit codes for scripts, errors that say what to do.

Results go to stdout, everything else to stderr. Text that came from a server or a file is printed as it is: never as
rich markup, and without control characters that could drive a terminal.
"""

import enum
import json
import sys
from collections.abc import Sequence
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


EXIT_CODE_HELP = (
    "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 server not reached, 4 not found, 5 conflict, "
    "6 key missing or not allowed, 7 file or value refused, 8 busy (try again)."
)


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
