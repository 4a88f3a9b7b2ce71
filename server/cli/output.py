"""How commands speak: tables for people, `--json` for programs, exit codes for scripts, errors that say what to do.

Results go to stdout, everything else to stderr. Text that came from a server or a file is printed as it is: never as
rich markup, and without control characters that could drive a terminal.
"""

import enum
import json
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, NoReturn

import typer
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
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
# Cells of at most so many columns are never wrapped on a terminal.
_WHOLE_CELL = 24
# Between two columns.
_GAP = 2


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
    """A table on stdout. None is shown as a dash, a list's items with commas between. On a terminal, short cells stay
    whole and long ones are wrapped, lists between their items; what is too wide even so becomes several tables, one
    below the other, each with the first column.
    """
    cells = [[_cell(value) for value in row] for row in rows]
    console = Console(highlight=False)
    if not console.is_terminal:
        # In a pipe there is no width to fit into: nothing is wrapped.
        console.width = 10_000
    widths = [max(map(cell_len, column)) for column in zip(columns, *cells, strict=True)]
    for number, group in enumerate(_column_groups(widths, console.width)):
        if number:
            console.print()
        table = Table(box=None, pad_edge=False, header_style="bold")
        for index in group:
            table.add_column(columns[index], overflow="fold", no_wrap=widths[index] <= _WHOLE_CELL)
        for row, shown in zip(rows, cells, strict=True):
            table.add_row(
                *(_Items(row[i]) if isinstance(row[i], list) else Text(shown[i]) for i in group)  # type: ignore[arg-type]
            )
        console.print(table)


class _Items:
    """A list in a cell of a table: as many items a line as there is room for."""

    def __init__(self, items: Sequence[object]) -> None:
        texts = [_cell(item) for item in items]
        self._texts = [f"{text}," for text in texts[:-1]] + texts[-1:]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        line = ""
        for text in self._texts:
            if line and cell_len(line) + 1 + cell_len(text) > options.max_width:
                yield Text(line)
                line = text
            else:
                line = f"{line} {text}" if line else text
        yield Text(line)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        widths = [cell_len(text) for text in self._texts] or [0]
        return Measurement(max(widths), sum(widths) + len(widths) - 1)


def _column_groups(widths: Sequence[int], room: int) -> list[list[int]]:
    """The columns of each table: as many as fit, those that may be wrapped at their narrowest."""
    needed = [min(width, _WHOLE_CELL) + _GAP for width in widths]
    groups, used = [[0]], needed[0]
    for index in range(1, len(widths)):
        if used + needed[index] > room + _GAP and len(groups[-1]) > 1:
            groups.append([0])
            used = needed[0]
        groups[-1].append(index)
        used += needed[index]
    return groups


def plain(text: str) -> str:
    """The text without control characters other than line breaks."""
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    return plain(str(value))
