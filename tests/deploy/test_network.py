"""The network policies, evaluated: who reaches whom is the call graph and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
import rendered
from rendered import Object, of_kind, selects

Edge = tuple[str, str, int, str]
"""From, to, port, protocol."""


@dataclass(frozen=True)
class Peer:
    """A pod, or with an address something outside the cluster."""

    name: str
    namespace: str = "laps"
    labels: dict[str, str] = field(default_factory=dict, hash=False)
    address: str = ""


NAMESPACES = {
    "laps": {"kubernetes.io/metadata.name": "laps"},
    "apps": {"kubernetes.io/metadata.name": "apps", "laps-client": "true"},
    "strangers": {"kubernetes.io/metadata.name": "strangers"},
    "monitoring": {"kubernetes.io/metadata.name": "monitoring"},
    "kube-system": {"kubernetes.io/metadata.name": "kube-system"},
}
OUTSIDE = (
    Peer("client", "laps", {"laps-client": "true"}),
    Peer("app", "apps"),
    Peer("neighbour", "laps", {"app": "something"}),
    Peer("stranger", "strangers", {"laps-client": "true", "app.kubernetes.io/name": "prometheus"}),
    Peer("prometheus", "monitoring", {"app.kubernetes.io/name": "prometheus"}),
    Peer("grafana", "monitoring", {"app.kubernetes.io/name": "grafana"}),
    Peer("dns", "kube-system", {"k8s-app": "kube-dns"}),
    Peer("kube-proxy", "kube-system", {"k8s-app": "kube-proxy"}),
    Peer("store", address="192.0.2.10"),
    Peer("internet", address="198.51.100.7"),
)
PORTS = [(port, "TCP") for port in (50051, 8000, 50052, 50053, 6379, 9090, 53, 443)] + [(53, "UDP")]


def edges(objects: list[Object]) -> set[Edge]:
    pods = [
        Peer(rendered.name(workload), "laps", rendered.pod_labels(workload))
        for workload in of_kind(objects, *rendered.WORKLOADS)
    ]
    policies = of_kind(objects, "NetworkPolicy")
    peers = [*pods, *OUTSIDE]
    return {
        (source.name, target.name, port, protocol)
        for source in peers
        for target in peers
        for port, protocol in PORTS
        # Between two that no policy of ours concerns, everything is open and nothing is ours to say.
        if (is_ours(source) or is_ours(target)) and source is not target
        if allows(policies, "Egress", source, target, port, protocol)
        if allows(policies, "Ingress", target, source, port, protocol)
    }


def is_ours(peer: Peer) -> bool:
    return peer.namespace == "laps" and not peer.address


def allows(
    policies: list[Object], direction: str, concerned: Peer, other: Peer, port: int, protocol: str
) -> bool:
    if not is_ours(concerned):
        return True
    concerning = [
        policy["spec"]
        for policy in policies
        if direction in policy["spec"]["policyTypes"]
        and selects(policy["spec"]["podSelector"], concerned.labels)
    ]
    if not concerning:
        return True
    end = {"Egress": "to", "Ingress": "from"}[direction]
    return any(
        any(matches(each, other) for each in rule[end])
        and any((each["port"], each["protocol"]) == (port, protocol) for each in rule["ports"])
        for spec in concerning
        for rule in spec.get(direction.lower(), [])
    )


def matches(end: dict[str, Any], peer: Peer) -> bool:
    if "ipBlock" in end:
        return bool(peer.address) and ip_address(peer.address) in ip_network(end["ipBlock"]["cidr"])
    if peer.address:
        return False
    if "namespaceSelector" in end:
        if not selects(end["namespaceSelector"], NAMESPACES[peer.namespace]):
            return False
    elif peer.namespace != "laps":
        return False
    return selects(end.get("podSelector", {}), peer.labels)


def call_graph(suffix: str, store: str) -> set[Edge]:
    """DESIGN: clients call gateways, gateways and workers call the scheduler, it alone calls the store."""
    gateway, scheduler, worker = (f"{role}{suffix}" for role in ("gateway", "scheduler", "worker"))
    return {
        ("client", gateway, 50051, "TCP"),
        ("app", gateway, 50051, "TCP"),
        ("client", gateway, 8000, "TCP"),
        ("app", gateway, 8000, "TCP"),
        ("prometheus", gateway, 9090, "TCP"),
        ("prometheus", scheduler, 9090, "TCP"),
        (gateway, scheduler, 50052, "TCP"),
        (worker, scheduler, 50052, "TCP"),
        (scheduler, store, 6379, "TCP"),
    }


def dns(*names: str) -> set[Edge]:
    return {(each, "dns", 53, protocol) for each in names for protocol in ("TCP", "UDP")}


@pytest.mark.parametrize("overlay", ["dev", "gpu"])
def test_edges_are_the_call_graph(overlay: str) -> None:
    everyone = dns("gateway", "scheduler", "worker", "redis", "client", "neighbour")
    assert edges(rendered.render(overlay)) == call_graph("", "redis") | everyone


def test_edges_of_two_pools_are_apart() -> None:
    everyone = dns("client", "neighbour")
    expected = set()
    for suffix in ("-chat", "-code"):
        expected |= call_graph(suffix, "store")
        everyone |= dns(*(f"{role}{suffix}" for role in ("gateway", "scheduler", "worker")))
    assert edges(rendered.render("ha")) == expected | everyone


def test_ports_of_the_policies_are_ports_of_the_containers(objects: list[Object]) -> None:
    """Numbers, because not every network plugin resolves names; so they could come apart."""
    listening = {
        port["containerPort"]
        for workload in of_kind(objects, *rendered.WORKLOADS)
        for port in rendered.container(workload)["ports"]
    }
    for policy in of_kind(objects, "NetworkPolicy"):
        for rule in policy["spec"].get("ingress", []):
            assert {each["port"] for each in rule["ports"]} <= listening
