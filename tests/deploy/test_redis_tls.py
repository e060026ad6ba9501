"""The component redis-tls: its very command line and probes, on a real Redis and with real certificates."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import rendered
from rendered import K8S, Object, container, name, of_kind, pod_spec

from laps.ports import free_ports
from laps.security.tls import TlsFiles
from laps.settings import Settings
from scheduler_svc.main import store_tls
from scheduler_svc.store.server import redis_binary
from scheduler_svc.store.store import Store
from tests.certificates import Authority

PASSWORD = "development-only"


@pytest.fixture
def objects(tmp_path: Path) -> list[Object]:
    return rendered.render_with(("mutual-tls", "redis-tls"), tmp_path, "dev")


def statefulset(objects: list[Object]) -> Object:
    (found,) = of_kind(objects, "StatefulSet")
    return found


def test_it_mounts_a_certificate_by_the_name_that_the_scheduler_calls(objects: list[Object]) -> None:
    (made,) = (each["spec"] for each in of_kind(objects, "Certificate") if name(each) == "redis")
    issuers = {name(each) for each in of_kind(objects, "Issuer")}
    assert made["issuerRef"]["name"] in issuers
    volumes = {each["name"]: each for each in pod_spec(statefulset(objects))["volumes"]}
    assert volumes["tls"]["secret"]["secretName"] == made["secretName"]
    assert {"name": "tls", "mountPath": "/tls", "readOnly": True} in container(statefulset(objects))[
        "volumeMounts"
    ]
    (service,) = (each for each in of_kind(objects, "Service") if name(each) == "redis")
    assert name(service) in made["dnsNames"]
    # Its port and its users stay what they were.
    assert [each["containerPort"] for each in container(statefulset(objects))["ports"]] == [6379]


class Server:
    """The pod's command as a local process. `path` is what stands in the place of a container's."""

    def __init__(self, objects: list[Object], folder: Path) -> None:
        self.container = container(statefulset(objects))
        self.folder = folder
        (self.port,) = free_ports(1)
        (config,) = (each["data"] for each in of_kind(objects, "ConfigMap") if "redis.conf" in each["data"])
        users = rendered.secret_values(objects, "laps-redis")["users.acl"]
        for path, text in {"redis.conf": self.here(config["redis.conf"]), "acl/users.acl": users}.items():
            file = folder / "etc/redis" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        (folder / "data").mkdir()
        self.authority = Authority()
        self.files = self.authority.write(folder / "made", "redis", "localhost", "127.0.0.1")
        (folder / "tls").mkdir()
        for made, mounted in zip(self.files_of(self.files), ("tls.crt", "tls.key", "ca.crt"), strict=True):
            shutil.copy(made, folder / "tls" / mounted)

    @staticmethod
    def files_of(files: TlsFiles) -> tuple[str, str, str]:
        return files.certificate, files.key, files.authorities

    def here(self, text: str) -> str:
        text = re.sub(r"(?<![\w/])/(data|tls|etc/redis)\b", rf"{self.folder}/\1", text)
        text = text.replace("bind * -::*", "bind 127.0.0.1").replace("redis-cli", f"redis-cli -p {self.port}")
        return re.sub(r"^(port )?6379$", rf"\g<1>{self.port}", text, flags=re.M)

    def command(self, words: list[str]) -> list[str]:
        here = [self.here(word) for word in words]
        return here[0].split() + here[1:]

    def probe(self, kind: str) -> bool:
        command = self.command(self.container[f"{kind}Probe"]["exec"]["command"])
        return subprocess.run(command, capture_output=True, check=False, timeout=60).returncode == 0


@pytest.fixture
def running(objects: list[Object], tmp_path: Path) -> Iterator[Server]:
    if redis_binary() is None or shutil.which("redis-cli") is None:
        pytest.skip("no redis-server and redis-cli on PATH")
    server = Server(objects, tmp_path)
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(server.command(server.container["command"]), stdout=log, stderr=log)
    deadline_s = time.monotonic() + 90
    while not server.probe("startup"):
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline_s, (tmp_path / "log").read_text()
        time.sleep(0.05)
    yield server
    process.terminate()
    process.wait(90)


async def test_the_scheduler_gets_in_and_nobody_without_a_certificate(running: Server) -> None:
    assert running.probe("readiness")
    assert running.probe("liveness")
    scheduler = running.authority.write(running.folder / "scheduler", "scheduler", "localhost")
    url = f"rediss://laps:{PASSWORD}@localhost:{running.port}/0"
    store = Store(url, "default", **store_tls(Settings(redis_url=url), scheduler))
    await store.load_functions()
    assert await store.lead("a", "127.0.0.1:50052", 60.0)
    await store.close()
    with pytest.raises(redis.ConnectionError):
        redis.Redis.from_url(url, ssl_ca_certs=scheduler.authorities).ping()
    with pytest.raises(redis.ConnectionError):
        redis.Redis.from_url(url.replace("rediss", "redis"), socket_timeout=30).ping()
    other = Authority().write(running.folder / "other", "scheduler", trusted=running.authority.pem)
    shown = {"ssl_certfile": other.certificate, "ssl_keyfile": other.key}
    with pytest.raises(redis.ConnectionError):
        redis.Redis.from_url(url, ssl_ca_certs=other.authorities, **shown).ping()


def test_the_secret_names_the_store_by_tls() -> None:
    script = K8S / "components" / "redis" / "make-secret.sh"
    for scheme in ("redis", "rediss"):
        made = subprocess.run(
            ["sh", str(script), "word"], env={"SCHEME": scheme, "PATH": "/usr/bin:/bin"}, capture_output=True,
            text=True, check=True,
        ).stdout  # fmt: skip
        assert f"LAPS_REDIS_URL: {scheme}://laps:word@redis:6379/0\n" in made
