"""push, ls, show, rollback, rm and pull against a server on a real socket: results, exit codes, advice."""

import json
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from server.cli import app
from server.cli.output import ExitCode
from tests.unit.cli.task_server import TaskServer

FILE, CONFIG = b"tensor bytes", b'{"peft_type": "PROMPT_TUNING"}'


@pytest.fixture
def prompt_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "prompt"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(FILE)
    (folder / "adapter_config.json").write_bytes(CONFIG)
    return folder


def call(server: TaskServer | str, *arguments: str, text: str | None = None) -> Result:
    url = server if isinstance(server, str) else server.url
    return CliRunner().invoke(app, [*arguments, "--url", url], input=text)


def test_push_uploads_the_bytes_of_the_folder(task_server: TaskServer, prompt_folder: Path) -> None:
    result = call(task_server, "push", "capitals", str(prompt_folder))

    assert result.exit_code == ExitCode.OK
    assert task_server.files["capitals/1"] == (FILE, CONFIG)
    assert task_server.fields == {"activate": "true"}
    assert "capitals@1 is new" in result.stderr
    assert "warning: few virtual tokens" in result.stderr


def test_push_passes_its_options_on_as_form_fields(task_server: TaskServer, prompt_folder: Path) -> None:
    options = ["--no-activate", "--expected-version", "0", "--task-index", "2", "--metadata", '{"run": 12}']
    result = call(task_server, "push", "capitals", str(prompt_folder), *options, "--json")

    assert result.exit_code == ExitCode.OK
    assert json.loads(result.stdout)["version"] == 1
    assert task_server.fields == {
        "activate": "false",
        "expected_version": "0",
        "task_index": "2",
        "metadata": '{"run": 12}',
    }


@pytest.mark.parametrize("metadata", ["{", "[1]", "7"])
def test_push_refuses_metadata_that_is_no_object(task_server: TaskServer, prompt_folder: Path, metadata: str) -> None:
    result = call(task_server, "push", "capitals", str(prompt_folder), "--metadata", metadata)

    assert result.exit_code == ExitCode.USAGE
    assert not task_server.requests


def test_push_of_a_folder_without_a_prompt_says_what_is_missing(task_server: TaskServer, tmp_path: Path) -> None:
    result = call(task_server, "push", "capitals", str(tmp_path))

    assert result.exit_code == ExitCode.USAGE
    assert "adapter_model.safetensors does not exist" in result.stderr
    assert not task_server.requests


def test_ls_reads_all_pages(task_server: TaskServer) -> None:
    for task in ("a", "b", "c", "d", "e"):
        task_server.add(task, FILE, CONFIG)

    result = call(task_server, "ls", "--json")

    assert [item["task"] for item in json.loads(result.stdout)] == ["a", "b", "c", "d", "e"]


def test_ls_prints_one_line_a_task(task_server: TaskServer) -> None:
    task_server.add("capitals", FILE, CONFIG)
    task_server.add("idle", FILE, CONFIG, activate=False)

    lines = call(task_server, "ls").stdout.splitlines()

    assert lines[0].split() == ["task", "tenant", "active", "canary", "versions", "pinned", "created"]
    assert lines[1].split()[:6] == ["capitals", "default", "1", "-", "1", "no"]
    assert lines[2].split()[:5] == ["idle", "default", "-", "-", "1"]


def test_ls_without_tasks_says_what_to_do(task_server: TaskServer) -> None:
    result = call(task_server, "ls")

    assert result.exit_code == ExitCode.OK
    assert result.stdout == ""
    assert "promptmux push" in result.stderr


def test_show_lists_every_version(task_server: TaskServer) -> None:
    for _ in range(3):
        task_server.add("capitals", FILE, CONFIG)

    found = json.loads(call(task_server, "show", "capitals", "--json").stdout)
    table = call(task_server, "show", "capitals").stdout

    assert found["active_version"] == 3
    assert [item["version"] for item in found["versions"]] == [3, 2, 1]
    assert len(table.splitlines()) == 4


def test_rollback_goes_to_the_named_version(task_server: TaskServer) -> None:
    for _ in range(3):
        task_server.add("capitals", FILE, CONFIG)

    assert call(task_server, "rollback", "capitals", "2").exit_code == ExitCode.OK
    assert task_server.active("capitals") == 2


def test_rm_asks_first(task_server: TaskServer) -> None:
    task_server.add("capitals", FILE, CONFIG)

    assert call(task_server, "rm", "capitals", text="n\n").exit_code == ExitCode.FAILED
    assert "capitals" in task_server.tasks
    assert call(task_server, "rm", "capitals", text="y\n").exit_code == ExitCode.OK
    assert "capitals" not in task_server.tasks


@pytest.mark.parametrize(("reference", "expected"), [("capitals", b"second"), ("capitals@1", b"first")])
def test_pull_writes_what_was_uploaded(
    task_server: TaskServer, tmp_path: Path, reference: str, expected: bytes
) -> None:
    task_server.add("capitals", b"first", CONFIG)
    task_server.add("capitals", b"second", CONFIG)

    result = call(task_server, "pull", reference, str(tmp_path / "new" / "folder"))

    assert result.exit_code == ExitCode.OK
    assert (tmp_path / "new/folder/adapter_model.safetensors").read_bytes() == expected
    assert (tmp_path / "new/folder/adapter_config.json").read_bytes() == CONFIG
    assert len(list((tmp_path / "new/folder").iterdir())) == 2


