"""Files that are run as code are whole or are not taken."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from server.engine.built_files import discard, is_whole, keep_newest, may_execute, publish


def make(path: Path, content: bytes = b"code") -> Path:
    made = path.with_name("made")
    made.write_bytes(content)
    publish(made, path)
    return path


def test_published_file_is_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = make(tmp_path / "library.so", b"code")

    assert is_whole(path)
    assert path.read_bytes() == b"code"
    assert {file.name for file in tmp_path.iterdir()} == {"library.so", "library.so.sha256"}


@pytest.mark.parametrize("damage", ["cut", "changed", "without its digest", "gone"])
def test_damaged_file_is_not_whole_until_it_is_published_again(tmp_path: Path, damage: str) -> None:
    path = make(tmp_path / "library.so")
    if damage == "cut":
        os.truncate(path, 2)
    elif damage == "changed":
        path.write_bytes(b"cody")
    elif damage == "without its digest":
        (tmp_path / "library.so.sha256").unlink()
    else:
        discard(path)
        assert not list(tmp_path.iterdir())

    assert not is_whole(path)
    assert is_whole(make(path, b"other code"))


def test_newest_files_stay_with_their_digests(tmp_path: Path) -> None:
    paths = [make(tmp_path / f"{number}.so") for number in range(4)]
    for age, path in enumerate(paths):
        os.utime(path, (1000 - age, 1000 - age))

    keep_newest([*paths, tmp_path / "never.so"], 2)

    assert [is_whole(path) for path in paths] == [True, True, False, False]
    assert len(list(tmp_path.iterdir())) == 4


def test_folder_on_a_disk_may_hold_code(tmp_path: Path) -> None:
    assert may_execute(tmp_path)
    assert not list(tmp_path.iterdir())


def test_folder_mounted_noexec_may_not() -> None:
    with Path("/proc/mounts").open() as mounts:
        places = [fields[1] for fields in map(str.split, mounts) if "noexec" in fields[3].split(",")]
    for place in places:
        try:
            folder = Path(tempfile.mkdtemp(dir=place))
        except OSError:
            continue
        try:
            assert not may_execute(folder)
            return
        finally:
            shutil.rmtree(folder)
    pytest.skip("no writable folder is mounted noexec here")
