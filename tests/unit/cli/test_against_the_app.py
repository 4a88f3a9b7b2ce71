"""The commands and the drain against the real app, its runtime and its store; only the model is the echo engine."""

import json
import signal
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from server.cli import app, http_client
from server.cli.output import ExitCode
from tests.fakes import make_prompt_file
from tests.unit.api.live_server import LiveServer
from tests.unit.cli.live import call, prompt_folder
from tests.unit.cli.processes import END_TIMEOUT_S, StartProcess, wait_until_draining


def test_a_prompt_goes_all_the_way_round(live: LiveServer, tmp_path: Path) -> None:
    first, second = prompt_folder(tmp_path, 0.25), prompt_folder(tmp_path, 0.75)
    assert call(live, "push", "capitals", str(first)).exit_code == ExitCode.OK
    assert call(live, "push", "capitals", str(second)).exit_code == ExitCode.OK
    again = json.loads(call(live, "push", "capitals", str(second), "--json").stdout)
    assert (again["version"], again["was_new"]) == (2, False)

    (listed,) = json.loads(call(live, "ls", "--json").stdout)
    assert (listed["task"], listed["active_version"], listed["num_versions"]) == ("capitals", 2, 2)

    assert call(live, "rollback", "capitals").exit_code == ExitCode.OK
    shown = json.loads(call(live, "show", "capitals", "--json").stdout)
    assert shown["active_version"] == 1
    assert {item["version"]: item["state"] for item in shown["versions"]} == {1: "active", 2: "inactive"}

    for reference, source in (("capitals", first), ("capitals@2", second)):
        copy = tmp_path / f"copy of {reference}"
        assert call(live, "pull", reference, str(copy)).exit_code == ExitCode.OK
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            assert (copy / name).read_bytes() == (source / name).read_bytes()

    assert call(live, "rm", "capitals", "--yes").exit_code == ExitCode.OK
    assert call(live, "show", "capitals").exit_code == ExitCode.NOT_FOUND


def test_ls_and_show_read_more_than_one_page(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "_PAGE", 2)
    for number in range(5):
        assert live.upload("many", number / 8).is_success
        assert live.upload(f"task-{number}").is_success

    assert len(json.loads(call(live, "ls", "--json").stdout)) == 6
    versions = json.loads(call(live, "show", "many", "--json").stdout)["versions"]
    assert sorted(item["version"] for item in versions) == [1, 2, 3, 4, 5]


def test_a_prompt_of_another_backbone_is_refused_with_both_shapes(live: LiveServer, tmp_path: Path) -> None:
    folder = prompt_folder(tmp_path, 0.5)
    (folder / "adapter_model.safetensors").write_bytes(make_prompt_file(0.5, hidden_size=12))

    result = call(live, "push", "capitals", str(folder))

    assert result.exit_code == ExitCode.REFUSED
    assert "12" in result.stderr
    assert "8" in result.stderr


def test_a_lost_compare_and_swap_is_a_conflict(live: LiveServer, tmp_path: Path) -> None:
    folder = prompt_folder(tmp_path, 0.5)
    assert call(live, "push", "capitals", str(folder), "--expected-version", "0").exit_code == ExitCode.OK

    other = prompt_folder(tmp_path, 0.75)
    assert call(live, "push", "capitals", str(other), "--expected-version", "0").exit_code == ExitCode.CONFLICT


def test_a_key_made_beside_the_server_closes_it_and_opens_it(live: LiveServer, tmp_path: Path) -> None:
    made = CliRunner().invoke(app, ["keys", "create", "--scope", "infer", "--data", str(tmp_path / "data"), "--json"])
    key = json.loads(made.stdout)["secret"]

    live.wait_until(lambda: call(live, "ls").exit_code == ExitCode.DENIED)
    assert call(live, "ls", "--key", key).exit_code == ExitCode.OK
    folder = prompt_folder(tmp_path, 0.5)
    assert call(live, "push", "capitals", str(folder), "--key", key).exit_code == ExitCode.DENIED


def stream_body(max_tokens: int) -> dict[str, object]:
    return {"model": "echo", "prompt": "x" * 40, "max_tokens": max_tokens, "ignore_eos": True, "stream": True}


def backbone_name(url: str) -> str:
    name: str = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
    return name


def test_a_completion_finishes_through_the_drain(start_process: StartProcess, tmp_path: Path) -> None:
    process, url = start_process("tests.unit.cli.echo_app", str(tmp_path), "30")
    body = stream_body(100) | {"model": backbone_name(url)}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=END_TIMEOUT_S) as stream:
        lines = (line for line in stream.iter_lines() if line)
        chunks = [json.loads(next(lines).removeprefix("data: "))]
        process.send_signal(signal.SIGTERM)
        wait_until_draining(url)
        refused = httpx.post(f"{url}/v1/completions", json=body | {"stream": False})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "draining"
        rest = list(lines)

    assert rest[-1] == "data: [DONE]"
    chunks += [json.loads(line.removeprefix("data: ")) for line in rest[:-1]]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert process.wait(END_TIMEOUT_S) == 0


def test_a_completion_that_outlasts_the_drain_ends_with_the_error_event(
    start_process: StartProcess, tmp_path: Path
) -> None:
    process, url = start_process("tests.unit.cli.echo_app", str(tmp_path), "0.3")
    body = stream_body(3000) | {"model": backbone_name(url)}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=END_TIMEOUT_S) as stream:
        lines = (line for line in stream.iter_lines() if line)
        next(lines)
        process.send_signal(signal.SIGTERM)
        rest = list(lines)

    assert rest[-4] == "event: error"
    assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "draining"
    assert rest[-1] == "data: [DONE]"
    assert process.wait(END_TIMEOUT_S) == 0


def test_an_engine_that_fails_ends_its_streams_and_then_the_process(
    start_process: StartProcess, tmp_path: Path
) -> None:
    process, url = start_process("tests.unit.cli.echo_app", str(tmp_path), "30")
    body = stream_body(3000) | {"model": backbone_name(url)}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=END_TIMEOUT_S) as stream:
        lines = (line for line in stream.iter_lines() if line)
        next(lines)
        process.send_signal(signal.SIGUSR1)
        rest = list(lines)
    alive = httpx.get(f"{url}/livez")

    assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "engine_failed"
    assert rest[-1] == "data: [DONE]"
    assert (alive.status_code, alive.json()["error"]["code"]) == (503, "engine_failed")
    assert process.wait(END_TIMEOUT_S) == ExitCode.FAILED
