"""The commands that talk to a running server: push, ls, show, rollback, rm and pull."""

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from server.cli.http_client import CONFIG_FILE, DEFAULT_URL, PROMPT_FILE, TaskClient
from server.cli.output import ExitCode, fail, print_json, print_table, say

Url = Annotated[str, typer.Option("--url", envvar="PROMPTMUX_URL", help="Address of the server.")]
Key = Annotated[
    str | None,
    typer.Option("--key", envvar="PROMPTMUX_KEY", show_envvar=True, help="API key, where the server asks for one."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
TaskName = Annotated[str, typer.Argument(metavar="TASK", help="The task's name.")]

_SHORT_DIGEST = 12


def push(
    task: TaskName,
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help=f"Folder with {PROMPT_FILE} and {CONFIG_FILE}, as PEFT saves them.")
    ],
    url: Url = DEFAULT_URL,
    key: Key = None,
    activate: Annotated[
        bool, typer.Option("--activate/--no-activate", help="Let requests use it at once, or only keep it.")
    ] = True,
    expected_version: Annotated[
        int | None,
        typer.Option(min=0, help="Refuse unless this version is active now; 0: unless the task is new."),
    ] = None,
    task_index: Annotated[
        int | None, typer.Option(min=0, help="Which task of a MULTITASK_PROMPT_TUNING file it is.")
    ] = None,
    metadata: Annotated[str | None, typer.Option(help="A JSON object to keep with the version.")] = None,
    as_json: Json = False,
) -> None:
    """Upload a prompt: a new version of TASK."""
    for name in (PROMPT_FILE, CONFIG_FILE):
        if not (folder / name).is_file():
            fail(
                f"{folder / name} does not exist",
                code=ExitCode.USAGE,
                hint="give the folder that PEFT's save_pretrained wrote",
            )
    fields = {"activate": "true" if activate else "false"}
    if expected_version is not None:
        fields["expected_version"] = str(expected_version)
    if task_index is not None:
        fields["task_index"] = str(task_index)
    if metadata is not None:
        _check_object(metadata)
        fields["metadata"] = metadata
    with TaskClient(url, key) as client:
        version = client.upload(task, folder, fields)
    if as_json:
        print_json(version)
        return
    news = "is new" if version["was_new"] else "was there already"
    kind = f"{version.get('peft_type')}, {version.get('num_virtual_tokens')} virtual tokens"
    say(f"{task}@{version['version']} {news}: {kind}, {version.get('state')}, digest {_short(version.get('digest'))}")
    for warning in version.get("warnings") or ():
        say(f"warning: {warning}")


def ls(url: Url = DEFAULT_URL, key: Key = None, as_json: Json = False) -> None:
    """List tasks."""
    with TaskClient(url, key) as client:
        tasks = list(client.tasks())
    if as_json:
        print_json(tasks)
        return
    if not tasks:
        say("no tasks yet; `promptmux push TASK DIR` uploads one")
        return
    print_table(
        ("task", "tenant", "active", "versions", "pinned", "created"),
        [
            (
                item["task"],
                item.get("tenant"),
                item.get("active_version"),
                item.get("num_versions"),
                item.get("pinned"),
                _when(item),
            )
            for item in tasks
        ],
    )


def show(task: TaskName, url: Url = DEFAULT_URL, key: Key = None, as_json: Json = False) -> None:
    """Show a task and its versions."""
    with TaskClient(url, key) as client:
        found = client.task(task)
        versions = list(client.versions(task))
    if as_json:
        print_json(found | {"versions": versions})
        return
    say(f"{task}: active version {found.get('active_version')}, pinned {'yes' if found.get('pinned') else 'no'}")
    print_table(
        ("version", "state", "type", "k", "bytes", "digest", "created", "warnings"),
        [
            (
                item["version"],
                item.get("state"),
                item.get("peft_type"),
                item.get("num_virtual_tokens"),
                item.get("bytes"),
                _short(item.get("digest")),
                _when(item),
                len(item.get("warnings") or ()) or None,
            )
            for item in versions
        ],
    )


