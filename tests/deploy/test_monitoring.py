"""Dashboards and alerts ask for what the code exports, and every alert has its runbook."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import monitoring
import pytest
import rendered
import yaml
from rendered import DEPLOY, ROOT, of_kind

SCRAPED = {"instance", "job"}
"""Labels that Prometheus adds."""


@pytest.mark.parametrize(
    ("where", "expression"),
    monitoring.panel_expressions() + [(rule["alert"], rule["expr"]) for rule in monitoring.alerts()],
)
def test_expressions_ask_for_metrics_that_there_are(where: str, expression: str) -> None:
    exported = monitoring.exported()
    used = monitoring.metrics_used(expression)
    assert used, where
    for name, labels in used.items():
        assert name in exported, f"{where}: {name} is exported by nobody"
        assert labels <= exported[name] | SCRAPED, f"{where}: {name} has no {labels - exported[name]}"


def test_a_wrong_expression_would_be_noticed() -> None:
    used = monitoring.metrics_used('sum by (pool, le) (rate(laps_x_bucket{code=~"a"}[5m]))')
    assert used == {"laps_x_bucket": {"pool", "le", "code"}}
    assert "laps_x_bucket" not in monitoring.exported()
    assert "code" not in monitoring.exported()["laps_queued_requests"]


def test_rules_are_rules_and_fire_when_they_should() -> None:
    monitoring.promtool("check", "rules", monitoring.RULES)
    monitoring.promtool("check", "config", DEPLOY / "prometheus" / "prometheus.yaml")
    monitoring.promtool("test", "rules", DEPLOY / "prometheus" / "rules-test.yaml")


def test_every_alert_is_played_and_has_a_runbook() -> None:
    names = {rule["alert"] for rule in monitoring.alerts()}
    runbooks = re.findall(r"^### (Laps\w+)$", (ROOT / "docs" / "operations.md").read_text(), flags=re.M)
    assert set(runbooks) == names
    assert len(runbooks) == len(names)
    for rule in monitoring.alerts():
        assert rule["annotations"]["runbook_url"] == f"docs/operations.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
    tests = yaml.safe_load((DEPLOY / "prometheus" / "rules-test.yaml").read_text())["tests"]
    checks = [check for test in tests for check in test["alert_rule_test"]]
    # Both ways: it fires when it should, and it is silent when all is well.
    assert {check["alertname"] for check in checks if check["exp_alerts"]} == names
    assert {check["alertname"] for check in checks if not check["exp_alerts"]} == names


def test_dashboards_are_what_the_script_makes() -> None:
    made = runpy.run_path(str(DEPLOY / "grafana" / "make.py"))["files"]()
    assert {path: path.read_text() for path in monitoring.DASHBOARDS.glob("*.json")} == made


def test_the_operator_gets_the_same_rules_and_grafana_the_dashboards(tmp_path: Path) -> None:
    for folder in ("rules", "dashboards"):
        (tmp_path / folder).mkdir()
    objects = rendered.render_with("prometheus-operator", tmp_path / "rules")
    (rule,) = of_kind(objects, "PrometheusRule")
    assert rule["spec"] == yaml.safe_load(monitoring.RULES.read_text())
    found = [
        each
        for each in of_kind(rendered.render_with("../../grafana", tmp_path / "dashboards"), "ConfigMap")
        if each["metadata"].get("labels", {}).get("grafana_dashboard")
    ]
    assert [set(each["data"]) for each in found] == [{"serving.json", "scheduling.json", "store.json"}]
