"""The commands that decide which version of a task answers: activate, rollback, canary, pin and unpin."""

from typing import Annotated, Any

import typer

from server.cli.connection import Json, Key, TaskName, Url, connect, parse_version
from server.cli.output import ExitCode, fail, print_json, say

Version = Annotated[int, typer.Argument(metavar="VERSION", min=1, help="As `promptmux show` lists them.")]
ExpectedVersion = Annotated[
    int | None,
    typer.Option(min=0, help="Refuse unless this version is active now; 0: unless none is.", show_default=False),
]


def activate(
    task: TaskName,
    version: Version,
    expected_version: ExpectedVersion = None,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Make a version of TASK the one that answers. Rows that are running keep theirs."""
    change: dict[str, Any] = {"active_version": version}
    if expected_version is not None:
        change["expected_version"] = expected_version
    with connect(url, key) as client:
        found = client.update_task(task, change)
    _report(found, f"{task}: version {version} is active", as_json)


def rollback(
    task: TaskName,
    version: Annotated[
        int | None,
        typer.Argument(metavar="VERSION", min=1, help="The version to go to. None: the one that was active before."),
    ] = None,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Make active again what was active before; repeated, it goes further back. Or make VERSION active.

    Rows that are running keep theirs.
    """
    with connect(url, key) as client:
        active = client.task(task).get("active_version")
        if version is None:
            found = client.rollback(task)
        else:
            # Compare-and-swap: what a colleague rolled out in between is not undone unseen.
            found = client.update_task(task, {"active_version": version, "expected_version": active or 0})
    _report(found, f"{task}: version {found.get('active_version')} is active (before: {active})", as_json)


def canary(
    task: TaskName,
    version: Annotated[
        str, typer.Argument(metavar="VERSION|off", help="The version to try, or `off` to end the trial.")
    ],
    percent: Annotated[
        int | None, typer.Argument(metavar="PERCENT", min=1, max=99, help="Share of TASK's requests that it answers.")
    ] = None,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Let a version answer a share of TASK's requests, or end that: `canary TASK 7 10`, `canary TASK off`."""
    if version == "off":
        if percent is not None:
            fail("`off` takes no percentage", code=ExitCode.USAGE, hint=f"promptmux canary {task} off")
        wanted, done = None, f"{task}: no canary"
    else:
        number = parse_version(version)
        if number is None or percent is None:
            fail("a canary is a version and a percentage", code=ExitCode.USAGE, hint=f"promptmux canary {task} 7 10")
        wanted = {"version": number, "percent": percent}
        done = f"{task}: version {version} answers {percent} % of the requests"
    with connect(url, key) as client:
        found = client.update_task(task, {"canary": wanted})
    _report(found, done, as_json)


def pin(task: TaskName, url: Url = None, key: Key = None, as_json: Json = False) -> None:
    """Keep the prefix of TASK on the device, however rarely it is asked for."""
    with connect(url, key) as client:
        found = client.update_task(task, {"pinned": True})
    _report(found, f"{task} is pinned", as_json)


def unpin(task: TaskName, url: Url = None, key: Key = None, as_json: Json = False) -> None:
    """Let the prefix of TASK make room for others again."""
    with connect(url, key) as client:
        found = client.update_task(task, {"pinned": False})
    _report(found, f"{task} is not pinned", as_json)


def _report(found: dict[str, Any], done: str, as_json: bool) -> None:
    if as_json:
        print_json(found)
    else:
        say(done)