def rollback(
    task: TaskName,
    version: Annotated[
        int | None,
        typer.Argument(metavar="VERSION", min=1, help="The version to go to. None: the one before the active one."),
    ] = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Make an older version of TASK active again. Rows that are running keep theirs."""
    with TaskClient(url, key) as client:
        active = client.task(task).get("active_version")
        target = version if version is not None else _previous(task, active, list(client.versions(task)))
        # Compare-and-swap: what a colleague rolled out in between is not undone unseen.
        found = client.activate(task, target, expected_version=active)
    if as_json:
        print_json(found)
        return
    say(f"{task}: version {target} is active (before: {active})")


def rm(
    task: TaskName,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Delete a task with all its versions. Its name stays taken."""
    if not yes and not typer.confirm(f"Delete {task} and all its versions? Its name cannot be used again.", err=True):
        fail("nothing was deleted")
    with TaskClient(url, key) as client:
        client.delete(task)
    if as_json:
        print_json({"task": task, "deleted": True})
        return
    say(f"{task} is deleted")


def pull(
    reference: Annotated[str, typer.Argument(metavar="TASK[@V]", help="A task, or one version of it.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write to; made if it does not exist.")],
    force: Annotated[bool, typer.Option("--force", help="Write over files that are there.")] = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Download a prompt as it was uploaded, its digest checked."""
    task, version = _parse_reference(reference)
    taken = [folder / name for name in (PROMPT_FILE, CONFIG_FILE) if (folder / name).exists()]
    if taken and not force:
        fail(f"{taken[0]} exists", code=ExitCode.USAGE, hint="another folder, or --force")
    with TaskClient(url, key) as client:
        if version is None:
            version = client.task(task).get("active_version")
            if not isinstance(version, int):
                fail(f"{task} has no active version", code=ExitCode.NOT_FOUND, hint=f"promptmux show {task}")
        file, config = client.download(task, version)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / PROMPT_FILE, file)
        _write(folder / CONFIG_FILE, config)
    except OSError as error:
        fail(f"cannot write to {folder}: {error.strerror}")
    if as_json:
        print_json({"task": task, "version": version, "folder": str(folder), "bytes": len(file)})
        return
    say(f"{task}@{version}: {len(file)} bytes in {folder}")


def _check_object(metadata: str) -> None:
    try:
        value = json.loads(metadata)
    except ValueError as error:
        fail(f"--metadata is not JSON: {error}", code=ExitCode.USAGE, hint="""--metadata '{"source": "run 12"}'""")
    if not isinstance(value, dict):
        fail("--metadata is not a JSON object", code=ExitCode.USAGE, hint="""--metadata '{"source": "run 12"}'""")


def _parse_reference(reference: str) -> tuple[str, int | None]:
    task, at, version = reference.partition("@")
    if not at:
        return task, None
    if not (version.isascii() and version.isdigit()) or int(version) < 1:
        fail(f"{version!r} is not a version number", code=ExitCode.USAGE, hint=f"{task}@1")
    return task, int(version)


def _previous(task: str, active: int | None, versions: list[dict[str, Any]]) -> int:
    """The newest version before the active one that may be served."""
    older = [
        int(item["version"])
        for item in versions
        if item.get("state") != "quarantined" and (active is None or int(item["version"]) < active)
    ]
    if not older:
        fail(
            f"{task} has no version before {active}",
            code=ExitCode.NOT_FOUND,
            hint=f"`promptmux show {task}` lists them; name the one to go to",
        )
    return max(older)


def _write(path: Path, content: bytes) -> None:
    """Replaces the file in one go: a broken download never leaves half a prompt."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _short(digest: object) -> str | None:
    return None if digest is None else str(digest).removeprefix("sha256:")[:_SHORT_DIGEST]


def _when(item: dict[str, Any]) -> str | None:
    created = item.get("created")
    if isinstance(created, int | float):
        return datetime.fromtimestamp(created, UTC).strftime("%Y-%m-%d %H:%M")
    return None if created is None else str(created)
