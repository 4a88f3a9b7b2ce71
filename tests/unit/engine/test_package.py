"""A package has a key of all that is in it, is made once, and leaves nothing behind; its maker ends with its parent."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from server.engine.built_files import is_whole, publish
from server.engine.compile_child import CompilerError
from server.engine.compile_worker import OOM_SCORE, CompileRequest
from server.engine.kernels.native import NativeUnavailableError, load_native
from server.engine.package import Package

DEADLINE_S = 60.0


@pytest.fixture(scope="module", autouse=True)
def _library() -> None:
    try:
        load_native()
    except NativeUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"sliding_window": 64}')
    return model


def package(folder: Path, **changes: Any) -> Package:
    arguments: dict[str, Any] = {
        "fingerprint": "f" * 64, "dtype": torch.float32, "form": "plain", "quantization": "none",
        "cache_dir": folder.parent / "cache",
    } | changes  # fmt: skip
    return Package(folder, **arguments)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[CompileRequest]:
    """The requests that a child would have got; a file appears as if it had served them."""
    requests: list[CompileRequest] = []

    def serve(request: CompileRequest, **_: Any) -> None:
        requests.append(request)
        file = Path(request.scratch) / "made"
        file.write_text("package")
        publish(file, Path(request.package))

    monkeypatch.setattr("server.engine.package.run_child", serve)
    return requests


def make(wanted: Package, unless: int | None = None) -> None:
    wanted.make(threading.Event(), model_bytes=0, unless=unless)


def names(wanted: Package) -> set[str]:
    return {path.name for path in wanted.path.parent.iterdir() if path.suffix != ".lock"}


def test_other_models_dtypes_forms_and_configurations_have_packages_and_handles_of_their_own(folder: Path) -> None:
    variants: list[dict[str, Any]] = [{}, {"fingerprint": "e"}, {"dtype": torch.bfloat16}, {"form": "native"}]
    packages = [package(folder, **changes) for changes in variants]
    (folder / "config.json").write_text('{"sliding_window": 32}')
    packages.append(package(folder))

    assert len({made.path for made in packages}) == len({made.handle for made in packages}) == len(packages)
    assert packages[-1].path == package(folder).path
    assert 0 <= packages[-1].handle < 2**63


def test_request_survives_its_way_to_the_child(folder: Path) -> None:
    request = package(folder).request
    assert CompileRequest(**json.loads(request.to_json())) == request
    assert "\n" not in request.to_json()


def test_package_is_made_once_and_again_where_the_one_that_is_there_does_not_count(
    folder: Path, made: list[CompileRequest]
) -> None:
    wanted = package(folder)
    assert wanted.inode is None
    for _ in range(2):
        make(wanted)
    assert made == [wanted.request]
    assert names(wanted) == {wanted.path.name, f"{wanted.path.name}.sha256"}

    found = wanted.inode
    make(wanted, unless=found)
    assert len(made) == 2
    if wanted.inode != found:  # a number may be given out again
        make(wanted, unless=found)
        assert len(made) == 2


def test_package_that_another_process_makes_is_waited_for(folder: Path, made: list[CompileRequest]) -> None:
    wanted = package(folder)
    wanted.path.parent.mkdir(parents=True)
    waiter = threading.Thread(target=make, args=(wanted,))
    with FileLock(wanted.path.with_suffix(".lock")):
        waiter.start()
        file = wanted.path.with_name("theirs")
        file.write_text("package")
        publish(file, wanted.path)
    waiter.join(DEADLINE_S)

    assert not waiter.is_alive()
    assert not made


def test_what_killed_processes_left_is_swept_and_what_runs_is_left_alone(
    folder: Path, made: list[CompileRequest]
) -> None:
    wanted = package(folder)
    cache = wanted.path.parent
    cache.mkdir(parents=True)
    own = Path(wanted.request.scratch)
    left, running = cache / "left.build", cache / "running.build"
    old, new = cache / ".loading-old", cache / ".loading-new"
    for path in (own, left, running, old, new):
        path.mkdir()
        (path / "file").write_text("")
    os.utime(old, (1, 1))

    with FileLock(cache / "running.lock"):
        make(wanted)

    assert {path for path in cache.iterdir() if path.is_dir()} == {running, new}


def test_of_a_models_packages_the_newest_few_stay(folder: Path, made: list[CompileRequest]) -> None:
    other = package(folder, fingerprint="e")
    make(other)
    packages = []
    for version in range(5):
        (folder / "config.json").write_text(f'{{"sliding_window": {version}}}')
        packages.append(package(folder))
        make(packages[-1])
        os.utime(packages[-1].path, (version + 1, version + 1))

    assert [is_whole(kept.path) for kept in packages] == [False, False, True, True, True]
    assert is_whole(other.path)


def test_nothing_is_made_in_a_folder_that_must_not_hold_code(
    folder: Path, made: list[CompileRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.engine.package.may_execute", lambda _: False)

    with pytest.raises(CompilerError, match="noexec"):
        make(package(folder))
    assert not made


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.timeout(300)
def test_child_is_the_first_to_go_when_memory_runs_out_and_ends_with_its_parent(
    tiny_backbone_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    request = package(tiny_backbone_folder("llama"), cache_dir=tmp_path).request
    request = dataclasses.replace(request, scratch=str(tmp_path))
    command = [sys.executable, "-P", "-m", "server.engine.compile_worker"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as child:
        assert child.stdin is not None
        child.stdin.write(request.to_json().encode() + b"\n")
        child.stdin.flush()
        score, give_up_s = Path(f"/proc/{child.pid}/oom_score_adj"), time.monotonic() + DEADLINE_S
        while int(score.read_text()) != OOM_SCORE and time.monotonic() < give_up_s:
            time.sleep(0.01)
        assert int(score.read_text()) == OOM_SCORE
        assert child.poll() is None
        # As the end of the parent does.
        child.stdin.close()
        assert child.wait(DEADLINE_S) == -signal.SIGKILL
