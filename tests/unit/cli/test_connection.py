"""Which server a command talks to: flag, variable, the client's file, default; and the completion of task names."""

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from server.cli import app
from server.cli.connection import client_file, complete_task, resolve_connection
from server.cli.output import ExitCode
from tests.unit.cli.task_server import TaskServer


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "own" / "client.toml"
    path.parent.mkdir()
    monkeypatch.setenv("PROMPTMUX_CLIENT_CONFIG", str(path))
    return path


def write(path: Path, content: str, mode: int = 0o600) -> None:
    path.write_text(content)
    path.chmod(mode)


def test_flag_or_variable_beats_the_file_and_the_file_beats_the_default(file: Path) -> None:
    write(file, 'url = "http://filed:1"\nkey = "filed"\n')

    assert resolve_connection("http://given:2", "given") == ("http://given:2", "given")
    assert resolve_connection(None, "given") == ("http://filed:1", "given")
    assert resolve_connection(None, None) == ("http://filed:1", "filed")


def test_without_a_file_the_address_is_this_machine_s() -> None:
    assert resolve_connection(None, None) == ("http://127.0.0.1:8000", None)


def test_the_file_s_key_is_not_sent_to_another_address(file: Path) -> None:
    write(file, 'url = "http://filed:1"\nkey = "filed"\n')

    assert resolve_connection("http://other:1", None) == ("http://other:1", None)
    assert resolve_connection("http://filed:1/", None) == ("http://filed:1/", "filed")


def test_a_command_sends_the_file_s_key_to_the_file_s_server(task_server: TaskServer, file: Path) -> None:
    task_server.key = "pm_right"
    write(file, f'url = "{task_server.url}"\nkey = "pm_right"\n')

    assert CliRunner().invoke(app, ["ls"]).exit_code == ExitCode.OK


def test_a_variable_beats_the_file(task_server: TaskServer, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(file, 'url = "http://127.0.0.1:1"\n')
    monkeypatch.setenv("PROMPTMUX_URL", task_server.url)

    assert CliRunner().invoke(app, ["ls"]).exit_code == ExitCode.OK


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('ulr = "http://x"\n', "did you mean url"),
        ('token = "x"\n', "unknown key token"),
        ("url = 3\n", "url in"),
        ("url = \n", "not valid TOML"),
        (None, "does not exist"),
    ],
)
def test_a_file_that_cannot_be_used_is_wrong_usage(file: Path, content: str | None, reason: str) -> None:
    if content is not None:
        write(file, content)

    result = CliRunner().invoke(app, ["ls"])

    assert result.exit_code == ExitCode.USAGE
    assert reason in result.stderr
    assert str(file) in result.stderr


def test_a_key_that_others_may_read_is_warned_about(task_server: TaskServer, file: Path) -> None:
    write(file, f'url = "{task_server.url}"\nkey = "pm"\n', 0o644)

    result = CliRunner().invoke(app, ["ls"])

    assert result.exit_code == ExitCode.OK
    assert f"chmod 600 {file}" in result.stderr


def test_the_file_is_looked_for_where_the_desktop_standard_says() -> None:
    assert client_file({}) == Path("~/.config/promptmux/client.toml").expanduser()
    assert client_file({"XDG_CONFIG_HOME": "/etc/xdg"}) == Path("/etc/xdg/promptmux/client.toml")
    assert client_file({"XDG_CONFIG_HOME": "/x", "PROMPTMUX_CLIENT_CONFIG": "/y.toml"}) == Path("/y.toml")


def context(**params: str) -> typer.Context:
    made = typer.Context(typer.main.get_command(app))
    made.params = params
    return made


def test_task_names_are_completed_from_the_server(task_server: TaskServer) -> None:
    for task in ("capitals", "captions", "plural"):
        task_server.add(task, b"x", b"{}")

    # The small server gives two a page; completion asks for one page alone.
    assert complete_task(context(url=task_server.url), "cap") == ["capitals", "captions"]
    assert complete_task(context(url=task_server.url), "z") == []


@pytest.mark.parametrize("refuse", [(500, {}), (200, b"<html>"), (200, {"data": 3})])
def test_completion_without_an_answer_offers_nothing(
    task_server: TaskServer, refuse: tuple[int, bytes | dict[str, object]]
) -> None:
    task_server.refuse = refuse

    assert complete_task(context(url=task_server.url), "") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "powershell"])
def test_completion_prints_the_shell_s_script(shell: str) -> None:
    result = CliRunner().invoke(app, ["completion", shell])

    assert result.exit_code == ExitCode.OK
    assert "_PROMPTMUX_COMPLETE" in result.stdout


def test_completion_for_an_unknown_shell_is_wrong_usage() -> None:
    assert CliRunner().invoke(app, ["completion", "tcsh"]).exit_code == ExitCode.USAGE
