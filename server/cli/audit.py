"""`promptmux audit`: the append-only log of a server, as JSON lines."""

import json
import sys
import time
from typing import Annotated

import typer

from server.cli.connection import Key, Url, complete_task, connect
from server.cli.output import ExitCode, fail

_PAGE = 1000
_POLL_S = 1.0


def audit(
    receipts: Annotated[
        bool, typer.Option("--receipts", help="Which prompt answered which request, not who changed what.")
    ] = False,
    after: Annotated[int, typer.Option(min=0, help="Only entries with a larger id.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="End after so many entries.", show_default="all")] = None,
    tenant: Annotated[
        str | None, typer.Option(help="Entries of this tenant; `*`: of all.", show_default="the key's own")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Entries of this task alone.", autocompletion=complete_task)] = None,
    request_id: Annotated[
        str | None, typer.Option(help="With --receipts: those of one request, by its x-request-id.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is added, until Ctrl-C.")] = False,
    url: Url = None,
    key: Key = None,
) -> None:
    """Print who changed what, or with --receipts what answered whom: one JSON object a line, oldest first."""
    if request_id is not None and not receipts:
        fail("--request-id needs --receipts: changes have none", code=ExitCode.USAGE)
    query: dict[str, str | int] = {"kind": "receipts" if receipts else "changes"}
    given = {"tenant": tenant, "task": task, "request_id": request_id}
    query |= {name: value for name, value in given.items() if value is not None}
    num_left = limit
    with connect(url, key) as client:
        while num_left is None or num_left > 0:
            wanted = _PAGE if num_left is None else min(_PAGE, num_left)
            entries = client.audit({**query, "after": after, "limit": wanted})
            for entry in entries:
                sys.stdout.write(json.dumps(entry, ensure_ascii=False) + "\n")
            sys.stdout.flush()
            if entries:
                after = int(entries[-1]["id"])
                num_left = None if num_left is None else num_left - len(entries)
            if len(entries) < wanted:
                if not follow:
                    return
                time.sleep(_POLL_S)
