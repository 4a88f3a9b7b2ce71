"""Two real servers of one store, watched by a real Prometheus with the rules of deploy/: every query has an answer.

The servers are processes over a tiny random backbone; some traffic goes to both while Prometheus looks.
"""

import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.factories import HIDDEN_SIZE
from tests.fakes import make_prompt_config, make_prompt_file
from tests.postgresql import PostgresServer
from tests.prometheus import PrometheusServer, running_prometheus

ROOT = Path(__file__).resolve().parents[3]
DEPLOY = ROOT / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/promptmux.json").read_text())
DEADLINE_S = 90.0
# What Grafana puts in for its variables when all replicas are chosen.
VARIABLES = {"$job": "promptmux", "$instance": ".*", "$__rate_interval": "1m"}


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def expressions() -> dict[str, str]:
    """The dashboard's queries and the recorded rules, as they are asked, by where they are from."""
    found = {}
    for panel in panels():
        for target in panel["targets"]:
            expression = target["expr"]
            for name, value in VARIABLES.items():
                expression = expression.replace(name, value)
            found[f"{panel['title']} {target['refId']}"] = expression
    groups = yaml.safe_load((DEPLOY / "prometheus/rules/recording.yml").read_text())["groups"]
    return found | {rule["record"]: rule["record"] for group in groups for rule in group["rules"]}


@contextmanager
def running_replica(backbone: Path, store: str, folder: Path) -> Iterator[Callable[[], str]]:
    """A server's process. What it gives waits until the server is ready and tells its address."""
    command = [sys.executable, "-c", "from server.cli import main; main()", "serve", str(backbone), "--port", "0"]
    command += ["--store", store, "--data-dir", str(folder), "--dtype", "float32", "--compile", "off"]
    command += ["--audit-share", "1.0", "--num-threads", "1", "--kv-cache-bytes", "16MiB"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ | {"NO_COLOR": "1"})
    assert process.stderr is not None
    stderr = process.stderr
    # A pipe that nobody reads fills up and stops the writer.
    reader = threading.Thread(target=stderr.read, daemon=True)

    def wait() -> str:
        printed = ""
        for line in stderr:
            printed += line
            if line.startswith("Ctrl-C"):
                break
        else:
            pytest.fail(f"the server ended before it was ready:\n{printed}")
        reader.start()
        found = re.search(r"at (http://\S+)", printed)
        assert found is not None
        return found[1]

    try:
        yield wait
    finally:
        process.terminate()
        assert process.wait(60) == 0
        if reader.is_alive():
            reader.join()
        stderr.close()


class Clients:
    """Some traffic at both replicas, of every kind that a panel shows."""

    def __init__(self, replicas: list[httpx.Client]) -> None:
        self._replicas = replicas
        self._num_rounds = 0

    def go_round(self) -> None:
        self._num_rounds += 1
        task = f"task-{self._num_rounds}"
        uploader = self._replicas[self._num_rounds % len(self._replicas)]
        files = {
            "file": ("adapter_model.safetensors", make_prompt_file(0.1 * self._num_rounds, hidden_size=HIDDEN_SIZE)),
            "config": ("adapter_config.json", make_prompt_config(hidden_size=HIDDEN_SIZE)),
        }
        assert uploader.post(f"/v1/tasks/{task}/versions", files=files).status_code == 201
        for replica in self._replicas:
            body = {"prompt": "some text", "max_tokens": 4, "ignore_eos": True}
            assert uploader.post("/v1/completions", json=body | {"model": task}).status_code == 200
            assert replica.post("/v1/completions", json=body | {"model": "absent"}).status_code == 404


@pytest.fixture(scope="module")
def watched(
    tmp_path_factory: pytest.TempPathFactory, postgres: PostgresServer, tiny_backbone_folder: Callable[[str], Path]
) -> Iterator[tuple[PrometheusServer, Clients]]:
    folder = tmp_path_factory.mktemp("watched")
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    (folder / "rules").symlink_to(DEPLOY / "prometheus/rules")
    with ExitStack() as stack:
        store = stack.enter_context(postgres.database())
        backbone = tiny_backbone_folder("llama")
        waiting = [stack.enter_context(running_replica(backbone, store, folder / name)) for name in ("one", "two")]
        urls = [wait() for wait in waiting]
        config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
        config["scrape_configs"][0]["static_configs"] = [{"targets": [url.removeprefix("http://") for url in urls]}]
        clients = Clients([stack.enter_context(httpx.Client(base_url=url, timeout=60)) for url in urls])
        prometheus = stack.enter_context(running_prometheus(config, folder))
        wait_until(lambda: len(prometheus.query('up{job="promptmux"} == 1')) == len(urls))
        yield prometheus, clients


def wait_until(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline_s, "it never came to hold"
        time.sleep(0.1)


def without_data(prometheus: PrometheusServer) -> dict[str, str]:
    return {
        where: expression
        for where, expression in expressions().items()
        if all(math.isnan(sample.value) for sample in prometheus.query(expression))
    }


def test_every_panel_and_every_recorded_rule_has_data_and_no_alert_fires(
    watched: tuple[PrometheusServer, Clients],
) -> None:
    prometheus, clients = watched
    deadline_s = time.monotonic() + DEADLINE_S
    while missing := without_data(prometheus):
        assert time.monotonic() < deadline_s, f"no data for {missing}"
        clients.go_round()

    rules = prometheus.rules()
    assert {rule["name"]: rule.get("lastError") for rule in rules if rule["health"] != "ok"} == {}
    assert [rule["name"] for rule in rules if rule["type"] == "alerting" and rule["state"] == "firing"] == []


def test_replicas_of_one_store_agree_in_what_prometheus_sees(watched: tuple[PrometheusServer, Clients]) -> None:
    prometheus, clients = watched
    clients.go_round()
    seen = "promptmux_store_position > 0"

    wait_until(lambda: len({sample.value for sample in prometheus.query(seen)}) == 1)
    assert len(prometheus.query(seen)) == 2
    assert [sample.value for sample in prometheus.query("job:promptmux_builds:count")] == [1]
