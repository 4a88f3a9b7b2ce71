"""`promptmux train`: what it refuses, what it prints, and how it goes on after an interruption."""

import importlib.util
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from server.cli import app
from server.cli.output import ExitCode
from server.cli.train_progress import PlainProgress
from tests.factories import make_tokenizer, save_tiny_backbone
from tuning.records import TrainEvent


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_backbone("llama", tmp_path_factory.mktemp("tiny") / "llama")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% if not loop.last %};{% endif %}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    words = ["".join(letters) for letters in itertools.product("abcde", "xyz", "uvw")]
    return write(tmp_path / "words.jsonl", [{"text": word, "label": word[0]} for word in words])


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train(backbone: Path, out: Path, *options: str) -> Result:
    shared = ["--backbone", str(backbone), "--dtype", "float32", "--device", "cpu", "--steps", "3", "--k", "4"]
    return CliRunner().invoke(app, ["train", *shared, "--out", str(out), *options])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "there is nothing to train"),
        (["--task", "a"], "1 --task and 0 --data were given"),
        (["--task", "a", "--task", "b", "--data", "f"], "2 --task and 1 --data were given"),
        (["--tasks", "folder", "--task", "a", "--data", "f"], "--task contradicts --tasks"),
        (["--task", "a", "--data", "f", "--test", "t", "--test", "u"], "1 --task and 2 --test were given"),
        (["--task", "a", "--data", "f", "--gate-threshold", "0.5"], "--gate-threshold needs --push"),
        (["--task", "a", "--data", "f", "--no-activate"], "--no-activate needs --push"),
        (["--task", "a", "--data", "f", "--text", "nowhere"], "cannot read nowhere"),
    ],
)
def test_contradicting_options_are_wrong_usage(tmp_path: Path, options: list[str], message: str) -> None:
    result = train(tmp_path / "never loaded", tmp_path / "out", *options)
    assert (result.exit_code, message in result.stderr) == (ExitCode.USAGE, True), result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "Upper"], "'Upper' is not a task's name"),
        (["--task", "a", "--template", "none"], "a: template: the template must hold {text} exactly once"),
        (["--task", "a", "--init", "labels", "--method", "prefix_tuning"], "init: prefix_tuning starts from random"),
        (["--task", "a", "--encoder-size", "8"], "encoder_hidden_size: prompt_tuning has no encoder"),
    ],
)
def test_values_that_cannot_be_are_refused_before_the_backbone_is_loaded(
    tmp_path: Path, options: list[str], message: str
) -> None:
    result = train(tmp_path / "never loaded", tmp_path / "out", "--data", "f", *options)
    assert (result.exit_code, message in result.stderr) == (ExitCode.REFUSED, True), result.output


def test_without_peft_the_command_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find_spec(name))
    result = train(tmp_path / "never loaded", tmp_path / "out", "--task", "a", "--data", "f")
    assert result.exit_code == ExitCode.FAILED
    assert "training needs PEFT" in result.stderr
    assert "pip install 'promptmux[train]'" in result.stderr


def test_backbone_that_is_none_is_refused(tmp_path: Path, data: Path) -> None:
    result = train(tmp_path / "nowhere", tmp_path / "out", "--task", "a", "--data", str(data))
    assert result.exit_code == ExitCode.REFUSED
    assert "is not a model folder" in result.stderr


def test_all_wrong_lines_of_all_tasks_are_told(backbone: Path, tmp_path: Path) -> None:
    for name, row in (("a", {"text": "x"}), ("b", {"prompt": "x", "completion": 3})):
        write(tmp_path / f"{name}.jsonl", [row])
    result = train(backbone, tmp_path / "out", "--tasks", str(tmp_path))
    assert result.exit_code == ExitCode.REFUSED
    assert 'a.jsonl:1: has the fields "text"; write one of' in result.stderr
    assert "b.jsonl:1: completion: must be a text, found a number" in result.stderr
    assert not (tmp_path / "out").exists()