def test_pull_of_changed_bytes_writes_nothing(task_server: TaskServer, tmp_path: Path) -> None:
    task_server.add("capitals", FILE, CONFIG)
    task_server.files["capitals/1"] = (b"other bytes", CONFIG)

    result = call(task_server, "pull", "capitals", str(tmp_path / "new"))

    assert result.exit_code == ExitCode.FAILED
    assert "digest" in result.stderr
    assert not (tmp_path / "new").exists()


def test_pull_writes_over_nothing_unless_told_to(task_server: TaskServer, prompt_folder: Path) -> None:
    task_server.add("capitals", b"newer", CONFIG)

    assert call(task_server, "pull", "capitals", str(prompt_folder)).exit_code == ExitCode.USAGE
    assert (prompt_folder / "adapter_model.safetensors").read_bytes() == FILE
    assert call(task_server, "pull", "capitals", str(prompt_folder), "--force").exit_code == ExitCode.OK
    assert (prompt_folder / "adapter_model.safetensors").read_bytes() == b"newer"


@pytest.mark.parametrize("reference", ["capitals@", "capitals@x", "capitals@-1", "capitals@0", "capitals@²"])
def test_pull_refuses_what_is_no_version_number(task_server: TaskServer, tmp_path: Path, reference: str) -> None:
    assert call(task_server, "pull", reference, str(tmp_path / "new")).exit_code == ExitCode.USAGE
    assert not task_server.requests


def test_key_comes_from_the_flag_or_the_environment(task_server: TaskServer, monkeypatch: pytest.MonkeyPatch) -> None:
    task_server.key = "pm_right"

    refused = call(task_server, "ls")
    assert refused.exit_code == ExitCode.DENIED
    assert "PROMPTMUX_KEY" in refused.stderr
    assert call(task_server, "ls", "--key", "pm_right").exit_code == ExitCode.OK
    monkeypatch.setenv("PROMPTMUX_KEY", "pm_right")
    assert call(task_server, "ls").exit_code == ExitCode.OK


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, ExitCode.REFUSED),
        (401, ExitCode.DENIED),
        (403, ExitCode.DENIED),
        (404, ExitCode.NOT_FOUND),
        (408, ExitCode.BUSY),
        (409, ExitCode.CONFLICT),
        (413, ExitCode.REFUSED),
        (415, ExitCode.REFUSED),
        (422, ExitCode.REFUSED),
        (429, ExitCode.BUSY),
        (500, ExitCode.FAILED),
        (503, ExitCode.BUSY),
        (507, ExitCode.FAILED),
    ],
)
def test_each_status_has_its_exit_code_and_advice(task_server: TaskServer, status: int, code: ExitCode) -> None:
    task_server.refuse = (status, {"error": {"message": "what is wrong", "type": "t", "param": "file", "code": "c"}})

    result = call(task_server, "show", "capitals")

    assert result.exit_code == code
    assert f"what is wrong (field file) (HTTP {status})" in result.stderr
    assert "try: " in result.stderr
    assert ("[request req-7]" in result.stderr) == (status >= 500)


@pytest.mark.parametrize("body", [b"<html>", {"no": "data"}, {"data": ["x"]}, {"data": [{"id": 1}]}])
def test_another_server_at_the_address_is_noticed(task_server: TaskServer, body: bytes | dict[str, object]) -> None:
    task_server.refuse = (200, body)

    result = call(task_server, "ls")

    assert result.exit_code == ExitCode.UNREACHABLE
    assert "not as a promptmux server" in result.stderr


def test_an_error_page_of_a_proxy_is_reported_by_its_status(task_server: TaskServer) -> None:
    task_server.refuse = (502, b"<html>bad gateway</html>")

    result = call(task_server, "ls")

    assert result.exit_code == ExitCode.FAILED
    assert "HTTP 502" in result.stderr


def test_no_server_is_said_plainly() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        result = call(f"http://127.0.0.1:{taken.getsockname()[1]}", "ls")

    assert result.exit_code == ExitCode.UNREACHABLE
    assert "promptmux serve" in result.stderr


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "", "http://x:port"])
def test_an_address_that_is_none_is_wrong_usage(url: str) -> None:
    result = call(url, "ls")

    assert result.exit_code == ExitCode.USAGE
    assert "--url http://" in result.stderr


def test_a_name_with_a_slash_stays_one_segment(task_server: TaskServer) -> None:
    assert call(task_server, "show", "../keys?x=1").exit_code == ExitCode.NOT_FOUND
    assert task_server.requests == [("GET", "/v1/tasks/..%2Fkeys%3Fx%3D1")]


def test_text_from_the_server_cannot_drive_the_terminal(task_server: TaskServer) -> None:
    task_server.refuse = (404, {"error": {"message": "[bold]x[/bold] \x1b[2J\x07", "param": None}})

    shown = call(task_server, "show", "capitals").stderr

    assert "[bold]x[/bold] \\x1b[2J\\x07" in shown
    assert "\x1b[2J" not in shown
