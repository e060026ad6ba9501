"""What every pod owes: the restricted profile, probes with meanings, limits, time to drain."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import rendered
from rendered import Object, container, name, of_kind, pod_spec

from laps import runtime

SETTING_OF_PORT = {"gateway": "LAPS_PORT", "scheduler": "LAPS_SCHEDULER_PORT", "worker": "LAPS_WORKER_PORT"}
STOP_MARGIN_S = 5
"""Between the end of the drain and the kill. The processes take about a second."""
NAMES_KEPT_S = 30
"""A cluster's resolver answers from its memory for so long."""
WAITS_FOR_DISK_S = 20
"""Redis' shutdown-timeout."""
RESTRICTED_VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected",
    "secret",
}  # fmt: skip


@pytest.fixture
def workloads(objects: list[Object]) -> list[Object]:
    return of_kind(objects, *rendered.WORKLOADS)


def test_restricted_profile(workloads: list[Object]) -> None:
    for workload in workloads:
        spec = pod_spec(workload)
        assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & set(spec)
        security = spec["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] > 0
        assert security["runAsGroup"] > 0
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        own = container(workload)["securityContext"]
        assert own == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        for volume in spec["volumes"]:
            assert set(volume) - {"name"} <= RESTRICTED_VOLUMES
            if "emptyDir" in volume:
                assert volume["emptyDir"]["sizeLimit"]
        assert not any("hostPort" in port for port in container(workload)["ports"])


def test_no_token_and_no_service_variables(objects: list[Object], workloads: list[Object]) -> None:
    for account in of_kind(objects, "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False
    for workload in workloads:
        assert pod_spec(workload)["automountServiceAccountToken"] is False
        assert pod_spec(workload)["enableServiceLinks"] is False
    accounts = [pod_spec(workload)["serviceAccountName"] for workload in workloads]
    assert len(set(accounts)) == len(accounts), "one account a role"


def test_resources(workloads: list[Object]) -> None:
    for workload in workloads:
        resources = container(workload)["resources"]
        for kind in ("requests", "limits"):
            assert {"cpu", "memory", "ephemeral-storage"} <= set(resources[kind]), name(workload)
        assert _bytes(resources["requests"]["memory"]) <= _bytes(resources["limits"]["memory"])


def test_optional_components_take_nothing_away(tmp_path: Path) -> None:
    objects = rendered.render_with(rendered.OPTIONAL, tmp_path)
    workloads = of_kind(objects, *rendered.WORKLOADS)
    assert len(workloads) == 4
    test_restricted_profile(workloads)
    test_no_token_and_no_service_variables(objects, workloads)
    test_resources(workloads)
    for workload in workloads:
        assert all(container(workload)[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness"))


def test_redis_fits_its_container(objects: list[Object]) -> None:
    """A rewrite of the log forks, and may copy all that is in memory."""
    conf = (rendered.K8S / "components/redis/redis.conf").read_text()
    (maxmemory,) = re.findall(r"^maxmemory (\d+)gb$", conf, flags=re.M)
    for workload in of_kind(objects, "StatefulSet"):
        assert _bytes(container(workload)["resources"]["limits"]["memory"]) >= 2 * int(maxmemory) * 2**30


def test_each_probe_asks_what_it_means(objects: list[Object], workloads: list[Object]) -> None:
    for workload in workloads:
        only = container(workload)
        if rendered.role(workload) == "redis":
            assert all(only[f"{kind}Probe"]["exec"] for kind in ("startup", "readiness", "liveness"))
            continue
        port = int(rendered.environment(objects, workload)[SETTING_OF_PORT[rendered.role(workload)]])
        assert port in {each["containerPort"] for each in only["ports"]}
        # A scheduler's absence must not restart the workers of a pool, nor a standby's the standby.
        for kind, health in (
            ("startup", runtime.ALIVE),
            ("readiness", runtime.READY),
            ("liveness", runtime.ALIVE),
        ):
            assert only[f"{kind}Probe"]["grpc"] == {"port": port, "service": health}
        assert only["livenessProbe"]["failureThreshold"] * only["livenessProbe"]["periodSeconds"] >= 60


def test_time_to_stop_covers_pre_stop_and_drain(objects: list[Object], workloads: list[Object]) -> None:
    for workload in workloads:
        pre_stop = container(workload).get("lifecycle", {}).get("preStop", {}).get("sleep", {})
        drain_s = float(rendered.environment(objects, workload).get("LAPS_DRAIN_S", WAITS_FOR_DISK_S))
        least_s = pre_stop.get("seconds", 0) + drain_s + STOP_MARGIN_S
        assert pod_spec(workload)["terminationGracePeriodSeconds"] >= least_s, name(workload)
        # Only what a Service sends new work to has a reason to wait for it to stop coming.
        assert bool(pre_stop) == (rendered.role(workload) == "gateway")


def test_rollouts_cannot_wait_for_each_other(workloads: list[Object]) -> None:
    for workload in workloads:
        rolling = workload["spec"].get("strategy", {}).get("rollingUpdate")
        if rendered.role(workload) == "scheduler":
            assert rolling == {"maxSurge": 1, "maxUnavailable": 0}, "one stands by before another goes"
            assert workload["spec"]["minReadySeconds"] > NAMES_KEPT_S
        elif rendered.role(workload) == "worker":
            assert rolling["maxSurge"] == 0, "a surge would wait for a device that the old one holds"


def test_gpu_workers() -> None:
    for overlay in ("gpu", "ha"):
        for workload in of_kind(rendered.render(overlay), "Deployment"):
            spec, only = pod_spec(workload), container(workload)
            gpus = only["resources"]["limits"].get("nvidia.com/gpu", 0)
            if rendered.role(workload) != "worker":
                assert gpus == 0
                assert "nodeSelector" not in spec
                continue
            assert gpus == 1
            assert only["image"].startswith("laps-cuda:")
            assert spec["nodeSelector"] == {"nvidia.com/gpu.present": "true"}
            assert [each["key"] for each in spec["tolerations"]] == ["nvidia.com/gpu"]
            (shm,) = (volume for volume in spec["volumes"] if volume["name"] == "shm")
            assert shm["emptyDir"]["medium"] == "Memory"
            assert {"name": "shm", "mountPath": "/dev/shm"} in only["volumeMounts"]


def _bytes(quantity: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(Mi|Gi)", quantity).groups()  # type: ignore[union-attr]
    return int(number) << {"Mi": 20, "Gi": 30}[unit]
