"""config, version, keys and the help pages: commands that need no server."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from prompt_store.store import PromptStore
from server import __version__
from server.cli import app
from server.cli.output import ExitCode
from server.settings import Settings, flag_name


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_config_prints_every_setting_with_its_origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "promptmux.toml"
    file.write_text("max_rows = 7\n")
    monkeypatch.setenv("PROMPTMUX_PORT", "9002")

    found = json.loads(call("config", "/models/x", "--config", str(file), "--dtype", "float32", "--json").stdout)

    assert set(found) == set(Settings.model_fields)
    assert found["max_rows"] == {"value": 7, "origin": f"file {file}"}
    assert found["port"] == {"value": 9002, "origin": "environment PROMPTMUX_PORT"}
    assert found["dtype"] == {"value": "float32", "origin": "flag --dtype"}
    assert found["model"]["value"] == "/models/x"
    assert found["host"]["origin"] == "default"


def test_what_is_on_or_off_is_a_flag_without_a_value() -> None:
    switched = call("config", "--json", "--deterministic", "--no-text-cache")
    untouched = call("config", "--json")

    settings = [json.loads(result.stdout) for result in (switched, untouched)]
    assert [[found[name]["value"] for name in ("deterministic", "text_cache")] for found in settings] == [
        ["on", "off"],
        ["off", "on"],
    ]


def test_config_file_may_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "promptmux.toml"
    file.write_text("max_rows = 7\n")
    monkeypatch.setenv("PROMPTMUX_CONFIG", str(file))

    assert json.loads(call("config", "--json").stdout)["max_rows"]["value"] == 7


@pytest.mark.parametrize("command", ["config", "serve"])
def test_wrong_setting_is_wrong_usage_and_names_the_flag(command: str) -> None:
    result = call(command, "--max-rows", "0")

    assert result.exit_code == ExitCode.USAGE
    assert "max_rows (flag --max-rows)" in result.stderr


@pytest.mark.parametrize("command", ["config", "serve"])
def test_every_setting_but_the_model_has_a_flag(command: str) -> None:
    for name in set(Settings.model_fields) - {"model"}:
        result = call(command, flag_name(name), "\x00 no such value", "--config", "/does/not/exist")
        assert "No such option" not in result.stderr, name
        assert result.exit_code == ExitCode.USAGE


def test_version_prints_ours_and_torch_s() -> None:
    found = json.loads(call("version", "--json").stdout)

    assert found["promptmux"] == __version__
    assert found["torch"][0].isdigit()


def test_help_imports_nothing_slow() -> None:
    program = (
        "import sys; from server.cli import app; "
        "slow = {'torch', 'transformers', 'sqlalchemy', 'fastapi', 'uvicorn', 'numpy'} & set(sys.modules); "
        "print(slow); sys.exit(bool(slow))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr


def test_a_key_is_printed_once_and_works(tmp_path: Path) -> None:
    result = call("keys", "create", "--tenant", "acme", "--scope", "infer", "--scope", "write", "--data", str(tmp_path))
    secret = result.stdout.strip()

    assert result.exit_code == ExitCode.OK
    assert secret not in result.stderr
    with PromptStore.open(tmp_path) as store:
        key = store.verify_key(secret)
    assert key is not None
    assert (key.tenant, key.scopes) == ("acme", {"infer", "write"})
    listed = call("keys", "ls", "--data", str(tmp_path))
    assert key.id in listed.stdout
    assert secret not in listed.stdout


def test_a_revoked_key_no_longer_works(tmp_path: Path) -> None:
    made = json.loads(call("keys", "create", "--label", "laptop", "--data", str(tmp_path), "--json").stdout)

    assert call("keys", "revoke", made["id"], "--data", str(tmp_path)).exit_code == ExitCode.OK

    with PromptStore.open(tmp_path) as store:
        assert store.verify_key(made["secret"]) is None
    (listed,) = json.loads(call("keys", "ls", "--data", str(tmp_path), "--json").stdout)
    assert listed["label"] == "laptop"
    assert listed["revoked"] is not None
    assert "secret" not in listed


def test_keys_are_made_beside_a_server_that_holds_the_store(tmp_path: Path) -> None:
    with PromptStore.open(tmp_path) as store:
        secret = call("keys", "create", "--data", str(tmp_path)).stdout.strip()
        assert store.verify_key(secret) is not None


def test_revoking_what_is_not_there_is_not_found(tmp_path: Path) -> None:
    assert call("keys", "revoke", "key_none", "--data", str(tmp_path)).exit_code == ExitCode.NOT_FOUND


@pytest.mark.parametrize("option", [["--scope", "root"], ["--tenant", "../x"]])
def test_wrong_scope_or_tenant_makes_no_key(tmp_path: Path, option: list[str]) -> None:
    assert call("keys", "create", "--data", str(tmp_path), *option).exit_code == ExitCode.USAGE
    with PromptStore.open(tmp_path) as store:
        assert not store.has_keys()


def test_a_folder_that_cannot_be_a_store_is_said_plainly(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")

    result = call("keys", "create", "--data", str(tmp_path / "file"))

    assert result.exit_code == ExitCode.FAILED
    assert "--data" in result.stderr
