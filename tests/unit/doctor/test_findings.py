"""What the doctor finds: sound machines, and each thing that can be slow or wrong."""

import contextlib
import errno
import json
import os
import resource
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from prompt_store import migrate
from prompt_store.folder import CATALOG_FILE
from prompt_store.store import PromptStore
from server.cli import app
from server.cli.output import ExitCode
from server.doctor import backbone, compiler, machine, packages, storage
from server.doctor.findings import Finding, look, size_text
from server.engine import threads
from server.engine.kernels import native
from server.settings import Settings
from tests.factories import save_tiny_backbone


def settings(tmp_path: Path, **changes: object) -> Settings:
    return Settings.model_validate({"data_dir": tmp_path / "data", "cache_dir": tmp_path / "cache", **changes})


def one(findings: Iterator[Finding]) -> Finding:
    (found,) = findings
    return found


def test_a_check_that_fails_is_a_finding() -> None:
    def check() -> Iterator[Finding]:
        yield Finding("x", "ok", "fine")
        raise RuntimeError("boom")

    assert [found.status for found in look("x", check)] == ["ok", "wrong"]
    assert "RuntimeError: boom" in list(look("x", check))[1].detail


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 B"), (1023, "1023 B"), (4096, "4 KiB"), (3 * 2**20, "3 MiB"), (2**31, "2.0 GiB")]
)
def test_sizes_are_told_in_a_fitting_unit(num_bytes: int, text: str) -> None:
    assert size_text(num_bytes) == text


@pytest.mark.parametrize(("asked", "status"), [(1, "slow"), (2, "ok"), (3, "slow")])
def test_threads_are_held_against_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: int, status: str
) -> None:
    monkeypatch.setattr(threads, "count_cores", lambda cpus: 8)
    monkeypatch.setattr(threads, "read_cpu_limit", lambda: 2.5)

    found = one(machine.check_threads(settings(tmp_path, num_threads=asked)))

    assert found.status == status
    assert (found.advice or "--num-threads 2").startswith("--num-threads 2")


def test_a_cpu_without_the_best_instructions_is_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "usable_levels", lambda: native.all_levels()[-1:])
    monkeypatch.setattr(native, "all_levels", lambda: (native.Level("best", (), ()), native.Level("plain", (), ())))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    assert one(machine.check_cpu(settings(tmp_path))).status == "slow"


@pytest.mark.parametrize(("limit", "status"), [(256, "slow"), (machine.MIN_OPEN_FILES, "ok")])
def test_few_open_files_are_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, status: str) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limit, 2**20))

    assert one(machine.check_open_files(settings(tmp_path))).status == status


def test_a_missing_compiler_is_slow_unless_kernels_are_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler")
    monkeypatch.setattr(native, "BUILT_AHEAD", tmp_path / "none")
    chosen = settings(tmp_path)
    assert one(compiler.check_compiler(chosen)).status == "slow"

    library = native.library_path(chosen.cache_dir / "native", native.usable_levels()[0])
    library.parent.mkdir(parents=True)
    library.write_bytes(b"x")
    assert one(compiler.check_compiler(chosen)).status == "ok"


def test_a_compiler_that_works_is_ok(tmp_path: Path) -> None:
    found = one(compiler.check_compiler(settings(tmp_path)))

    assert (found.status, found.advice) == ("ok", None), found.detail
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_built", [False, True])
@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("echo 'try.cpp:2: fatal error: omp.h: No such file or directory' >&2; exit 1", "omp.h: No such file"),
        ("exit 3", "ended with 3"),
        ("exit 0", "ended with 0"),
    ],
)
def test_a_compiler_that_does_not_work_is_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, told: str, is_built: bool
) -> None:
    broken = tmp_path / "c++"
    broken.write_text(f"#!/bin/sh\n{script}\n")
    broken.chmod(0o700)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setattr(native, "BUILT_AHEAD", tmp_path / "none")
    chosen = settings(tmp_path)
    if is_built:
        library = native.library_path(chosen.cache_dir / "native", native.usable_levels()[0])
        library.parent.mkdir(parents=True)
        library.write_bytes(b"x")

    found = one(compiler.check_compiler(chosen))

    assert found.status == "slow"
    assert told in found.detail
    assert "g++" in (found.advice or "")
    assert ("steps are not compiled" in (found.advice or "")) == is_built


def test_a_compiler_that_hangs_is_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging = tmp_path / "c++"
    hanging.write_text("#!/bin/sh\nexec sleep 60\n")
    hanging.chmod(0o700)
    monkeypatch.setenv("CXX", str(hanging))
    monkeypatch.setattr(compiler, "_TIMEOUT_S", 0.1)

    assert "did not end" in one(compiler.check_compiler(settings(tmp_path))).detail


def test_a_device_that_is_not_there_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    found = {item.name: item.status for item in packages.check_torch(settings(tmp_path, device="cuda"))}

    assert found == {"torch": "ok", "device": "wrong"}


