"""What a figure was measured on can be told, in JSON, from a checkout and from an installed package."""

import json
import platform
import re
import subprocess
from pathlib import Path

import pytest

from server import __version__
from server.bench import environment


def test_versions_and_machine_are_this_one_s() -> None:
    found = json.loads(json.dumps(environment.describe_environment()))

    assert found["versions"]["promptmux"] == __version__
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["torch"][0].isdigit()
    assert found["machine"]["cores"] >= 1
    assert found["machine"]["cpu"]


def test_the_commit_says_when_files_differ_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=n", "-c", "user.email=e@example.com")
        return subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    monkeypatch.setattr(environment, "_ROOT", tmp_path)
    assert environment.describe_environment()["commit"] is None
    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "--no-verify", "--message", "first")

    assert environment.describe_environment()["commit"] == git("rev-parse", "HEAD")[:12]
    (tmp_path / "file").write_text("two")
    assert re.fullmatch(r"[0-9a-f]{12}-dirty", environment.describe_environment()["commit"])
