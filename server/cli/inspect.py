"""The commands that look into prompts: what one is near to, and how two versions answer the same inputs."""

from pathlib import Path
from typing import Annotated, Any

import typer

from server.cli.connection import Json, Key, TaskName, Url, complete_task, connect, parse_reference, parse_version
from server.cli.inputs import read_inputs
from server.cli.output import ExitCode, fail, print_json, print_table, say, short_digest

_BACKBONE = "backbone"


def inspect(
    reference: Annotated[
        str, typer.Argument(metavar="TASK[@V]", help="A task, or one version of it.", autocompletion=complete_task)
    ],
    top: Annotated[int, typer.Option(min=1, max=50, help="Nearest vocabulary tokens shown a vector.")] = 5,
    against: Annotated[
        str | None,
        typer.Option(metavar="VERSION", help="Show the distance to this version of TASK too (7, or sha256:<hex>)."),
    ] = None,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Show what a prompt's vectors are near to: vocabulary tokens, norms, and another version's vectors."""
    task, version = parse_reference(reference)
    with connect(url, key) as client:
        if version is None:
            version = client.active_version(task)
        found = client.inspect(task, version, top=top, against=against)
    if as_json:
        print_json(found)
        return
    say(
        f"{task}@{version}: {found.get('peft_type')}, {found.get('num_virtual_tokens')} virtual tokens, "
        f"digest {short_digest(found.get('digest'))}"
    )
    vocabulary = found.get("vocabulary") or {}
    spreads = {"vocabulary": vocabulary.get("norms"), "prompt": found.get("norms")}
    _print_objects("norms of", {name: spread for name, spread in spreads.items() if spread})
    if found.get("pairwise_cosine"):
        _print_objects("cosines between", {"its own vectors": found["pairwise_cosine"]})
    _print_list("virtual token", found.get("vectors"))
    _print_list("layer", found.get("layers"))
    if difference := found.get("against"):
        say(f"against version {difference.get('version')}: first {difference.get('num_compared')} virtual tokens")
        if difference.get("overall"):
            _print_objects("closeness", {"overall": difference["overall"]})
        _print_list("virtual token", difference.get("vectors"))
        _print_list("layer", difference.get("layers"))


def compare(
    task: TaskName,
    first: Annotated[str, typer.Argument(metavar="A", help=f"A version of TASK, or `{_BACKBONE}` (no prompt).")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    inputs: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Texts to answer, one a line, or JSON lines with `prompt` and perhaps `completion`. "
            "None: the probes kept with B, else those with A.",
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, max=128, help="New tokens an answer.")] = 32,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Let two versions of TASK answer the same inputs, and show where they differ."""
    versions = (_parse_version(first), _parse_version(second))
    items = None if inputs is None else [item.to_json() for item in read_inputs(inputs)]
    with connect(url, key) as client:
        found = client.compare(task, versions, inputs=items, max_tokens=max_tokens)
    if as_json:
        print_json(found)
        return
    rows: list[tuple[str, object]] = [
        ("inputs", found.get("num_inputs")),
        ("share of same answers", _number(found.get("agreement"))),
    ]
    if matches := found.get("exact_match"):
        rows += [
            (f"share of right answers, {name}", _number(m)) for name, m in zip((first, second), matches, strict=True)
        ]
    if change := found.get("logprob"):
        rows.append((f"log-likelihood of completions, {first}", _number(change.get("first"))))
        rows.append((f"log-likelihood of completions, {second}", _number(change.get("second"))))
    say(f"{task}: version {first} and version {second}")
    print_table(("", ""), rows)
    if differences := found.get("differences"):
        print_table(
            ("input", "expected", f"{first} answers", f"{second} answers"),
            [(repr(d["prompt"]), _quoted(d.get("completion")), *map(repr, d["answers"])) for d in differences],
        )


def _parse_version(text: str) -> int | None:
    if text == _BACKBONE:
        return None
    version = parse_version(text)
    if version is None:
        fail(
            f"{text[:80]!r} is neither a version nor `{_BACKBONE}`",
            code=ExitCode.USAGE,
            hint="promptmux show TASK lists them",
        )
    return version


def _print_objects(title: str, objects: dict[str, dict[str, Any]]) -> None:
    columns = list(next(iter(objects.values())))
    print_table((title, *columns), [(name, *(_cell(item.get(c)) for c in columns)) for name, item in objects.items()])


def _print_list(title: str, items: list[dict[str, Any]] | None) -> None:
    """One line an item; objects inside it become columns of their own."""
    if not items:
        return
    flat = [_flatten(item) for item in items]
    (first, *columns) = flat[0]
    print_table((title, *columns), [(_cell(item[first]), *(_cell(item.get(c)) for c in columns)) for item in flat])


def _flatten(item: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in item.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _cell(value: object) -> object:
    """Numbers are cut, texts quoted; an object, such as one of the nearest tokens, is put into one line."""
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, str):
        return repr(value)
    if isinstance(value, dict):
        return " ".join(str(_cell(part)) for part in value.values())
    if isinstance(value, list):
        return [_cell(part) for part in value]
    return value


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.4g}"


def _quoted(text: str | None) -> str | None:
    return None if text is None else repr(text)
