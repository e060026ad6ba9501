"""Dashboards, rules and metrics, as the tests need them."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from rendered import DEPLOY, ROOT

from gateway.metrics import Metrics

DASHBOARDS = DEPLOY / "grafana" / "dashboards"
RULES = DEPLOY / "prometheus" / "rules.yaml"
VARIABLES = {"$pool": ".*", "$__rate_interval": "1m"}
"""What Grafana would put in."""


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"no {name}: Debian's package prometheus brings one")
    return found


def promtool(*arguments: str | Path) -> str:
    done = subprocess.run(
        [tool("promtool"), *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def alerts() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def panel_expressions() -> list[tuple[str, str]]:
    """(dashboard and panel, expression)"""
    return [
        (f"{path.stem}: {panel['title']}", target["expr"])
        for path in sorted(DASHBOARDS.glob("*.json"))
        for panel in json.loads(path.read_text())["panels"]
        for target in panel["targets"]
    ]


def with_values(expression: str) -> str:
    for variable, value in VARIABLES.items():
        expression = expression.replace(variable, value)
    return expression


def metrics_used(expression: str) -> dict[str, set[str]]:
    """Sample names, and the labels that are asked of them by matchers or by grouping."""
    groupings = [
        label.strip() for labels in re.findall(r"\bby \(([^)]*)\)", expression) for label in labels.split(",")
    ]
    used: dict[str, set[str]] = {}
    for name, matchers in re.findall(r"\b(laps_\w+)(?:\{([^}]*)\})?", expression):
        used.setdefault(name, set()).update(re.findall(r"(\w+)\s*[=!]", matchers), groupings)
    return used


def docs_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def exported() -> dict[str, set[str]]:
    """Every sample that gateways and schedulers can export, with its labels."""
    samples: dict[str, set[str]] = {}
    # Families without a series yet do not tell their labels.
    collectors = Metrics().registry._collector_to_names
    declared = {each._name: each._labelnames for each in collectors if hasattr(each, "_name")}
    for family in docs_module().metric_families():
        labels = set(declared.get(family.name, getattr(family, "_labelnames", ()))) or {
            label for sample in family.samples for label in sample.labels
        }
        names = {sample.name for sample in family.samples} | {family.name}
        if family.type == "counter":
            names.add(f"{family.name}_total")
        if family.type == "histogram":
            names |= {f"{family.name}_{part}" for part in ("bucket", "sum", "count")}
            labels |= {"le"}
        for name in names:
            samples.setdefault(name, set()).update(labels)
    return samples
