"""The commands that list tasks, show one, take it away, and fetch a prompt back: ls, show, rm and pull."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from server.cli.connection import Json, Key, TaskName, Url, complete_task, connect, parse_reference
from server.cli.http_client import CONFIG_FILE, PROMPT_FILE
from server.cli.output import ExitCode, fail, print_json, print_table, say, short_digest, when


def ls(url: Url = None, key: Key = None, as_json: Json = False) -> None:
    """List tasks."""
    with connect(url, key) as client:
        tasks = list(client.tasks())
    if as_json:
        print_json(tasks)
        return
    if not tasks:
        say("no tasks yet; `promptmux push TASK DIR` uploads one")
        return
    print_table(
        ("task", "tenant", "active", "canary", "versions", "pinned", "created"),
        [
            (
                item["task"],
                item.get("tenant"),
                item.get("active_version"),
                _canary_text(item),
                item.get("num_versions"),
                item.get("pinned"),
                when(item.get("created")),
            )
            for item in tasks
        ],
    )


def show(task: TaskName, url: Url = None, key: Key = None, as_json: Json = False) -> None:
    """Show a task and its versions."""
    with connect(url, key) as client:
        found = client.task(task)
        versions = list(client.versions(task))
    if as_json:
        print_json(found | {"versions": versions})
        return
    pinned = "yes" if found.get("pinned") else "no"
    say(
        f"{task}: active version {found.get('active_version')}, canary {_canary_text(found) or 'none'}, pinned {pinned}"
    )
    print_table(
        ("version", "state", "gate", "type", "k", "bytes", "digest", "created", "by", "run", "warnings"),
        [
            (
                item["version"],
                item.get("state"),
                _gate_text(item),
                item.get("peft_type"),
                item.get("num_virtual_tokens"),
                item.get("bytes"),
                short_digest(item.get("digest")),
                when(item.get("created")),
                _provenance(item, "key_label") or item.get("created_by") or None,
                _provenance(item, "training_run"),
                len(item.get("warnings") or ()) or None,
            )
            for item in versions
        ],
    )


def rm(
    reference: Annotated[
        str,
        typer.Argument(metavar="TASK[@V]", help="A task, or one version of it.", autocompletion=complete_task),
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Delete a task with all its versions (its name stays taken), or one version that is not active."""
    task, version = parse_reference(reference)
    question = f"Delete {task} and all its versions? Its name cannot be used again."
    if version is not None:
        question = f"Delete version {version} of {task}?"
    if not yes and not typer.confirm(question, err=True):
        fail("nothing was deleted")
    with connect(url, key) as client:
        if version is None:
            client.delete_task(task)
        else:
            client.delete_version(task, version)
    if as_json:
        print_json({"task": task, "version": version, "deleted": True})
        return
    say(f"{reference} is deleted")


def pull(
    reference: Annotated[
        str, typer.Argument(metavar="TASK[@V]", help="A task, or one version of it.", autocompletion=complete_task)
    ],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write to; made if it does not exist.")],
    force: Annotated[bool, typer.Option("--force", help="Write over files that are there.")] = False,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Download a prompt as it was uploaded, its digest checked."""
    task, version = parse_reference(reference)
    taken = [folder / name for name in (PROMPT_FILE, CONFIG_FILE) if (folder / name).exists()]
    if taken and not force:
        fail(f"{taken[0]} exists", code=ExitCode.USAGE, hint="another folder, or --force")
    with connect(url, key) as client:
        if version is None:
            version = client.active_version(task)
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


def _write(path: Path, content: bytes) -> None:
    """Replaces the file in one go: a broken download never leaves half a prompt."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _canary_text(task: dict[str, Any]) -> str | None:
    canary = task.get("canary")
    return f"{canary.get('version')} at {canary.get('percent')} %" if isinstance(canary, dict) else None


def _gate_text(version: dict[str, Any]) -> str | None:
    gate = version.get("gate")
    if not isinstance(gate, dict):
        return None
    score = gate.get("score")
    return str(gate.get("status")) + ("" if score is None else f" {score:.2f}/{gate.get('threshold')}")


def _provenance(version: dict[str, Any], name: str) -> object:
    provenance = version.get("provenance")
    return provenance.get(name) if isinstance(provenance, dict) else None
