"""The component mutual-tls: certificates with the roles that the services know, probes that show one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import rendered
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rendered import DEPLOY, Object, container, name, of_kind

from laps import channels
from laps.security.access import Role
from laps.settings import Settings
from tests.certificates import Authority
from tests.servers import listening


@pytest.fixture
def objects(tmp_path: Path) -> list[Object]:
    return rendered.render_with("mutual-tls", tmp_path)


def certificates(objects: list[Object]) -> dict[str, Object]:
    return {name(each): each["spec"] for each in of_kind(objects, "Certificate")}


def test_each_service_has_a_certificate_of_its_role(objects: list[Object]) -> None:
    made = certificates(objects)
    issuers = {name(each) for each in of_kind(objects, "Issuer")}
    assert made.pop("authority")["isCA"]
    assert set(made) == {"gateway", "scheduler", "worker"}
    for role, spec in made.items():
        assert spec["uris"] == [f"spiffe://{Settings().tls_trust_domain}/{role}"]
        assert {"client auth", "server auth"} <= set(spec["usages"])
        assert spec["issuerRef"]["name"] in issuers
        assert not spec.get("isCA")
    assert {Role.GATEWAY, Role.WORKER} <= set(made)
    assert len({spec["secretName"] for spec in made.values()}) == 3, "no service has another's key"


def test_each_pod_has_its_own_certificate_and_uses_it(objects: list[Object]) -> None:
    made = certificates(objects)
    for workload in of_kind(objects, "Deployment"):
        role = rendered.role(workload)
        values = rendered.environment(objects, workload)
        folder = Path(values["LAPS_TLS_CERT"]).parent
        assert values["LAPS_TLS_CERT"] == f"{folder}/tls.crt"
        assert values["LAPS_TLS_KEY"] == f"{folder}/tls.key"
        assert values["LAPS_TLS_CA"] == f"{folder}/ca.crt"
        (mount,) = (each for each in container(workload)["volumeMounts"] if each["mountPath"] == str(folder))
        assert mount["readOnly"] is True
        assert "subPath" not in mount, "such a mount does not follow a renewed Secret"
        volumes = workload["spec"]["template"]["spec"]["volumes"]
        (volume,) = (each for each in volumes if each["name"] == mount["name"])
        assert volume["secret"]["secretName"] == made[role]["secretName"]


def test_workers_and_gateways_find_the_scheduler_by_a_name_of_its_certificate(objects: list[Object]) -> None:
    for workload in of_kind(objects, "Deployment"):
        if rendered.role(workload) != "scheduler":
            host = rendered.environment(objects, workload)["LAPS_SCHEDULER_ADDRESS"].split(":")[-2]
            assert host.removeprefix("dns:///") in certificates(objects)["scheduler"]["dnsNames"]


def test_clients_find_the_gateway_by_every_name_that_its_service_has(objects: list[Object]) -> None:
    (service,) = (each for each in of_kind(objects, "Service") if name(each) == "gateway")
    namespace = service["metadata"]["namespace"]
    endings = ("", f".{namespace}", f".{namespace}.svc", f".{namespace}.svc.cluster.local")
    assert {f"gateway{ending}" for ending in endings} <= set(certificates(objects)["gateway"]["dnsNames"])


def test_the_gateways_service_says_that_all_its_ports_speak_tls(objects: list[Object]) -> None:
    (service,) = (each for each in of_kind(objects, "Service") if name(each) == "gateway")
    assert {each["name"]: each["appProtocol"] for each in service["spec"]["ports"]} == {
        "grpc": "https",
        "http": "https",
    }


def test_the_scheduler_is_not_open_any_more(objects: list[Object]) -> None:
    (scheduler,) = (w for w in of_kind(objects, "Deployment") if rendered.role(w) == "scheduler")
    assert rendered.environment(objects, scheduler)["LAPS_ALLOW_UNAUTHENTICATED"] == "false"


def test_no_probe_is_the_kubelets_own_which_speaks_no_tls(objects: list[Object]) -> None:
    for workload in of_kind(objects, "Deployment"):
        only = container(workload)
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert "grpc" not in only[kind]
            program, script, port, asked = only[kind]["exec"]["command"]
            assert (program, script) == ("python", "/app/deploy/docker/health.py")
            assert int(port) in {each["containerPort"] for each in only["ports"]}
            assert asked == ("laps.ready" if kind == "readinessProbe" else "laps.alive")


def test_a_worker_has_as_long_to_load_its_models_as_without(objects: list[Object]) -> None:
    def patience_s(objects: list[Object]) -> int:
        (worker,) = (w for w in of_kind(objects, "Deployment") if rendered.role(w) == "worker")
        probe = container(worker)["startupProbe"]
        return probe["periodSeconds"] * probe["failureThreshold"]

    assert patience_s(objects) == patience_s(rendered.render("gpu")) >= 1800


async def test_the_probe_shows_the_pods_certificate(tmp_path: Path) -> None:
    import asyncio

    files = Authority().write(tmp_path, "worker", "localhost", "spiffe://laps/worker")

    class Health(health_pb2_grpc.HealthServicer):
        async def Check(self, request: object, context: object) -> health_pb2.HealthCheckResponse:
            return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)

    server = channels.new_server()
    health_pb2_grpc.add_HealthServicer_to_server(Health(), server)
    variables = {
        "LAPS_TLS_CERT": files.certificate,
        "LAPS_TLS_KEY": files.key,
        "LAPS_TLS_CA": files.authorities,
        "http_proxy": "http://127.0.0.1:9",
        "no_proxy": "",
        "NO_PROXY": "",
    }

    def probe(port: int, environment: dict[str, str]) -> int:
        command = [sys.executable, str(DEPLOY / "docker/health.py"), str(port), "laps.ready"]
        return subprocess.run(
            command, env=os.environ | environment, capture_output=True, check=False
        ).returncode

    async with listening(server, tls=files) as port:
        assert await asyncio.to_thread(probe, port, variables) == 0
        assert await asyncio.to_thread(probe, port, {}) == 1