def test_a_number_format_that_the_cpu_emulates_is_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engine.checkpoint._cpu_has_bf16", lambda: False)

    found = {item.name: item for item in packages.check_torch(settings(tmp_path, device="cpu", dtype="bfloat16"))}

    assert (found["dtype"].status, found["dtype"].advice) == ("slow", "--dtype float32")


def test_a_folder_that_cannot_be_written_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    chosen = settings(tmp_path)

    assert one(storage.check_cache_folder(chosen)).status == "wrong"
    assert one(machine.check_temporary_folder(chosen)).status == "wrong"


def test_a_data_folder_is_tried_for_permissions_do_not_tell_of_a_read_only_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path) -> float:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(storage, "measure_sync", refuse)
    found = one(storage.check_data_folder(settings(tmp_path)))

    assert found.status == "wrong"
    assert "Read-only" in found.detail
    assert "--data-dir" in (found.advice or "")


def test_a_slow_disk_is_slow_and_nothing_is_left_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [item.name for item in storage.check_data_folder(settings(tmp_path))] == ["data folder", "fsync"]
    assert list(tmp_path.iterdir()) == []

    monkeypatch.setattr(storage, "measure_sync", lambda folder: storage.SLOW_SYNC_S * 2)
    assert [item.status for item in storage.check_data_folder(settings(tmp_path))][1] == "slow"


def test_a_store_that_is_not_there_yet_is_not_made(tmp_path: Path) -> None:
    assert one(storage.check_store(settings(tmp_path))).status == "ok"
    assert list(tmp_path.iterdir()) == []


def test_a_store_of_this_release_is_ok_also_while_it_is_served(tmp_path: Path) -> None:
    with PromptStore.open(tmp_path / "data"):
        assert one(storage.check_store(settings(tmp_path))).detail == f"revision {migrate.HEAD}"


def test_a_data_folder_that_another_server_has_is_wrong_and_names_it(tmp_path: Path) -> None:
    chosen = settings(tmp_path)
    assert one(storage.check_holder(chosen)).status == "ok", "there is none yet"
    with PromptStore.open(chosen.data_dir):
        found = one(storage.check_holder(chosen))
        with PromptStore.open(chosen.data_dir, exclusive=False):
            pass

    assert found.status == "wrong"
    assert f"process {os.getpid()}" in found.detail
    assert "--data-dir" in (found.advice or "")
    assert one(storage.check_holder(chosen)).status == "ok", "it is given back"


def test_a_look_at_the_lock_does_not_take_it(tmp_path: Path) -> None:
    chosen = settings(tmp_path)
    with PromptStore.open(chosen.data_dir):
        pass
    assert one(storage.check_holder(chosen)).status == "ok"
    with PromptStore.open(chosen.data_dir):
        assert one(storage.check_holder(chosen)).status == "wrong"


def set_revision(tmp_path: Path, revision: str) -> None:
    import sqlite3

    with PromptStore.open(tmp_path / "data"):
        pass
    with contextlib.closing(sqlite3.connect(tmp_path / "data" / CATALOG_FILE)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", (revision,))


def test_a_store_of_an_older_release_is_ok_and_is_not_migrated(tmp_path: Path) -> None:
    set_revision(tmp_path, "0001")

    first, second = (one(storage.check_store(settings(tmp_path))) for _ in range(2))

    assert first == second
    assert (first.status, first.advice) == ("ok", "back it up first")


def test_a_store_of_a_newer_release_is_wrong(tmp_path: Path) -> None:
    set_revision(tmp_path, "9999")

    assert one(storage.check_store(settings(tmp_path))).status == "wrong"


def test_a_damaged_store_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / CATALOG_FILE).write_bytes(b"no database" * 500)

    found = one(storage.check_store(settings(tmp_path)))

    assert found.status == "wrong"
    assert "backup" in (found.advice or "")


