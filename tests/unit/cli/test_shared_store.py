"""Commands on a store in PostgreSQL: keys, migrate, doctor, and what `config` shows of its URL."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from prompt_store.store import PromptStore
from server.cli import app
from server.cli.output import ExitCode
from server.doctor.storage import check_port, check_store
from server.settings import Settings
from tests.postgresql import PostgresServer
from tests.unit.prompt_store.prompt_files import BACKBONE, flip_bit, put, tamper

NOWHERE = "postgresql://u:hunter2@/db?host=/nowhere"


@pytest.fixture
def url(postgres: PostgresServer) -> Iterator[str]:
    with postgres.database() as made:
        yield made


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def fill(folder: Path) -> str:
    with PromptStore.open(folder, backbone=BACKBONE) as store:
        put(store, 1)
        put(store, 2)
        return store.create_key("acme", {"infer"})[1]


def test_store_is_moved_to_postgresql_and_back(tmp_path: Path, url: str) -> None:
    secret = fill(tmp_path / "old")
    there = call("migrate", "--from", str(tmp_path / "old"), "--to", url)
    assert there.exit_code == ExitCode.OK, there.stderr
    assert "every digest was verified" in there.stderr
    back = call("migrate", "--from", url, "--to", str(tmp_path / "new"), "--json")
    assert back.exit_code == ExitCode.OK
    told = json.loads(back.stdout)
    assert (told["rows"]["versions"], told["blobs"], told["damaged"]) == (2, 3, [])
    for location in (url, tmp_path / "new"):
        with PromptStore.open(location, backbone=BACKBONE) as store:
            assert store.resolve("acme", "task").version == 2
            assert store.verify_key(secret) is not None
            store.check_invariants()


def test_moves_that_cannot_be_are_refused_with_a_reason(tmp_path: Path, url: str) -> None:
    fill(tmp_path / "old")
    old = str(tmp_path / "old")
    assert call("migrate", "--from", old, "--to", old).exit_code == ExitCode.USAGE
    assert call("migrate", "--from", old, "--to", "mysql://u:hunter2@h/db").exit_code == ExitCode.USAGE
    away = call("migrate", "--from", old, "--to", NOWHERE)
    assert away.exit_code == ExitCode.UNREACHABLE
    assert "hunter2" not in away.output + away.stderr
    with PromptStore.open(tmp_path / "old", backbone=BACKBONE) as store:
        assert call("migrate", "--from", old, "--to", url).exit_code == ExitCode.BUSY
        tamper(store, store.resolve("acme", "task").digest, flip_bit)
    damaged = call("migrate", "--from", old, "--to", url)
    assert damaged.exit_code == ExitCode.FAILED
    assert "Nothing was copied" in damaged.stderr
    assert "task@2 of acme" in damaged.stderr
    with PromptStore.open(tmp_path / "old", backbone=BACKBONE) as store:
        tamper(store, store.resolve("acme", "task").digest, flip_bit)
    assert call("migrate", "--from", old, "--to", url).exit_code == ExitCode.OK
    again = call("migrate", "--from", old, "--to", url)
    assert again.exit_code == ExitCode.USAGE
    assert "not empty" in again.stderr


def test_folder_without_a_store_is_not_taken_for_an_empty_one(tmp_path: Path, url: str) -> None:
    missing = call("migrate", "--from", str(tmp_path / "typo"), "--to", url)
    assert missing.exit_code == ExitCode.NOT_FOUND
    assert not (tmp_path / "typo").exists()


def test_keys_are_made_listed_and_revoked_in_the_database(url: str) -> None:
    made = json.loads(call("keys", "create", "--tenant", "acme", "--data", url, "--json").stdout)
    with PromptStore.open(url) as store:
        assert store.verify_key(made["secret"]) is not None
        assert [key["id"] for key in json.loads(call("keys", "ls", "--data", url, "--json").stdout)] == [made["id"]]
        assert call("keys", "revoke", made["id"], "--data", url).exit_code == ExitCode.OK
        assert store.verify_key(made["secret"]) is None
    unknown = call("keys", "revoke", "key_none", "--data", url.replace("promptmux@", "promptmux:hunter2@"))
    assert unknown.exit_code == ExitCode.NOT_FOUND
    assert "hunter2" not in unknown.stderr
    assert call("keys", "ls", "--data", NOWHERE).exit_code == ExitCode.UNREACHABLE


def test_password_of_the_store_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMPTMUX_STORE", "postgresql://u:hunter2@db.example/prompts?sslmode=require")
    for arguments in (["config"], ["config", "--json"]):
        shown = call(*arguments)
        assert "hunter2" not in shown.output
        assert "postgresql://u:***@db.example/prompts?sslmode=require" in shown.output
    settings = Settings.model_validate({"store": "postgresql://u:hunter2@db.example/prompts"})
    assert "hunter2" not in f"{settings} {settings!r} {settings.model_dump_json()}"
    assert settings.store_location == "postgresql://u:hunter2@db.example/prompts"
    wrong = call("config", "--store", "mysql://u:hunter2@db.example/prompts")
    assert wrong.exit_code == ExitCode.USAGE
    assert "hunter2" not in wrong.output + wrong.stderr


def test_serving_other_machines_needs_a_key_in_the_database(url: str, tmp_path: Path) -> None:
    refused = call("serve", "--host", "0.0.0.0", "--port", "0", "--store", url, "--data-dir", str(tmp_path))
    assert refused.exit_code == ExitCode.DENIED
    assert "promptmux keys create" in refused.stderr
    away = call("serve", "--host", "0.0.0.0", "--port", "0", "--store", NOWHERE, "--data-dir", str(tmp_path))
    assert away.exit_code == ExitCode.FAILED
    assert "hunter2" not in away.stderr


def test_doctor_looks_at_the_database(url: str, tmp_path: Path) -> None:
    settings = Settings.model_validate({"store": url, "data_dir": tmp_path, "host": "0.0.0.0", "port": 0})
    (store, answer) = check_store(settings)
    assert (store.status, "empty" in store.detail, answer.name) == ("ok", True, "store's answer")
    assert next(iter(check_port(settings))).status == "wrong"
    with PromptStore.open(url) as opened:
        opened.create_key("acme", {"infer"})
    assert "revision" in next(iter(check_store(settings))).detail
    assert next(iter(check_port(settings))).status == "ok"
    (away,) = check_store(Settings.model_validate({"store": NOWHERE}))
    assert away.status == "wrong"
    assert "hunter2" not in away.detail


def test_doctor_knows_a_database_of_another_release(url: str, postgres: PostgresServer) -> None:
    settings = Settings.model_validate({"store": url})
    PromptStore.open(url).close()
    name = url.partition("@/")[2].partition("?")[0]
    for revision, status in (("0001", "ok"), ("9999", "wrong")):
        postgres.execute(f"UPDATE alembic_version SET version_num = '{revision}'", name)
        assert next(iter(check_store(settings))).status == status


def test_doctor_knows_a_database_that_cannot_hold_a_store(postgres: PostgresServer) -> None:
    name = postgres.create_database()
    postgres.execute(f"DROP DATABASE {name}")
    postgres.execute(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING LATIN1 LOCALE_PROVIDER libc LOCALE 'C'")
    (found,) = check_store(Settings.model_validate({"store": postgres.url(name)}))
    assert found.status == "wrong"
    assert "LATIN1" in found.detail
