"""Objects for operators that a cluster may have. No schema knows them here, so their parts are followed."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import rendered
from prometheus_client import Histogram
from rendered import Object, container, name, of_kind, pod_labels, selects

from scheduler_svc.metrics import Refusals, SchedulerCollector


def test_pod_monitors_find_what_has_metrics(tmp_path: Path) -> None:
    objects = rendered.render_with("prometheus-operator", tmp_path)
    found = set()
    for monitor in of_kind(objects, "PodMonitor"):
        (workload,) = (
            each
            for each in of_kind(objects, *rendered.WORKLOADS)
            if selects(monitor["spec"]["selector"], pod_labels(each))
        )
        found.add(rendered.role(workload))
        ports = {port["name"]: port["containerPort"] for port in container(workload)["ports"]}
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        metrics_port = rendered.environment(objects, workload)["LAPS_METRICS_PORT"]
        assert ports[endpoint["port"]] == int(metrics_port)
    assert found == {"gateway", "scheduler"}


@pytest.fixture
def scaled(tmp_path: Path) -> list[Object]:
    return rendered.render_with("keda", tmp_path)


def test_scaler_scales_the_workers_and_nobody_else_does(scaled: list[Object]) -> None:
    (scaler,) = of_kind(scaled, "ScaledObject")
    (worker,) = (
        w for w in of_kind(scaled, "Deployment") if name(w) == scaler["spec"]["scaleTargetRef"]["name"]
    )
    assert rendered.role(worker) == "worker"
    assert "replicas" not in worker["spec"]


def test_scaler_asks_for_metrics_that_there_are(scaled: list[Object]) -> None:
    (scaler,) = of_kind(scaled, "ScaledObject")
    names = set()
    for trigger in scaler["spec"]["triggers"]:
        metric, pool = re.fullmatch(
            r'max\((laps_\w+)\{pool="([^"]+)"\}\)', trigger["metadata"]["query"]
        ).groups()  # type: ignore[union-attr]
        (scheduler,) = (w for w in of_kind(scaled, "Deployment") if rendered.role(w) == "scheduler")
        assert pool == rendered.environment(scaled, scheduler)["LAPS_POOL"]
        names.add(metric)
    assert names == {"laps_backlog_seconds", "laps_longest_wait_seconds"}
    assert names <= leaders_metrics()


def test_no_data_is_no_backlog_of_zero(scaled: list[Object]) -> None:
    (scaler,) = of_kind(scaled, "ScaledObject")
    assert [each["metadata"]["ignoreNullValues"] for each in scaler["spec"]["triggers"]] == ["false"] * 2


def test_each_pool_of_several_has_a_scaler_that_asks_for_it(tmp_path: Path) -> None:
    shutil.copytree(rendered.K8S, tmp_path / "k8s")
    file = tmp_path / "k8s" / "overlays" / "ha" / "pool" / "kustomization.yaml"
    written = file.read_text()
    file.write_text(written.replace("components:\n", "components:\n  - ../../../components/keda\n"))
    built = rendered.objects(rendered.build(tmp_path / "k8s" / "overlays" / "ha"))
    asked = {
        name(each): {trigger["metadata"]["query"] for trigger in each["spec"]["triggers"]}
        for each in of_kind(built, "ScaledObject")
    }
    assert asked == {
        f"worker-{pool}": {
            f'max(laps_backlog_seconds{{pool="{pool}"}})',
            f'max(laps_longest_wait_seconds{{pool="{pool}"}})',
        }
        for pool in ("chat", "code")
    }


def leaders_metrics() -> set[str]:
    """Names of the gauges of a scheduler that leads an empty pool."""
    from scheduler_svc.core.policies import make_policy
    from scheduler_svc.core.scheduler import Scheduler
    from scheduler_svc.core.settings import SchedulerSettings

    class Leading:
        core = Scheduler("default", make_policy("laps-sd"), SchedulerSettings(), 1)
        epoch, ticks = 1, 0
        commit_times = Histogram("laps_commit_seconds", "?", ["pool"], registry=None)

        def now_s(self) -> float:
            return 0.0

    collector = SchedulerCollector("default", Leading, lambda: True, Refusals("default"))  # type: ignore[arg-type]
    return {family.name for family in collector.collect()}


def test_scaler_fits_the_workers_slots(scaled: list[Object]) -> None:
    (scaler,) = of_kind(scaled, "ScaledObject")
    (worker,) = (w for w in of_kind(scaled, "Deployment") if rendered.role(w) == "worker")
    slots = int(rendered.environment(scaled, worker)["LAPS_SLOTS"])
    threshold_s = float(scaler["spec"]["triggers"][0]["metadata"]["threshold"])
    assert threshold_s == slots * 15
