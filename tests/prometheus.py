"""A real Prometheus for tests, and its promtool: a process of its own on loopback, its data in a temporary folder.

The binaries are those on the PATH, or Debian's, which `make test` unpacks into the environment (`.ci/prometheus`).
Where there are none, tests that need them fail and say so, unless TEST_PROMETHEUS=off leaves them out.
"""

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

SWITCH = "TEST_PROMETHEUS"
_STOP_TIMEOUT_S = 30


def find_binary(name: str) -> str:
    """Where `prometheus` or `promtool` is. Fails the test where it is nowhere, or skips it if told to."""
    if os.environ.get(SWITCH) == "off":
        pytest.skip(f"{SWITCH}=off leaves tests of Prometheus out")
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:{sys.prefix}/prometheus/usr/bin")
    if found is None:
        pytest.fail(f"{name} is not installed: .ci/prometheus gets it where there is apt. {SWITCH}=off does without.")
    return found


def promtool(*arguments: str | Path) -> str:
    """What promtool prints. Fails the test when it exits with anything but 0."""
    command = [find_binary("promtool"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@dataclass(frozen=True, slots=True)
class Sample:
    labels: Mapping[str, str]
    value: float


class PrometheusServer:
    """A running one. `client` talks to its HTTP API."""

    def __init__(self, client: httpx.Client) -> None:
        self.client = client

    def query(self, expression: str) -> list[Sample]:
        """The samples of now. Fails the test when Prometheus does not understand the expression."""
        result = self._get("query", query=expression)["result"]
        return [Sample(found["metric"], float(found["value"][1])) for found in result]

    def targets(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._get("targets")["activeTargets"]
        return found

    def rules(self) -> list[dict[str, Any]]:
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def _get(self, path: str, **parameters: str) -> Any:
        answer = self.client.get(f"/api/v1/{path}", params=parameters)
        assert answer.status_code == 200, (parameters, answer.text)
        return answer.json()["data"]


@contextmanager
def running_prometheus(config: Mapping[str, Any], folder: Path) -> Iterator[PrometheusServer]:
    """Starts one with this configuration and stops it at the end."""
    config_file = folder / "prometheus.yml"
    config_file.write_text(yaml.safe_dump(dict(config)))
    command = [find_binary("prometheus"), f"--config.file={config_file}", f"--storage.tsdb.path={folder / 'data'}"]
    command += ["--web.listen-address=127.0.0.1:0"]
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    # A pipe that nobody reads fills up and stops the writer.
    reader = threading.Thread(target=process.stderr.read, daemon=True)
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if (found := re.search(r'msg="?Listening on"? address=(\S+)', line)) is not None:
                break
        else:
            pytest.fail("Prometheus did not start:\n" + "".join(said))
        reader.start()
        with httpx.Client(base_url=f"http://{found[1]}", timeout=30) as client:
            yield PrometheusServer(client)
    finally:
        process.terminate()
        process.wait(_STOP_TIMEOUT_S)
        if reader.is_alive():
            reader.join()
        process.stderr.close()
