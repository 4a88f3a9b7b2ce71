"""The house itself: generated pages are current, files that no test runs are sound, and unsafe loading is refused."""

import os
import re
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.metrics import Metrics
from server.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = runpy.run_path(str(ROOT / "docs/generate.py"))["PAGES"]
CHECK: Callable[[str, str], Any] = runpy.run_path(str(ROOT / ".ci/check_unsafe_loading.py"))["find_unsafe"]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def run_make(*arguments: str) -> str:
    """What make prints, also when these tests were started by make themselves."""
    env = {name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("page", PAGES)
def test_generated_page_is_what_the_code_says(page: str) -> None:
    assert (ROOT / "docs" / page).read_text(encoding="utf-8") == PAGES[page](), "run `make docs`"


def test_every_metric_is_documented_and_every_documented_metric_exists() -> None:
    text, _ = Metrics().render()
    rendered = set(re.findall(r"^# TYPE (promptmux_\w+)", text.decode(), re.MULTILINE))
    documented = set(re.findall(r"^\| `(promptmux_\w+)`", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE))

    assert documented == rendered


@pytest.mark.parametrize("page", ["README.md", "docs"])
def test_metrics_named_in_prose_exist(page: str) -> None:
    files = [ROOT / page] if (ROOT / page).is_file() else sorted((ROOT / page).rglob("*.md"))
    text, _ = Metrics().render()
    for file in files:
        for name in re.findall(r"\bpromptmux_[a-z_]+[a-z]\b", file.read_text(encoding="utf-8")):
            assert name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") in text.decode(), (
                f"{file.name} names {name}"
            )


def test_make_targets_named_in_documents_exist() -> None:
    for file in (README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))):
        named = set(re.findall(r"(?:`|^|\s)make ([a-z]+)\b(?=[\s`]|$)", _code_of(file.read_text(encoding="utf-8"))))
        assert named <= make_targets(), file.name


def _code_of(markdown: str) -> str:
    """Code blocks and inline code: "make sense" in a sentence names no target."""
    blocks = re.findall(r"```.*?```|`[^`\n]+`", markdown, re.DOTALL)
    return "\n".join(block.strip("`") for block in blocks)


def test_make_help_lists_every_target() -> None:
    assert {line.split()[0] for line in run_make("help").splitlines()} == make_targets()


def test_make_serve_passes_port_data_model_and_arguments_on() -> None:
    variables = ["PORT=8123", "DATA=/some folder/x", "MODEL=/models/m", "ARGS=--dtype float32"]
    output = run_make("-n", "serve", *variables)

    command = output.replace("\\\n", "").split("promptmux serve ")[1]
    expected = '"/models/m" --demo-dir demo --port "8123" --data-dir "/some folder/x" --dtype float32'
    assert " ".join(command.split()) == expected


def test_no_unsafe_loading_in_the_project() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / ".ci/check_unsafe_loading.py")], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import joblib.externals",
        "from pickle import loads",
        "from torch import load",
        "torch.load(path)",
        "loader = torch.load",
        "np.load(path)",
        "numpy.load(path, allow_pickle=False)",
        "f(allow_pickle=flag)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=flag)",
    ],
)
def test_unsafe_loading_is_found(source: str) -> None:
    assert list(CHECK(source, "file.py"))


@pytest.mark.parametrize(
    "source",
    [
        '"""No pickle and no torch.load(x)."""',
        "# import pickle",
        "f(trust_remote_code=False)",
        "safetensors.torch.load(b)",
    ],
)
def test_harmless_code_is_let_through(source: str) -> None:
    assert not list(CHECK(source, "file.py"))


def test_compose_starts_a_server_that_prometheus_scrapes() -> None:
    compose = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())
    prometheus = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())

    assert set(compose["services"]) == {"promptmux", "prometheus", "grafana"}
    for name, service in compose["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert source in compose["volumes"] or (ROOT / "deploy" / source).exists(), volume
    (job,) = prometheus["scrape_configs"]
    assert job["metrics_path"] == "/metrics"
    assert job["static_configs"] == [{"targets": ["promptmux:8000"]}]


def test_container_s_grace_period_is_longer_than_the_drain() -> None:
    compose = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())

    grace_s = int(compose["services"]["promptmux"]["stop_grace_period"].removesuffix("s"))
    assert grace_s > Settings().drain_timeout_s + 5


def test_pre_commit_downloads_nothing_and_runs_what_make_check_runs() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]

    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    assert all(hook["language"] == "system" for hook in hooks)
    check = (ROOT / "Makefile").read_text().split("\ncheck:")[1].split("\n\n")[0]
    tools = {"ruff check", "ruff format --check", "mypy", "lint-imports", ".ci/check_unsafe_loading.py"}
    for tool in tools:
        assert tool in check
        assert any(tool in hook["entry"] for hook in hooks), tool


def test_constraints_pin_every_direct_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(item for extra in project["optional-dependencies"].values() for item in extra),
    ]
    names = {re.split(r"[\[~>=<! ]", item)[0].lower().replace("_", "-") for item in wanted} - {"promptmux"}

    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines}

    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    assert names <= pinned