def test_a_port_in_use_is_wrong(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert one(storage.check_port(settings(tmp_path, port=port))).status == "wrong"
        assert one(storage.check_port(settings(tmp_path, port=0, metrics_port=port))).status == "wrong"

    assert one(storage.check_port(settings(tmp_path, port=0))).status == "ok"


def test_an_address_of_all_networks_is_told(tmp_path: Path) -> None:
    chosen = settings(tmp_path, host="0.0.0.0", port=0)
    without = one(storage.check_port(chosen))
    assert without.status == "wrong", "serve would refuse"
    assert "keys create" in (without.advice or "")
    with PromptStore.open(chosen.data_dir) as store:
        store.create_key("default", ["infer"])

    found = one(storage.check_port(chosen))

    assert (found.status, found.advice) == ("ok", "put TLS in front of it")
    assert "other machines reach it" in found.detail


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_backbone("llama", tmp_path_factory.mktemp("backbone"))


def test_a_backbone_folder_is_looked_into_and_memory_held_against_it(tmp_path: Path, tiny: Path) -> None:
    found = list(backbone.check_backbone(settings(tmp_path, model=str(tiny))))

    assert (found[0].name, found[0].status) == ("backbone", "ok")
    assert "llama" in found[0].detail
    assert "weights" in found[1].detail


def test_pools_beyond_the_machine_s_memory_are_slow_and_weights_beyond_it_wrong(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings(tmp_path, model=str(tiny), device="cpu", kv_cache_bytes="2GiB")
    monkeypatch.setattr("server.engine.host_memory.available_bytes", lambda: 2**30)
    assert list(backbone.check_backbone(chosen))[1].status == "slow"

    monkeypatch.setattr("server.engine.host_memory.available_bytes", lambda: 10)
    assert list(backbone.check_backbone(chosen))[1].status == "wrong"


def write_config(folder: Path, config: dict[str, object]) -> None:
    (folder / "config.json").write_text(json.dumps(config))


def no_config(folder: Path) -> None:
    pass


def shipped_code(folder: Path) -> None:
    write_config(folder, {"auto_map": {"AutoModel": "x.Y"}})


def no_weights(folder: Path) -> None:
    write_config(folder, {"model_type": "llama"})


def encoder_decoder(folder: Path) -> None:
    write_config(folder, {"model_type": "t5", "is_encoder_decoder": True})
    (folder / "model.safetensors").write_bytes(b"x")


@pytest.mark.parametrize(
    ("prepare", "told"),
    [
        (no_config, "no config.json"),
        (shipped_code, "its own code"),
        (no_weights, "no safetensors"),
        (encoder_decoder, "encoder-decoder"),
    ],
)
def test_a_folder_that_cannot_be_served_is_wrong(tmp_path: Path, prepare: Callable[[Path], None], told: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    prepare(folder)

    found = one(backbone.check_backbone(settings(tmp_path, model=str(folder))))

    assert found.status == "wrong"
    assert told in found.detail


@pytest.mark.parametrize(
    ("model", "status"), [("/no/such/folder", "wrong"), ("/no/such.gguf", "wrong"), ("some/hub-id", "ok")]
)
def test_a_name_that_is_no_folder_is_a_hub_id_or_wrong(tmp_path: Path, model: str, status: str) -> None:
    assert one(backbone.check_backbone(settings(tmp_path, model=model))).status == status


def test_the_embedded_backbone_is_not_converted_by_a_look(tmp_path: Path) -> None:
    found = one(backbone.check_backbone(settings(tmp_path)))

    assert found.status == "ok"
    assert "converted at the first start" in found.detail
    assert not (tmp_path / "cache").exists()


def call(tmp_path: Path, *arguments: str) -> tuple[int, str, str]:
    folders = ["--data-dir", str(tmp_path / "data"), "--cache-dir", str(tmp_path / "cache"), "--port", "0"]
    result = CliRunner().invoke(app, ["doctor", *folders, *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_the_command_lists_what_it_looked_at_and_changes_nothing(tmp_path: Path, tiny: Path) -> None:
    code, stdout, stderr = call(tmp_path, str(tiny))

    names = {line.split("  ")[1].strip() or line.split()[1] for line in stdout.splitlines()[1:]}
    assert code == ExitCode.OK, stdout + stderr
    assert {"torch", "device", "threads", "backbone", "memory", "store", "fsync", "clock"} <= names
    assert "0 wrong" in stderr
    assert list(tmp_path.iterdir()) == []


def snapshot(folder: Path) -> dict[str, tuple[int, int, bytes | None]]:
    """Each file's and folder's mode, time of change and bytes; but for the memory in which those who have the database
    open say what they read.
    """
    found = {}
    for path in sorted((folder, *folder.rglob("*"))):
        if path.name.endswith("-shm"):
            continue
        status = path.lstat()
        content = path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(folder))] = (status.st_mode, status.st_mtime_ns, content)
    return found


@pytest.mark.parametrize("is_served", [False, True])
def test_the_command_leaves_every_byte_and_time_of_the_store_as_it_was(
    tmp_path: Path, tiny: Path, is_served: bool
) -> None:
    data_dir = tmp_path / "data"
    with contextlib.ExitStack() as stack:
        store = PromptStore.open(data_dir)
        stack.callback(store.close)
        store.create_key("default", ["infer"])
        if not is_served:
            store.close()
        before = snapshot(data_dir)
        code, stdout, _ = call(tmp_path, str(tiny), "--host", "0.0.0.0")
        after = snapshot(data_dir)

    assert ("wrong" in stdout, code) == ((True, ExitCode.FAILED) if is_served else (False, ExitCode.OK)), stdout
    assert after == before
    if not is_served:
        assert not list(data_dir.glob("*-shm"))


def test_the_command_fails_when_something_is_wrong(tmp_path: Path) -> None:
    code, stdout, stderr = call(tmp_path, "/no/such/folder", "--json")

    assert code == ExitCode.FAILED
    found = {item["name"]: item for item in json.loads(stdout)}
    assert found["backbone"]["status"] == "wrong"
    assert found["backbone"]["advice"]
    assert stderr == ""


def test_the_command_takes_and_checks_serve_s_settings(tmp_path: Path) -> None:
    assert call(tmp_path, "--max-rows", "0")[0] == ExitCode.USAGE
