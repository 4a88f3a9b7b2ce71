"""Prometheus' rules and alerts: promtool's own tests of them, that each has some, and that they name what exists."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import Metric

from server.metrics import Metrics
from tests.prometheus import promtool

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "deploy/prometheus"
RULE_FILES = sorted((FOLDER / "rules").glob("*.yml"))
TEST_FILES = sorted((FOLDER / "tests").glob("*.yml"))
SEVERITIES = {"critical", "warning"}
# Prometheus makes these itself.
OF_PROMETHEUS = {"up", "ALERTS"}


def rules() -> list[dict[str, Any]]:
    return [
        rule for file in RULE_FILES for group in yaml.safe_load(file.read_text())["groups"] for rule in group["rules"]
    ]


RECORDED = [rule for rule in rules() if "record" in rule]
ALERTS = [rule for rule in rules() if "alert" in rule]
TESTS: list[dict[str, Any]] = [test for file in TEST_FILES for test in yaml.safe_load(file.read_text())["tests"]]


def sample_names() -> set[str]:
    """Every name under which the server exposes a sample."""
    metrics = Metrics()
    collected: Iterator[Metric] = iter(metrics.registry.collect())
    names = set()
    for family in collected:
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "info": ("_info",)}
        names |= {family.name + suffix for suffix in suffixes.get(family.type, ("",))}
    return names


def named_in(expression: str) -> set[str]:
    """The metrics and recorded rules that an expression names."""
    without_labels = re.sub(r"\{[^}]*\}", "", expression)
    return set(re.findall(r"\b(?:job:promptmux\w+:\w+|promptmux_\w+|process_\w+|up|ALERTS)\b", without_labels))


def labels_named_in(expression: str) -> Iterator[tuple[str, set[str]]]:
    """The labels by which an expression selects, by metric."""
    for name, selector in re.findall(r"\b(promptmux_\w+)\{([^}]*)\}", expression):
        yield name, set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector))


def test_prometheus_takes_the_configuration_and_all_rules() -> None:
    promtool("check", "config", "--lint=all", "--lint-fatal", FOLDER / "prometheus.yml")


def test_rules_do_in_promtool_what_their_tests_say() -> None:
    promtool("test", "rules", *TEST_FILES)


@pytest.mark.parametrize("rule", RECORDED, ids=lambda rule: rule["record"])
def test_each_recorded_rule_has_a_value_in_a_test(rule: dict[str, Any]) -> None:
    checks = [check for test in TESTS for check in test.get("promql_expr_test", ())]
    assert any(rule["record"] in check["expr"] and check["exp_samples"] for check in checks)


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_each_alert_has_a_test_in_which_it_fires_and_one_in_which_it_does_not(rule: dict[str, Any]) -> None:
    checks = [
        check for test in TESTS for check in test.get("alert_rule_test", ()) if check["alertname"] == rule["alert"]
    ]
    assert any(check["exp_alerts"] for check in checks)
    assert any(not check["exp_alerts"] for check in checks)


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.get("record") or rule["alert"])
def test_rule_names_only_metrics_and_labels_that_exist(rule: dict[str, Any]) -> None:
    recorded = {other["record"] for other in RECORDED}
    named = named_in(rule["expr"])

    assert named
    assert named <= sample_names() | recorded | OF_PROMETHEUS
    own_labels = {
        f"promptmux_{name}": set(metric._labelnames)
        for name, metric in vars(Metrics()).items()
        if hasattr(metric, "_labelnames")
    }
    for name, labels in labels_named_in(rule["expr"]):
        metric = re.sub(r"_(bucket|sum|count)$", "", name)
        assert labels <= own_labels[metric] | ({"le"} if name.endswith("_bucket") else set())


def test_bounds_that_rules_select_are_bounds_of_the_buckets() -> None:
    bounds = {str(bound) for bound in Metrics().time_to_first_token_seconds._upper_bounds}
    chosen = {bound for rule in rules() for bound in re.findall(r'le="([^"]+)"', rule["expr"])}
    assert chosen
    assert chosen <= bounds


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_alert_says_how_bad_it_is_and_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in SEVERITIES
    assert {"summary", "description", "runbook_url"} == set(rule["annotations"])
    page, anchor = rule["annotations"]["runbook_url"].split("#")
    headings = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(), re.MULTILINE)
    assert anchor in {heading.lower() for heading in headings}
    assert anchor == rule["alert"].lower()