def test_finished_tasks_are_told_in_a_table_and_progress_in_lines(backbone: Path, data: Path, tmp_path: Path) -> None:
    result = train(backbone, tmp_path / "out", "--task", "letters", "--data", str(data), "--plot")

    assert result.exit_code == ExitCode.OK, result.output
    assert "letters: warning: few_virtual_tokens: 4 virtual tokens are few" in result.stderr
    assert "letters: 3 steps begin" in result.stderr
    assert "letters: step 3 of 3, validation loss " in result.stderr
    assert "letters: being tested on its held-out examples" in result.stderr
    header, row = result.stdout.splitlines()
    assert header.split()[:3] == ["task", "prompt", "kept"]
    assert row.split()[:3] == ["letters", "prompt_tuning,", "k=4"]
    assert (tmp_path / "out" / "letters" / "curves.png").is_file()


def test_json_is_all_that_is_printed(backbone: Path, data: Path, tmp_path: Path) -> None:
    result = train(backbone, tmp_path / "out", "--task", "letters", "--data", str(data), "--json")
    (told,) = json.loads(result.stdout)["tasks"]
    assert result.stderr == ""
    assert told["record"] == json.loads((tmp_path / "out/letters/training.json").read_text())
    assert (told["task"], told["failure"], told["version"]) == ("letters", None, None)


def test_chat_messages_go_through_the_backbones_template(backbone: Path, tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}]}
        for n in range(10)
    ]
    data = write(tmp_path / "chat.jsonl", rows)
    result = train(backbone, tmp_path / "out", "--task", "chat", "--data", str(data), "--json")
    assert result.exit_code == ExitCode.OK, result.output
    (told,) = json.loads(result.stdout)["tasks"]
    (answer,) = told["record"]["evaluation"]["answers"]
    assert answer["prompt"].startswith("q")
    assert answer["completion"].removeprefix(";") == f"a{answer['prompt'][1:].rstrip(';')}"


def test_what_is_there_is_not_written_over(backbone: Path, data: Path, tmp_path: Path) -> None:
    options = ["--task", "letters", "--data", str(data)]
    assert train(backbone, tmp_path / "out", *options).exit_code == ExitCode.OK
    again = train(backbone, tmp_path / "out", *options)
    assert again.exit_code == ExitCode.REFUSED
    assert "exists; remove it, or write elsewhere (--out)" in again.stderr


def test_interrupted_training_goes_on_with_resume(
    backbone: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--task", "letters", "--data", str(data), "--checkpoint-every", "1"]
    whole = train(backbone, tmp_path / "whole", *options, "--json")
    with monkeypatch.context() as patched:
        on_event = PlainProgress.on_event

        def interrupt(progress: PlainProgress, event: TrainEvent) -> None:
            on_event(progress, event)
            if event.kind == "step" and event.step == 2:
                raise KeyboardInterrupt

        patched.setattr(PlainProgress, "on_event", interrupt)
        cut = train(backbone, tmp_path / "cut", *options)
    assert cut.exit_code != ExitCode.OK
    assert "interrupted; the same command with --resume goes on from" in cut.stderr
    refused = train(backbone, tmp_path / "cut", *options)
    assert "holds a run that was not finished; go on with it (--resume)" in refused.stderr
    resumed = train(backbone, tmp_path / "cut", *options, "--resume", "--json")

    (one,), (other,) = (json.loads(result.stdout)["tasks"] for result in (whole, resumed))
    assert one["record"]["file_digest"] == other["record"]["file_digest"]


def test_changed_options_are_not_mixed_with_an_earlier_run(backbone: Path, data: Path, tmp_path: Path) -> None:
    options = ["--task", "letters", "--data", str(data)]
    assert train(backbone, tmp_path / "out", *options).exit_code == ExitCode.OK
    changed = train(backbone, tmp_path / "out", *options, "--resume", "--seed", "1")
    assert changed.exit_code == ExitCode.REFUSED
    assert "holds something else than this run's prompt" in changed.stderr


def test_push_to_nowhere_is_told_after_the_prompt_is_kept(backbone: Path, data: Path, tmp_path: Path) -> None:
    options = ["--task", "letters", "--data", str(data), "--push", "--url", "http://127.0.0.1:9"]
    result = train(backbone, tmp_path / "out", *options)
    assert result.exit_code == ExitCode.UNREACHABLE
    assert (tmp_path / "out" / "letters" / "training.json").is_file()
