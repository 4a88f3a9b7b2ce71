"""`promptmux push`: uploads a prompt, and where it was given probes to answer, waits until they are answered."""

import json
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from server.cli.connection import Json, Key, TaskName, Url, connect
from server.cli.http_client import CONFIG_FILE, PROMPT_FILE, ServerClient
from server.cli.output import ExitCode, fail, is_terminal, print_json, say, short_digest, to_stderr

_POLL_S = 0.2
_UNDECIDED = frozenset({"pending", "running"})
_Version = dict[str, Any]


def push(
    task: TaskName,
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help=f"Folder with {PROMPT_FILE} and {CONFIG_FILE}, as PEFT saves them.")
    ],
    url: Url = None,
    key: Key = None,
    activate: Annotated[
        bool, typer.Option("--activate/--no-activate", help="Let requests use it at once, or only keep it.")
    ] = True,
    expected_version: Annotated[
        int | None,
        typer.Option(min=0, help="Refuse unless this version is active now; 0: unless the task is new."),
    ] = None,
    probes: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Inputs and expected answers as JSON lines, kept with the version."),
    ] = None,
    gate: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            metavar="THRESHOLD",
            help="Activate it only if so large a share of the probes is answered as expected.",
        ),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until the gate has passed or failed.")] = True,
    training_run: Annotated[str | None, typer.Option(help="Which run made it; kept as its provenance.")] = None,
    data_digest: Annotated[str | None, typer.Option(help="Digest of the data that it was trained on.")] = None,
    task_index: Annotated[
        int | None, typer.Option(min=0, help="Which task of a MULTITASK_PROMPT_TUNING file it is.")
    ] = None,
    metadata: Annotated[str | None, typer.Option(help="A JSON object to keep with the version.")] = None,
    as_json: Json = False,
) -> None:
    """Upload a prompt: a new version of TASK. Exits with 1 when its gate does not pass."""
    for name in (PROMPT_FILE, CONFIG_FILE):
        _require_file(folder / name, "give the folder that PEFT's save_pretrained wrote")
    if probes is not None:
        _require_file(probes, "give a file of JSON lines")
    if gate is not None and probes is None:
        fail("--gate needs --probes", code=ExitCode.USAGE, hint="--probes FILE, the inputs and their expected answers")
    if metadata is not None:
        _check_object(metadata)
    optional = {
        "expected_version": expected_version,
        "task_index": task_index,
        "metadata": metadata,
        "gate_threshold": gate,
        "training_run": training_run,
        "data_digest": data_digest,
    }
    fields = {"activate": "true" if activate else "false"}
    fields |= {name: str(value) for name, value in optional.items() if value is not None}
    with connect(url, key) as client:
        version = client.upload(task, folder, fields, probes)
        if not as_json:
            report_upload(task, version)
        # A version that was there before keeps the gate that it has; its outcome is told all the same.
        if gate is not None and wait:
            version |= wait_for_gate(client, task, version, says=not as_json)
    if as_json:
        print_json(version)
    if gate is not None:
        _end_as_the_gate_did(task, version, says=not as_json)


def report_upload(task: str, version: _Version) -> None:
    """Says on stderr what an upload gave."""
    news = "is new" if version["was_new"] else "was there already"
    kind = f"{version.get('peft_type')}, {version.get('num_virtual_tokens')} virtual tokens"
    digest = short_digest(version.get("digest"))
    say(f"{task}@{version['version']} {news}: {kind}, {version.get('state')}, digest {digest}")
    for warning in version.get("warnings") or ():
        say(f"warning: {warning}")


def wait_for_gate(client: ServerClient, task: str, version: _Version, *, says: bool) -> _Version:
    """The version as it is once its gate is decided. Ctrl-C ends the wait, not the gate."""
    shown = to_stderr().status(f"{task}@{version['version']}: the gate's probes are answered")
    with shown if says and is_terminal() else nullcontext():
        found = version
        while _gate(found).get("status") in _UNDECIDED:
            time.sleep(_POLL_S)
            found = client.version(task, int(version["version"]))
    return found


@dataclass(frozen=True, slots=True)
class GateVerdict:
    """What came of a version's gate. `code` is what a command exits with; `hint` is set where it is not OK."""

    message: str
    code: ExitCode
    hint: str | None = None


def judge_gate(task: str, version: _Version) -> GateVerdict:
    """What the version's gate says, decided or not."""
    found = _gate(version)
    status, score = found.get("status"), found.get("score")
    if status in _UNDECIDED:
        return GateVerdict(f"its gate is {status}; `promptmux show {task}` tells how it went", ExitCode.OK)
    outcome = f"gate {status}"
    if score is not None:
        outcome += f": {score:.3f} of {found.get('num_probes')} probes, {found.get('threshold')} needed"
    if status == "passed":
        return GateVerdict(f"{outcome}; {task}@{version['version']} is {version.get('state')}", ExitCode.OK)
    if status == "conflict":
        hint = f"another version was made active meanwhile; `promptmux activate {task} {version['version']}` does it"
        return GateVerdict(outcome, ExitCode.CONFLICT, hint)
    return GateVerdict(outcome, ExitCode.FAILED, f"`promptmux show {task} --json` has the details")


def _end_as_the_gate_did(task: str, version: _Version, *, says: bool) -> None:
    verdict = judge_gate(task, version)
    if verdict.code is not ExitCode.OK:
        fail(verdict.message, code=verdict.code, hint=verdict.hint)
    if says:
        say(verdict.message)


def _gate(version: _Version) -> dict[str, Any]:
    found = version.get("gate")
    return found if isinstance(found, dict) else {}


def _require_file(path: Path, hint: str) -> None:
    if not path.is_file():
        fail(f"{path} does not exist", code=ExitCode.USAGE, hint=hint)


def _check_object(metadata: str) -> None:
    hint = """--metadata '{"source": "run 12"}'"""
    try:
        value = json.loads(metadata)
    except ValueError as error:
        fail(f"--metadata is not JSON: {error}", code=ExitCode.USAGE, hint=hint)
    if not isinstance(value, dict):
        fail("--metadata is not a JSON object", code=ExitCode.USAGE, hint=hint)
