"""The Grafana dashboard: panels that lie beside each other, variables that exist, every metric of the server shown.

That each query has an answer is shown by tests/integration/operations, which asks a real Prometheus.
"""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.metrics import PREFIX, Metrics
from tests.unit.deploy.test_prometheus_rules import OF_PROMETHEUS, RECORDED, named_in, sample_names

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "deploy/grafana"
DASHBOARD: dict[str, Any] = json.loads((FOLDER / "dashboards/promptmux.json").read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
WITH_QUERIES = [panel for panel in PANELS if panel["type"] != "row"]
NUM_COLUMNS = 24
# Grafana's own, beside those that the dashboard defines.
BUILT_IN = {"__rate_interval"}


def cells(panel: dict[str, Any]) -> set[tuple[int, int]]:
    at = panel["gridPos"]
    return set(itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])))


def test_schema_is_one_that_grafana_need_not_migrate_from_far() -> None:
    assert DASHBOARD["schemaVersion"] >= 39
    assert {"uid", "title", "time", "templating", "annotations"} <= set(DASHBOARD)
    # Where it is set, an import overwrites whatever has that number.
    assert "id" not in DASHBOARD


def test_panels_have_their_own_numbers_and_places() -> None:
    ids = [panel["id"] for panel in PANELS]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in PANELS:
        own = cells(panel)
        assert not own & taken, panel["title"]
        assert max(x for x, _ in own) < NUM_COLUMNS, panel["title"]
        taken |= own


def test_rows_are_those_that_the_guide_names() -> None:
    rows = [panel["title"] for panel in PANELS if panel["type"] == "row"]
    guide = (ROOT / "docs/operations.md").read_text()
    assert rows
    for row in rows:
        assert row.lower() in guide.lower(), row


@pytest.mark.parametrize("panel", WITH_QUERIES, ids=lambda panel: panel["title"])
def test_panel_says_what_it_shows_and_asks_the_chosen_prometheus(panel: dict[str, Any]) -> None:
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    assert panel["title"]
    assert panel["description"].endswith(".")
    assert panel["datasource"] == chosen
    references = [target["refId"] for target in panel["targets"]]
    assert references
    assert len(set(references)) == len(references)
    for target in panel["targets"]:
        assert target["datasource"] == chosen
        assert target["range"] != target["instant"]


@pytest.mark.parametrize("panel", WITH_QUERIES, ids=lambda panel: panel["title"])
def test_query_names_only_metrics_and_variables_that_exist(panel: dict[str, Any]) -> None:
    known = sample_names() | {rule["record"] for rule in RECORDED} | OF_PROMETHEUS
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]} | BUILT_IN
    for target in panel["targets"]:
        named = named_in(target["expr"])
        assert named
        assert named <= known
        assert set(re.findall(r"\$\{?(\w+)", target["expr"])) <= variables
        # Another deployment's series would be counted in.
        assert target["expr"].count('job="$job"') == len(
            re.findall(r"\b(?:job:promptmux|promptmux_|process_|up\{)", target["expr"])
        )


def test_every_metric_of_the_server_is_shown() -> None:
    recorded = {rule["record"]: rule["expr"] for rule in RECORDED}
    asked = " ".join(target["expr"] for panel in WITH_QUERIES for target in panel["targets"])
    while used := [name for name in recorded if name in asked]:
        asked += " ".join(recorded.pop(name) for name in used)
    names = {family.name for family in Metrics().registry.collect() if family.name.startswith(PREFIX)}
    shown = {re.sub(r"_(total|bucket|sum|count|info)$", "", found) for found in named_in(asked)}

    assert names - shown == set()


def test_variables_choose_prometheus_deployment_and_replicas() -> None:
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    for name in ("job", "instance"):
        assert variables[name]["datasource"]["uid"] == "${datasource}"
        assert named_in(variables[name]["definition"].replace("label_values", "")) <= sample_names()
    assert variables["instance"]["multi"]


def test_grafana_of_the_compose_file_finds_dashboard_and_prometheus() -> None:
    compose = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())["services"]
    mounts = dict(volume.split(":")[:2] for volume in compose["grafana"]["volumes"])
    (provider,) = yaml.safe_load((FOLDER / "provisioning/dashboards/promptmux.yml").read_text())["providers"]
    (source,) = yaml.safe_load((FOLDER / "provisioning/datasources/prometheus.yml").read_text())["datasources"]

    assert mounts["./grafana/dashboards"] == provider["options"]["path"]
    assert mounts["./grafana/provisioning"] == "/etc/grafana/provisioning"
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in compose
    scrape_interval = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())["global"][
        "scrape_interval"
    ]
    assert source["jsonData"]["timeInterval"] == scrape_interval
