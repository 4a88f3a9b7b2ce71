"""What is printed when the server is ready: lines that a shell can run, made of what is really there."""

import json
import shlex
from pathlib import Path

import pytest

from server.cli.hints import next_steps
from server.settings import Settings


def write_card(folder: Path, task: str, prompt: str, answer: str, target: str) -> None:
    (folder / task).mkdir(parents=True)
    examples = [
        {"prompt": "wrong one", "answer": "no", "target": "yes"},
        {"prompt": prompt, "answer": answer, "target": target},
    ]
    (folder / task / "card.json").write_text(json.dumps({"task": task, "max_tokens": 9, "examples": examples}))


def curls(lines: list[str]) -> list[list[str]]:
    return [shlex.split(line) for line in lines if line.startswith("curl")]


def body(curl: list[str]) -> dict[str, object]:
    return json.loads(curl[curl.index("-d") + 1])


@pytest.fixture
def demo_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "it's a demo"
    for task in ("capitals", "numbers", "sentiment", "uppercase"):
        write_card(folder, task, f"what's {task} ->", "right", "right")
    return folder


def test_three_curl_lines_with_the_port_and_the_demo_tasks(demo_dir: Path) -> None:
    lines = next_steps(Settings(demo_dir=demo_dir), "SmolLM2", 8123, has_keys=False)

    one, mixed, upload = curls(lines)

    assert "http://127.0.0.1:8123/v1/completions" in one
    assert body(one)["model"] == "capitals"
    assert body(one)["max_tokens"] == 9
    assert body(one)["prompt"] == "what's capitals ->"
    assert body(mixed)["tasks"] == ["capitals", "numbers", "sentiment"]
    assert body(mixed)["prompt"] == ["what's capitals ->", "what's numbers ->", "what's sentiment ->"]
    assert f"file=@{demo_dir}/capitals/adapter_model.safetensors" in upload
    assert f"config=@{demo_dir}/capitals/adapter_config.json" in upload
    assert not any("Authorization" in word for word in one)


def test_wrong_answers_and_broken_cards_are_not_shown(demo_dir: Path) -> None:
    write_card(demo_dir, "aaa-poor", "x", "wrong", "right")
    (demo_dir / "bbb-broken").mkdir()
    (demo_dir / "bbb-broken" / "card.json").write_text("{")
    (demo_dir / "ccc-odd").mkdir()
    (demo_dir / "ccc-odd" / "card.json").write_text("[1]")

    assert body(curls(next_steps(Settings(demo_dir=demo_dir), "b", 1, has_keys=False))[0])["model"] == "capitals"


def test_keys_are_asked_for_without_being_shown(demo_dir: Path) -> None:
    lines = next_steps(Settings(demo_dir=demo_dir), "SmolLM2", 8123, has_keys=True)

    assert all("Authorization: Bearer $PROMPTMUX_KEY" in curl for curl in curls(lines))


@pytest.mark.parametrize("demo_dir_exists", [True, False])
def test_without_demo_prompts_the_backbone_is_called(tmp_path: Path, demo_dir_exists: bool) -> None:
    settings = Settings(demo_dir=tmp_path if demo_dir_exists else None)

    plain, models, metrics = curls(next_steps(settings, "SmolLM2", 8000, has_keys=False))

    assert body(plain)["model"] == "SmolLM2"
    assert models[-1] == "http://127.0.0.1:8000/v1/models"
    assert metrics[-1] == "http://127.0.0.1:8000/metrics"


@pytest.mark.parametrize(
    ("host", "shown"),
    [("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("::1", "[::1]"), ("localhost", "localhost"), ("10.1.2.3", "10.1.2.3")],
)
def test_the_address_can_be_called(host: str, shown: str) -> None:
    lines = next_steps(Settings(host=host), "SmolLM2", 8000, has_keys=False)

    assert f"http://{shown}:8000/v1/models" in "\n".join(lines)
