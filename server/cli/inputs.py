"""Files of inputs that commands read: plain lines, or JSON lines as probe sets are written."""

import json
from dataclasses import dataclass
from pathlib import Path

from server.cli.output import ExitCode, fail

_HINT = 'one text a line, or JSON lines such as {"prompt": "France ->", "completion": " Paris"}'


@dataclass(frozen=True, slots=True)
class Input:
    """`completion` is what should follow, if it is known."""

    prompt: str
    completion: str | None = None

    def to_json(self) -> dict[str, str]:
        return {"prompt": self.prompt} | ({} if self.completion is None else {"completion": self.completion})


def read_inputs(path: Path) -> list[Input]:
    """The file's inputs; empty lines are left out. JSON lines if its first line is an object, plain lines otherwise."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}", code=ExitCode.USAGE)
    except UnicodeDecodeError:
        fail(f"{path} is not UTF-8", code=ExitCode.USAGE)
    if not lines:
        fail(f"{path} has no inputs", code=ExitCode.USAGE, hint=_HINT)
    if not lines[0].lstrip().startswith("{"):
        return [Input(line.removesuffix("\r")) for line in lines]
    return [_parse(path, number, line) for number, line in enumerate(lines, start=1)]


def _parse(path: Path, number: int, line: str) -> Input:
    try:
        value = json.loads(line)
        prompt, completion = value["prompt"], value.get("completion")
    except (ValueError, TypeError, KeyError, AttributeError):
        prompt, completion = None, None
    if not isinstance(prompt, str) or not prompt or not isinstance(completion, str | None):
        fail(f"line {number} of {path} is not a JSON object with `prompt`", code=ExitCode.USAGE, hint=_HINT)
    return Input(prompt, completion)
