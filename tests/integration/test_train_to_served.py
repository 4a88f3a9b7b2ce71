"""From labelled examples to an answer: the command trains, tests and uploads; the server answers as was measured."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
from typer.testing import CliRunner, Result

from server.app import create_app
from server.cli import app as command
from server.cli.output import ExitCode
from server.settings import Settings
from tests.factories import CONFIGS, save_tiny_backbone
from tests.integration.clients.tiny_server import make_byte_tokenizer
from tests.unit.api.live_server import serving


@dataclass(frozen=True)
class Place:
    """A real server over a tiny backbone, and a folder of tasks to be trained over the same."""

    url: str
    backbone: Path
    tasks: Path
    out: Path

    def train(self, *options: str) -> Result:
        shared = ["--backbone", str(self.backbone), "--dtype", "float32", "--device", "cpu", "--out", str(self.out)]
        return CliRunner().invoke(command, ["train", *shared, "--url", self.url, "--push", *options])

    def get(self, path: str) -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(f"{self.url}{path}", timeout=60).raise_for_status().json()
        return found

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = httpx.post(f"{self.url}{path}", json=body, timeout=60).raise_for_status().json()
        return found


@pytest.fixture(scope="module")
def _quiet() -> Iterator[None]:
    """The server runs in this process: its log lines must not mix with what the command prints."""
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, _quiet: None) -> Iterator[Place]:
    root = tmp_path_factory.mktemp("served")
    backbone = save_tiny_backbone("llama", root / "tiny", config_fields=CONFIGS["llama"] | {"vocab_size": 263})
    make_byte_tokenizer().save_pretrained(backbone)
    tasks = root / "tasks"
    tasks.mkdir()
    words = ["".join(letters) for letters in itertools.product("abcde", "xyz", "uvw")]
    labelled = [{"text": word, "label": "v" if word[0] in "ae" else "o"} for word in words]
    plain = [{"prompt": f"{word} ->", "completion": f" {word[0]}"} for word in words]
    for name, rows in (("first-sound", labelled), ("first-letter", plain)):
        (tasks / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tasks / "first-letter.toml").write_text('method = "p_tuning_v2"\nnum_virtual_tokens = 6\n')
    app = create_app(
        Settings(model=str(backbone), dtype="float32", device="cpu", compile="off", data_dir=root / "data")
    )
    with serving(app) as (_, port):
        url = f"http://127.0.0.1:{port}"
        while (answer := httpx.get(f"{url}/readyz", timeout=60)).status_code != 200:
            assert answer.json()["error"]["code"] == "loading", answer.text
        yield Place(url, backbone, tasks, root / "out")


@pytest.fixture(scope="module")
def trained(place: Place) -> dict[str, dict[str, Any]]:
    """What the command tells of two tasks that it trained together, uploaded, and saw through their gates."""
    result = place.train("--tasks", str(place.tasks), "--steps", "120", "--gate-threshold", "0", "--json")
    assert result.exit_code == ExitCode.OK, result.output
    return {one["task"]: one for one in json.loads(result.stdout)["tasks"]}


def test_the_server_answers_as_was_measured(place: Place, trained: dict[str, dict[str, Any]]) -> None:
    for task, told in trained.items():
        answers = told["record"]["evaluation"]["answers"]
        body = {"model": task, "prompt": [one["prompt"] for one in answers], "max_tokens": 12, "temperature": 0}
        served = place.post("/v1/completions", body)
        for choice, one in zip(served["choices"], answers, strict=True):
            # Fewer tokens were asked for when it was measured; they may have ended inside of a character.
            assert choice["text"].startswith(one["answer"].rstrip("�"))
        assert served["prompt"]["digest"] == told["record"]["file_digest"]
        figures = told["record"]["evaluation"]
        assert figures["prompt"]["loss"] < figures["without_prompt"]["loss"]
    assert trained["first-sound"]["record"]["evaluation"]["prompt"]["exact_match"] > 0


def test_the_gate_scores_what_was_measured(place: Place, trained: dict[str, dict[str, Any]]) -> None:
    for task, told in trained.items():
        gate = place.get(f"/v1/tasks/{task}/versions/1")["gate"]
        figures = told["record"]["evaluation"]["prompt"]
        assert (gate["status"], gate["num_probes"]) == ("passed", figures["num_examples"])
        assert gate["score"] == pytest.approx(figures["exact_match"], abs=1e-6)
        assert place.get(f"/v1/tasks/{task}")["active_version"] == 1


def test_where_a_version_is_from_can_be_read(place: Place, trained: dict[str, dict[str, Any]]) -> None:
    for task, told in trained.items():
        version, record = place.get(f"/v1/tasks/{task}/versions/1"), told["record"]
        assert version["provenance"]["data_digest"] == f"sha256:{record['data']['digest']}"
        assert version["provenance"]["training_run"].startswith(f"{task}-{record['method']}-seed0-")
        training = version["metadata"]["training"]
        assert (training["method"], training["seed"]) == (record["method"], 0)
        assert training["evaluation"]["prompt"] == record["evaluation"]["prompt"]
        assert training["curve"][-1]["step"] == 120


def test_inputs_are_classified_among_the_labels_that_were_trained(
    place: Place, trained: dict[str, dict[str, Any]]
) -> None:
    found = place.post("/v1/classify", {"model": "first-sound", "input": ["axu", "bxu"]})
    assert {one["label"] for one in found["data"]} <= {"v", "o"}
    assert trained["first-sound"]["record"]["data"]["labels"] == ["o", "v"]


def test_a_gate_that_fails_fails_the_command_and_activates_nothing(place: Place) -> None:
    data = str(place.tasks / "first-sound.jsonl")
    result = place.train("--task", "strict", "--data", data, "--steps", "1", "--gate-threshold", "1")

    assert result.exit_code == ExitCode.FAILED, result.output
    assert "strict: gate failed: " in result.stderr
    assert place.get("/v1/tasks/strict")["active_version"] is None


def test_what_was_trained_before_is_pushed_without_being_trained_again(
    place: Place, trained: dict[str, dict[str, Any]]
) -> None:
    result = place.train("--tasks", str(place.tasks), "--steps", "120", "--resume")

    assert result.exit_code == ExitCode.OK, result.output
    assert "first-letter@1 was there already" in result.stderr
    assert "steps begin" not in result.stderr
