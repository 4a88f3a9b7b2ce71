"""What to try next: curl lines that work when pasted, made of the demo prompts' cards and the port that was taken.

Each demo prompt's folder has a `card.json` (written by the training script) with examples that its prompt was seen to
answer. A folder without a readable card is passed over: hints never keep a server from serving.
"""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.settings import Settings

CARD_FILE = "card.json"
_NUM_MIXED = 3


@dataclass(frozen=True, slots=True)
class DemoExample:
    """A text for a demo task and what its prompt answers to it."""

    task: str
    prompt: str
    answer: str
    max_tokens: int


def next_steps(settings: Settings, backbone_name: str, port: int, *, has_keys: bool) -> list[str]:
    """Lines to print once the server is ready: where it is, and three curl lines."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(settings.host, settings.host)  # noqa: S104 - only compared
    url = f"http://{f'[{host}]' if ':' in host and not host.startswith('[') else host}:{port}"
    curl = "curl -s"
    if has_keys:
        curl += ' -H "Authorization: Bearer $PROMPTMUX_KEY"'
    examples = read_examples(settings.demo_dir) if settings.demo_dir is not None else []
    lines = ["", f"promptmux serves {backbone_name} at {url} (API page: {url}/docs). Try:", ""]
    lines += _demo_lines(curl, url, settings.demo_dir, examples) if examples else _plain_lines(curl, url, backbone_name)
    return [*lines, "", "Ctrl-C ends it: running requests finish first.", ""]


def read_examples(demo_dir: Path) -> list[DemoExample]:
    """The first example of each demo task whose card has one, right answers only, by task name."""
    found = []
    for path in sorted(demo_dir.glob(f"*/{CARD_FILE}")):
        try:
            card: Any = json.loads(path.read_text(encoding="utf-8"))
            example = next(item for item in card["examples"] if item["answer"] == item["target"])
            found.append(
                DemoExample(path.parent.name, str(example["prompt"]), str(example["answer"]), int(card["max_tokens"]))
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration):
            continue
    return found


def _demo_lines(curl: str, url: str, demo_dir: Path | None, examples: Sequence[DemoExample]) -> list[str]:
    first = examples[0]
    mixed = _spread(examples, _NUM_MIXED)
    assert demo_dir is not None
    folder = demo_dir.absolute() / first.task
    answers = ", ".join(example.answer for example in mixed)
    return [
        f"# one task; its prompt answers: {first.answer}",
        f"{curl} {url}/v1/completions "
        + _json_body({"model": first.task, "prompt": first.prompt, "max_tokens": first.max_tokens}),
        f"# several tasks in one batch; their prompts answer: {answers}",
        f"{curl} {url}/v1/completions "
        + _json_body(
            {
                "tasks": [item.task for item in mixed],
                "prompt": [item.prompt for item in mixed],
                "max_tokens": max(item.max_tokens for item in mixed),
            }
        ),
        "# upload a prompt as a task of your own",
        f"{curl} {url}/v1/tasks/my-task/versions -F file=@{shlex.quote(str(folder / 'adapter_model.safetensors'))} "
        f"-F config=@{shlex.quote(str(folder / 'adapter_config.json'))}",
    ]


def _plain_lines(curl: str, url: str, backbone_name: str) -> list[str]:
    return [
        "# the backbone without a prompt",
        f"{curl} {url}/v1/completions "
        + _json_body({"model": backbone_name, "prompt": "The capital of France is", "max_tokens": 8}),
        "# the tasks that can be called",
        f"{curl} {url}/v1/models",
        "# what Prometheus sees",
        f"{curl} {url}/metrics",
    ]


def _json_body(fields: dict[str, Any]) -> str:
    body = json.dumps({**fields, "temperature": 0}, ensure_ascii=False)
    return f"-H 'Content-Type: application/json' -d {shlex.quote(body)}"


def _spread(examples: Sequence[DemoExample], count: int) -> list[DemoExample]:
    """`count` examples spread over the list, so that neighbours in the alphabet are not all that is shown."""
    step = max(1, len(examples) // count)
    return list(examples[::step][:count])
