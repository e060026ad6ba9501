"""What kustomize makes of the overlays: it builds, it is valid, its parts fit together."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import rendered
import yaml
from rendered import K8S, OVERLAYS, Object, container, name, of_kind, pod_labels, pod_spec, selects

MINORS = ("1.35", "1.36", "1.37")
OPERATORS = ("cert-manager.io", "keda.sh", "monitoring.coreos.com")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_builds_without_a_warning(overlay: str) -> None:
    built = rendered.build(K8S / "overlays" / overlay)
    assert built.returncode == 0, built.stderr
    assert built.stderr == ""


def test_every_overlay_and_component_is_tested_or_used() -> None:
    assert {path.name for path in (K8S / "overlays").iterdir()} == set(OVERLAYS)
    used = "".join(path.read_text() for path in (K8S / "overlays").rglob("kustomization.yaml"))
    unused = {path.name for path in (K8S / "components").iterdir() if f"components/{path.name}" not in used}
    # They need custom resources; see test_custom_resources, test_mutual_tls and test_redis_tls.
    assert unused == set(rendered.OPTIONAL)
    assert " ".join(rendered.OPTIONAL) in (rendered.ROOT / "Makefile").read_text(), "checkov sees them, too"


@pytest.mark.parametrize("minor", MINORS)
def test_valid_for_kubernetes(minor: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    schemas = pytest.importorskip(
        "kubernetes_validate.utils", reason="`pip install kubernetes-validate` brings the schemas"
    )
    # It reads a minor's schemas, some megabytes, anew for each object.
    monkeypatch.setattr(schemas, "schema_contents", functools.cache(schemas.schema_contents))
    for overlay in OVERLAYS:
        for each in rendered.render(overlay):
            schemas.validate(each, minor, strict=True)
    for each in rendered.render_with(rendered.OPTIONAL, tmp_path):
        # What operators' own resources are nobody here knows.
        if each["apiVersion"].split("/")[0] not in OPERATORS:
            schemas.validate(each, minor, strict=True)


@pytest.mark.parametrize(
    "folder", sorted(p.parent for p in (K8S / "overlays").rglob("kustomization.yaml")), ids=str
)
def test_no_component_overrules_what_an_overlay_sets(folder: Path) -> None:
    said = yaml.safe_load((folder / "kustomization.yaml").read_text())
    if said["kind"] == "Component":
        return
    objects = rendered.objects(rendered.build(folder))
    for config in said.get("configMapGenerator", []):
        (made,) = (m for m in of_kind(objects, "ConfigMap") if name(m).startswith(f"{config['name']}-"))
        assert dict(literal.split("=", 1) for literal in config["literals"]).items() <= made["data"].items()


def test_each_pool_has_models_of_its_own() -> None:
    objects = rendered.render("ha")
    for workload in of_kind(objects, "Deployment"):
        if rendered.role(workload) == "worker":
            values = rendered.environment(objects, workload)
            folder = f"/models/{values['LAPS_POOL']}"
            assert (values["LAPS_TARGET"], values["LAPS_DRAFT"]) == (f"{folder}/target", f"{folder}/draft")


def test_names_are_unique(objects: list[Object]) -> None:
    names = [(each["kind"], name(each)) for each in objects]
    assert len(names) == len(set(names))


def test_all_in_one_restricted_namespace(objects: list[Object]) -> None:
    (namespace,) = of_kind(objects, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for each in objects:
        if each["kind"] not in ("Namespace", "PriorityClass"):
            assert each["metadata"]["namespace"] == name(namespace), name(each)


def test_services_and_budgets_select_one_workload_each(objects: list[Object]) -> None:
    workloads = of_kind(objects, *rendered.WORKLOADS)
    budgeted = set()
    for service in of_kind(objects, "Service"):
        chosen = [
            w for w in workloads if selects({"matchLabels": service["spec"]["selector"]}, pod_labels(w))
        ]
        (workload,) = chosen
        ports = {port["name"] for port in container(workload)["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    for budget in of_kind(objects, "PodDisruptionBudget"):
        (workload,) = (w for w in workloads if selects(budget["spec"]["selector"], pod_labels(w)))
        budgeted.add(name(workload))
    assert budgeted == {name(workload) for workload in workloads}


def test_no_budget_forbids_to_drain_a_node(objects: list[Object]) -> None:
    """With one replica it could."""
    for budget in of_kind(objects, "PodDisruptionBudget"):
        assert budget["spec"]["maxUnavailable"] == 1, name(budget)


def test_every_scheduler_can_be_found(objects: list[Object]) -> None:
    """Who looks for the leader asks all of them, so the name must lead to each, and to those that start."""
    for service in of_kind(objects, "Service"):
        if name(service).startswith("scheduler"):
            assert service["spec"]["clusterIP"] == "None"
            assert service["spec"]["publishNotReadyAddresses"] is True


def test_selectors_match_their_own_pods_and_no_other(objects: list[Object]) -> None:
    workloads = of_kind(objects, *rendered.WORKLOADS)
    for workload in workloads:
        chosen = [w for w in workloads if selects(workload["spec"]["selector"], pod_labels(w))]
        assert chosen == [workload]
        own = [each["labelSelector"] for each in pod_spec(workload).get("topologySpreadConstraints", [])]
        anti = pod_spec(workload).get("affinity", {}).get("podAntiAffinity", {})
        own += [
            each["podAffinityTerm"]["labelSelector"]
            for each in anti.get("preferredDuringSchedulingIgnoredDuringExecution", [])
        ]
        own += [
            each["labelSelector"] for each in anti.get("requiredDuringSchedulingIgnoredDuringExecution", [])
        ]
        assert own or rendered.role(workload) == "redis"
        for selector in own:
            assert [w for w in workloads if selects(selector, pod_labels(w))] == [workload]


def test_all_that_pods_refer_to_is_there(objects: list[Object]) -> None:
    there = {(each["kind"], name(each)) for each in objects}
    # Made by hand, by the guide: passwords are not in the repository, except for the dev overlay's.
    there.add(("Secret", "laps-redis"))
    for workload in of_kind(objects, *rendered.WORKLOADS):
        spec = pod_spec(workload)
        wanted = {
            ("ServiceAccount", spec["serviceAccountName"]),
            ("PriorityClass", spec["priorityClassName"]),
        }
        for volume in spec.get("volumes", []):
            if "configMap" in volume:
                wanted.add(("ConfigMap", volume["configMap"]["name"]))
            if "secret" in volume:
                wanted.add(("Secret", volume["secret"]["secretName"]))
            if "persistentVolumeClaim" in volume:
                wanted.add(("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]))
        for source in container(workload).get("envFrom", []):
            wanted.add(("ConfigMap", source["configMapRef"]["name"]))
        assert wanted <= there, name(workload)
        volumes = {v["name"] for v in spec.get("volumes", [])}
        volumes |= {name(claim) for claim in workload["spec"].get("volumeClaimTemplates", [])}
        assert {mount["name"] for mount in container(workload)["volumeMounts"]} == volumes


def test_addresses_in_the_settings_are_services(objects: list[Object]) -> None:
    services = {
        f"{name(service)}:{port['port']}"
        for service in of_kind(objects, "Service")
        for port in service["spec"]["ports"]
    }
    for workload in of_kind(objects, "Deployment"):
        values = rendered.environment(objects, workload)
        assert values["LAPS_SCHEDULER_ADDRESS"] in services
        (scheduler,) = (
            each
            for each in of_kind(objects, "Service")
            if name(each) == values["LAPS_SCHEDULER_ADDRESS"].split(":")[0]
        )
        pool = pod_labels(workload).get("laps-pool")
        assert scheduler["spec"]["selector"].get("laps-pool") == pool


def test_pools_of_the_ha_overlay_are_apart() -> None:
    objects = rendered.render("ha")
    by_pool: dict[str, set[str]] = {}
    for workload in of_kind(objects, "Deployment"):
        pool = rendered.environment(objects, workload)["LAPS_POOL"]
        assert pod_labels(workload)["laps-pool"] == pool
        by_pool.setdefault(pool, set()).add(rendered.role(workload))
    assert by_pool == {pool: {"gateway", "scheduler", "worker"} for pool in ("chat", "code")}


def test_ha_keeps_a_standby_on_another_node() -> None:
    for workload in of_kind(rendered.render("ha"), "Deployment"):
        if rendered.role(workload) == "scheduler":
            assert workload["spec"]["replicas"] == 2
            anti = pod_spec(workload)["affinity"]["podAntiAffinity"]
            (term,) = anti["requiredDuringSchedulingIgnoredDuringExecution"]
            assert term["topologyKey"] == "kubernetes.io/hostname"
