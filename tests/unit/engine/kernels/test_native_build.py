"""Building and finding native libraries: whole or not at all, once, and with a reason when it cannot be."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from server.engine.built_files import is_whole, publish
from server.engine.kernels import native
from server.engine.kernels.native import Level, NativeUnavailableError, all_levels, build, library_path

ROOT = Path(__file__).resolve().parents[4]
PLAIN = all_levels()[-1]
BEST = Level("best", ("-O1",), ())

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="there is no C++ compiler"
)


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of sources that compile in no time, in place of the kernels."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "answer.h").write_text("#pragma once\nint answer();\n")
    (folder / "answer.cpp").write_text('#include "answer.h"\nint answer() { return 42; }\n')
    (folder / "question.cpp").write_text('#include "answer.h"\nint question() { return answer(); }\n')
    monkeypatch.setattr(native, "SOURCES", folder)
    monkeypatch.setattr(native, "BUILT_AHEAD", tmp_path / "ahead")
    monkeypatch.delenv("CXX", raising=False)
    return folder


def write_compiler(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@needs_compiler
@pytest.mark.usefixtures("sources")
def test_library_is_built_once_however_many_want_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = tmp_path / "calls"
    real = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    monkeypatch.setenv("CXX", str(write_compiler(tmp_path / "cxx", f'echo . >> {calls}\nexec {real} "$@"')))

    with ThreadPoolExecutor(4) as threads:
        paths = list(threads.map(lambda _: build(tmp_path / "cache"), range(4)))

    assert len(set(paths)) == 1
    assert len(calls.read_text().split()) == 3  # two sources, one link
    assert is_whole(paths[0])
    kept = sorted(path.name for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock")
    assert kept == [paths[0].name, f"{paths[0].name}.sha256"]


@needs_compiler
def test_failing_compiler_leaves_nothing_and_says_what_it_said(sources: Path, tmp_path: Path) -> None:
    (sources / "question.cpp").write_text("this is no C++")

    with pytest.raises(NativeUnavailableError, match=r"question\.cpp"):
        build(tmp_path / "cache")

    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


@pytest.mark.usefixtures("sources")
def test_missing_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(NativeUnavailableError, match=r"no C\+\+ compiler \(no-such-compiler"):
        build(tmp_path / "cache")

    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NativeUnavailableError, match=r"no C\+\+ compiler \(c\+\+, g\+\+, clang\+\+"):
        build(tmp_path / "cache")


@pytest.mark.usefixtures("sources")
def test_folder_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(write_compiler(tmp_path / "cxx", "exit 0")))
    (tmp_path / "file").write_text("")

    with pytest.raises(NativeUnavailableError, match=r"cannot be put into .*file"):
        build(tmp_path / "file" / "cache")


@pytest.mark.usefixtures("sources")
def test_compiler_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(write_compiler(tmp_path / "cxx", "exec sleep 60")))
    monkeypatch.setattr(native, "_BUILD_TIMEOUT_S", 0.1)

    with pytest.raises(NativeUnavailableError, match="took more than"):
        build(tmp_path / "cache")


def test_name_changes_with_sources_level_and_torch(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path("cache")
    names = {library_path(folder, PLAIN), library_path(folder, Level("plain", ("-O1",), ()))}
    (sources / "answer.h").write_text("#pragma once\nlong answer();\n")
    names.add(library_path(folder, PLAIN))
    monkeypatch.setattr(torch, "__version__", "0.0.0")
    names.add(library_path(folder, PLAIN))

    assert len(names) == 4


@needs_compiler
@pytest.mark.usefixtures("sources")
def test_library_built_ahead_is_loaded_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ahead = build(native.BUILT_AHEAD, PLAIN)
    monkeypatch.setenv("CXX", "no-such-compiler")

    assert native._load(tmp_path / "cache", (PLAIN,), may_build=True) == ahead


@needs_compiler
@pytest.mark.usefixtures("sources")
@pytest.mark.parametrize("place", ["cache", "ahead"])
def test_library_that_was_cut_short_is_not_loaded_but_built_again(tmp_path: Path, place: str) -> None:
    damaged = build(tmp_path / place, PLAIN)
    os.truncate(damaged, damaged.stat().st_size // 2)

    loaded = native._load(tmp_path / "cache", (PLAIN,), may_build=True)

    assert loaded == library_path(tmp_path / "cache", PLAIN)
    assert is_whole(loaded)


@needs_compiler
@pytest.mark.usefixtures("sources")
def test_library_that_cannot_be_loaded_is_built_again(tmp_path: Path) -> None:
    path = library_path(tmp_path / "cache", PLAIN)
    path.parent.mkdir()
    (path.parent / "made").write_bytes(b"no library")
    publish(path.parent / "made", path)

    assert native._load(path.parent, (PLAIN,), may_build=True) == path
    assert path.read_bytes().startswith(b"\x7fELF")


@needs_compiler
@pytest.mark.usefixtures("sources")
def test_lesser_level_serves_only_where_the_best_cannot_be_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lesser = build(tmp_path, PLAIN)

    with monkeypatch.context() as without_compiler:
        without_compiler.setenv("CXX", "no-such-compiler")
        assert native._load(tmp_path, (BEST, PLAIN), may_build=True) == lesser
    assert "plain in place of best: there is no C++ compiler" in caplog.text
    assert native._load(tmp_path, (BEST, PLAIN), may_build=True) == library_path(tmp_path, BEST)


@needs_compiler
def test_of_libraries_of_older_sources_the_newest_few_stay(sources: Path, tmp_path: Path) -> None:
    made = []
    for version in range(5):
        (sources / "answer.cpp").write_text(f"int answer() {{ return {version}; }}")
        made.append(build(tmp_path / "cache", PLAIN))
    other = build(tmp_path / "cache", BEST)

    assert {path for path in (tmp_path / "cache").iterdir() if path.suffix == ".so"} == {*made[-3:], other}


def test_levels_that_this_cpu_lacks_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.usable_levels()[-1] == PLAIN
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert native.usable_levels() == (PLAIN,)


@pytest.mark.usefixtures("sources")
def test_library_is_not_built_where_that_is_not_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_loaded", None)

    with pytest.raises(NativeUnavailableError, match=r"has been built in .*cache"):
        native.load_native(tmp_path / "cache", may_build=False)


CHECK_OF_A_LEVEL = """
import sys, torch
from server.engine.kernels import native
from server.engine.kernels.gather import gather_attention
from tests.unit.engine.kernels.batches import HeadShape, RowSize, make_case

(level,) = [level for level in native.all_levels() if level.name == sys.argv[1]]
assert native.load_native(level=level).name.startswith(f"promptmux-{level.name}-")
rows = [RowSize(1, 600), RowSize(1, 33), RowSize(50, 130)]
for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)):
    for shape in (HeadShape(9, 3, 64, 64), HeadShape(9, 1, 40, 24)):
        case = make_case(shape, rows, dtype=dtype, softcap=20.0, with_sinks=True, num_padding=1)
        answers, _, _ = case.run(native.native_attention)
        torch.testing.assert_close(answers, case.run(gather_attention)[0], rtol=0, atol=tolerance)
        alone, _, _ = case.only(2).run(native.native_attention)
        assert torch.equal(alone, answers[2:52])
"""


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("level", native.usable_levels()[1:], ids=lambda level: level.name)
def test_every_level_that_this_cpu_can_run_answers_as_the_plain_kernel(level: Level) -> None:
    """In a process of its own, because a process loads one library for good."""
    command = [sys.executable, "-c", CHECK_OF_A_LEVEL, level.name]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "2"}, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
