"""Roll-out, gate, inspection, keys, quotas, audit and reload, against the real app over the echo engine."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.app import create_app
from server.cli import app
from server.cli.output import ExitCode
from server.settings import Settings
from tests.fakes import EchoServerParts
from tests.unit.api.live_server import LiveServer, serving
from tests.unit.cli.live import call, prompt_folder


@pytest.fixture
def two_versions(live: LiveServer) -> LiveServer:
    for value in (0.25, 0.75):
        assert live.upload("capitals", value).is_success
    return live


def task(live: LiveServer) -> dict[str, object]:
    found: dict[str, object] = json.loads(call(live, "show", "capitals", "--json").stdout)
    return found


def test_activate_rolls_out_and_compares_what_was_active(two_versions: LiveServer) -> None:
    assert call(two_versions, "activate", "capitals", "1").exit_code == ExitCode.OK
    assert task(two_versions)["active_version"] == 1

    lost = call(two_versions, "activate", "capitals", "2", "--expected-version", "2")
    assert lost.exit_code == ExitCode.CONFLICT
    assert task(two_versions)["active_version"] == 1
    assert call(two_versions, "activate", "capitals", "9").exit_code == ExitCode.NOT_FOUND


def test_rollback_goes_to_what_was_active_before_not_to_the_number_below(two_versions: LiveServer) -> None:
    assert two_versions.upload("capitals", 0.5, activate="false").is_success
    for version in ("1", "3"):
        assert call(two_versions, "activate", "capitals", version).exit_code == ExitCode.OK

    undone = call(two_versions, "rollback", "capitals")
    assert "version 1 is active (before: 3)" in undone.stderr
    assert json.loads(call(two_versions, "rollback", "capitals", "--json").stdout)["active_version"] == 2


def test_rollback_of_the_first_activation_has_nowhere_to_go(live: LiveServer) -> None:
    assert live.upload("capitals", 0.25).is_success

    assert call(live, "rollback", "capitals").exit_code == ExitCode.CONFLICT
    assert task(live)["active_version"] == 1


def test_a_canary_is_set_shown_and_ended(two_versions: LiveServer) -> None:
    assert call(two_versions, "canary", "capitals", "1", "10").exit_code == ExitCode.OK
    assert task(two_versions)["canary"] == {"version": 1, "percent": 10}
    assert "1 at 10 %" in call(two_versions, "ls").stdout

    assert call(two_versions, "canary", "capitals", "off").exit_code == ExitCode.OK
    assert task(two_versions)["canary"] is None


@pytest.mark.parametrize(
    "arguments",
    [("1",), ("off", "10"), ("0", "10"), ("x", "10"), ("1", "0"), ("1", "100"), ("off1",), ("9" * 5000, "10")],
)
def test_what_is_no_canary_is_wrong_usage(two_versions: LiveServer, arguments: tuple[str, ...]) -> None:
    assert call(two_versions, "canary", "capitals", *arguments).exit_code == ExitCode.USAGE
    assert task(two_versions)["canary"] is None


def test_a_full_quota_of_what_is_stored_is_not_advised_to_wait(two_versions: LiveServer, tmp_path: Path) -> None:
    assert call(two_versions, "quota", "set", "default", "--max-prompts", "2").exit_code == ExitCode.OK

    refused = call(two_versions, "push", "capitals", str(prompt_folder(tmp_path, 0.9)))

    assert refused.exit_code == ExitCode.REFUSED
    assert "its quota is 2" in refused.stderr
    assert "try: waiting does not help" in refused.stderr


def test_a_damaged_file_is_not_advised_to_wait_for(two_versions: LiveServer, tmp_path: Path) -> None:
    digest = json.loads(call(two_versions, "show", "capitals", "--json").stdout)["versions"][0]["digest"]
    blob = next(path for path in (tmp_path / "data").rglob(f"{digest}*") if path.is_file())
    blob.chmod(0o600)
    blob.write_bytes(blob.read_bytes()[:-1] + b"\xff")

    failed = call(two_versions, "pull", "capitals", str(tmp_path / "pulled"))

    assert failed.exit_code == ExitCode.FAILED
    assert "HTTP 503" in failed.stderr
    assert "try: waiting does not help: the stored file is damaged" in failed.stderr


def test_pin_and_unpin(two_versions: LiveServer) -> None:
    assert call(two_versions, "pin", "capitals").exit_code == ExitCode.OK
    assert task(two_versions)["pinned"] is True
    assert json.loads(call(two_versions, "unpin", "capitals", "--json").stdout)["pinned"] is False


def test_rm_takes_one_version_away_but_not_the_active_one(two_versions: LiveServer) -> None:
    assert call(two_versions, "rm", "capitals@2", "--yes").exit_code == ExitCode.CONFLICT
    assert call(two_versions, "rm", "capitals@1", "--yes").exit_code == ExitCode.OK
    assert [item["version"] for item in task(two_versions)["versions"]] == [2]  # type: ignore[attr-defined]


def write_probes(folder: Path, *pairs: tuple[str, str]) -> Path:
    file = folder / "probes.jsonl"
    file.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs))
    return file


def test_push_waits_for_a_gate_that_passes_and_keeps_where_the_prompt_is_from(live: LiveServer, tmp_path: Path) -> None:
    # What the echo engine says begins with the version and goes on with the text.
    probes = write_probes(tmp_path, ("France", "[capitals@1]France"))
    options = ["--probes", str(probes), "--gate", "1", "--training-run", "run-7", "--data-digest", "abc"]

    result = call(live, "push", "capitals", str(prompt_folder(tmp_path, 0.5)), *options)

    assert result.exit_code == ExitCode.OK, result.output
    assert "gate passed: 1.000 of 1 probes, 1.0 needed; capitals@1 is active" in result.stderr
    (version,) = task(live)["versions"]  # type: ignore[misc]
    assert (version["provenance"]["training_run"], version["provenance"]["data_digest"]) == ("run-7", "abc")
    assert "run-7" in call(live, "show", "capitals").stdout


def test_push_fails_when_its_gate_does_and_the_version_is_not_active(live: LiveServer, tmp_path: Path) -> None:
    probes = write_probes(tmp_path, ("France", "Paris"), ("Italy", "Rome"))

    folder = prompt_folder(tmp_path, 0.5)
    result = call(live, "push", "capitals", str(folder), "--probes", str(probes), "--gate", "0.5", "--json")

    assert result.exit_code == ExitCode.FAILED
    found = json.loads(result.stdout)
    assert (found["gate"]["status"], found["gate"]["score"]) == ("failed", 0.0)
    assert "gate failed: 0.000 of 2 probes, 0.5 needed" in result.stderr
    assert task(live)["active_version"] is None


def test_push_without_waiting_says_where_to_look(live: LiveServer, tmp_path: Path) -> None:
    probes = write_probes(tmp_path, ("France", "Paris"))
    folder = prompt_folder(tmp_path, 0.5)

    result = call(live, "push", "capitals", str(folder), "--probes", str(probes), "--gate", "1", "--no-wait")

    assert result.exit_code == ExitCode.OK
    assert "promptmux show capitals" in result.stderr


def test_a_gate_without_probes_is_wrong_usage(live: LiveServer, tmp_path: Path) -> None:
    folder = prompt_folder(tmp_path, 0.5)

    assert call(live, "push", "capitals", str(folder), "--gate", "1").exit_code == ExitCode.USAGE
    missing = call(live, "push", "capitals", str(folder), "--gate", "1", "--probes", str(tmp_path / "none"))
    assert missing.exit_code == ExitCode.USAGE


def test_inspect_shows_each_virtual_token_and_the_distance_to_another_version(two_versions: LiveServer) -> None:
    shown = call(two_versions, "inspect", "capitals", "--top", "2", "--against", "1")
    found = json.loads(call(two_versions, "inspect", "capitals@1", "--top", "3", "--json").stdout)

    assert shown.exit_code == ExitCode.OK, shown.output
    assert "against version 1" in shown.stderr
    assert sum(line.startswith("virtual token") for line in shown.stdout.splitlines()) == 2
    assert found["version"] == 1
    assert [len(vector["nearest"]) for vector in found["vectors"]] == [3] * 4


def test_compare_shows_where_two_versions_differ(two_versions: LiveServer, tmp_path: Path) -> None:
    file = write_probes(tmp_path, ("France", "Paris"), ("Italy", "Rome"))

    shown = call(two_versions, "compare", "capitals", "1", "2", "--inputs", str(file))
    bare = call(two_versions, "compare", "capitals", "backbone", "2", "--inputs", str(file), "--json")

    assert shown.exit_code == ExitCode.OK, shown.output
    assert "'[capitals@1]France'" in shown.stdout
    assert "'[capitals@2]France'" in shown.stdout
    assert json.loads(bare.stdout)["versions"][0] is None


@pytest.mark.parametrize("version", ["0", "x", "", "-1", "9" * 5000])
@pytest.mark.parametrize("command", ["inspect", "rm", "check"])
def test_what_is_no_version_is_told_before_anything_is_done(
    two_versions: LiveServer, command: str, version: str
) -> None:
    done = call(two_versions, command, f"capitals@{version}")
    assert done.exit_code in (ExitCode.USAGE, ExitCode.REFUSED), done.stderr
    assert "error: " in done.stderr
    assert len(done.stderr) < 300 or command == "check"


def test_compare_without_inputs_needs_probes(two_versions: LiveServer) -> None:
    result = call(two_versions, "compare", "capitals", "1", "2")

    assert result.exit_code == ExitCode.REFUSED
    assert "probes" in result.stderr


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no inputs"),
        (b"\n \n", "no inputs"),
        (b"\xff", "not UTF-8"),
        (b'{"prompt": "a"}\n{"text": "b"}\n', "line 2"),
        (b'{"prompt": ""}\n', "line 1"),
        (b'{"prompt": "a", "completion": 3}\n', "line 1"),
        (b"{not json\n", "line 1"),
    ],
)
def test_a_file_without_inputs_is_wrong_usage(
    two_versions: LiveServer, tmp_path: Path, content: bytes, reason: str
) -> None:
    file = tmp_path / "inputs"
    file.write_bytes(content)

    result = call(two_versions, "compare", "capitals", "1", "2", "--inputs", str(file))

    assert result.exit_code == ExitCode.USAGE
    assert reason in result.stderr


def test_plain_lines_are_inputs_as_they_are(two_versions: LiveServer, tmp_path: Path) -> None:
    file = tmp_path / "inputs"
    file.write_text("France ->\r\n\n[Italy]\n")

    found = json.loads(call(two_versions, "compare", "capitals", "1", "2", "--inputs", str(file), "--json").stdout)

    assert [item["prompt"] for item in found["differences"]] == ["France ->", "[Italy]"]


def test_keys_are_made_listed_and_revoked_over_http(live: LiveServer) -> None:
    first = call(live, "keys", "create", "--scope", "admin", "--scope", "infer", "--label", "operator")
    admin = first.stdout.strip()
    made = json.loads(
        call(live, "keys", "create", "--tenant", "acme", "--scope", "infer", "--key", admin, "--json").stdout
    )

    assert first.exit_code == ExitCode.OK
    assert call(live, "ls").exit_code == ExitCode.DENIED
    assert call(live, "ls", "--key", made["secret"]).exit_code == ExitCode.OK
    assert call(live, "keys", "ls", "--key", made["secret"]).exit_code == ExitCode.DENIED
    listed = call(live, "keys", "ls", "--key", admin)
    assert made["id"] in listed.stdout
    assert made["secret"] not in listed.output
    assert call(live, "keys", "revoke", made["id"], "--key", admin).exit_code == ExitCode.OK
    assert call(live, "ls", "--key", made["secret"]).exit_code == ExitCode.DENIED


@pytest.mark.parametrize("arguments", [("ls",), ("revoke", "key_1")])
def test_a_folder_without_a_store_has_no_keys_and_none_is_made(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = CliRunner().invoke(app, ["keys", *arguments, "--data", str(tmp_path / "mistyped")])
    assert (done.exit_code, list(tmp_path.iterdir())) == (ExitCode.NOT_FOUND, [])
    assert "there is no store" in done.stderr


def test_the_last_admin_key_is_revoked_by_force_alone(live: LiveServer) -> None:
    made = json.loads(call(live, "keys", "create", "--scope", "admin", "--json").stdout)

    assert call(live, "keys", "revoke", made["id"], "--key", made["secret"]).exit_code == ExitCode.CONFLICT
    assert call(live, "keys", "revoke", made["id"], "--key", made["secret"], "--force").exit_code == ExitCode.OK


def test_a_server_s_first_key_must_be_its_admin_s(live: LiveServer) -> None:
    result = call(live, "keys", "create", "--scope", "infer")

    assert result.exit_code == ExitCode.REFUSED
    assert "admin" in result.stderr


def test_limits_that_are_not_given_stay(live: LiveServer) -> None:
    assert call(live, "quota", "set", "acme", "--requests-per-minute", "600").exit_code == ExitCode.OK
    assert call(live, "quota", "set", "acme", "--max-prompts", "7").exit_code == ExitCode.OK
    found = json.loads(call(live, "quota", "show", "acme", "--json").stdout)
    assert (found["requests_per_minute"], found["max_prompts"]) == (600, 7)

    assert call(live, "quota", "set", "acme", "--requests-per-minute", "none").exit_code == ExitCode.OK
    shown = [line.split()[:2] for line in call(live, "quota", "show", "acme").stdout.splitlines()]
    assert ["requests_per_minute", "none"] in shown
    assert ["max_prompts", "7"] in shown
    assert "0 of 7" in next(line for line in call(live, "quota", "ls").stdout.splitlines() if line.startswith("acme"))


def test_the_own_tenant_s_limits_need_no_name(live: LiveServer) -> None:
    assert json.loads(call(live, "quota", "show", "--json").stdout)["tenant"] == "default"


@pytest.mark.parametrize(
    "arguments", [(), ("--max-prompts", "many"), ("--max-prompts", "-1"), ("--max-prompts", "9" * 5000)]
)
def test_what_is_no_limit_is_wrong_usage(live: LiveServer, arguments: tuple[str, ...]) -> None:
    assert call(live, "quota", "set", "acme", *arguments).exit_code == ExitCode.USAGE


def test_audit_prints_changes_as_json_lines_page_by_page(two_versions: LiveServer) -> None:
    lines = [json.loads(line) for line in call(two_versions, "audit", "--task", "capitals").stdout.splitlines()]
    first = json.loads(call(two_versions, "audit", "--limit", "1").stdout)
    rest = [json.loads(line) for line in call(two_versions, "audit", "--after", str(first["id"])).stdout.splitlines()]

    assert {line["task"] for line in lines} == {"capitals"}
    assert [line["id"] for line in [first, *rest]] == [line["id"] for line in lines]


def test_audit_tells_which_digest_answered_a_request(two_versions: LiveServer) -> None:
    answer = two_versions.post({"model": "capitals", "prompt": "x"}, headers={"x-request-id": "my-request"})
    options = ["audit", "--receipts", "--request-id", "my-request"]
    two_versions.wait_until(lambda: call(two_versions, *options).stdout != "")

    (receipt,) = [json.loads(line) for line in call(two_versions, *options).stdout.splitlines()]

    assert receipt["digest"] == answer.json()["prompt"]["digest"]


def test_changes_have_no_request_id(live: LiveServer) -> None:
    assert call(live, "audit", "--request-id", "x").exit_code == ExitCode.USAGE


@pytest.mark.usefixtures("_quiet")
def test_reload_says_what_is_in_force_and_what_needs_a_restart(tmp_path: Path) -> None:
    old = Settings(data_dir=tmp_path / "data")
    new = old.model_copy(update={"default_max_prompts": 9, "max_rows": old.max_rows + 1})
    parts = EchoServerParts()
    made = create_app(old, load_backbone=parts.load_backbone, make_engine=parts.make_engine, read_settings=lambda: new)
    with serving(made) as (server, port):
        live = LiveServer(server, parts, made.state.runtime, port)
        live.wait_until(lambda: live.runtime.state == "ready")
        result = call(live, "reload")

    assert result.exit_code == ExitCode.OK
    assert "in force now: default_max_prompts" in result.stderr
    assert "after a restart only: max_rows" in result.stderr


def test_reload_without_a_change_says_so(live: LiveServer) -> None:
    assert "nothing has changed" in call(live, "reload").stderr


def test_every_command_that_talks_to_a_server_takes_its_address_and_a_key() -> None:
    local = {"serve", "config", "migrate", "backbone", "version", "completion"}
    for name in sorted({command.callback.__name__ for command in app.registered_commands if command.callback} - local):
        shown = CliRunner().invoke(app, [name, "--help"]).output
        assert "--url" in shown, name
        assert "--key" in shown, name
