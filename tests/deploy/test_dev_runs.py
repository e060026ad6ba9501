"""The dev overlay's own command lines, environment and probes, run as processes of this machine.

Changed are only: host names of Services to 127.0.0.1, ports to free ones, paths of the image to those of
this checkout. Not tried by this: the images, the read-only root, the network policies.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis
import rendered
from grpc_health.v1 import health_pb2, health_pb2_grpc
from redis.backoff import NoBackoff
from redis.retry import Retry
from rendered import ROOT, Object, container, of_kind

from laps import channels
from laps.client import AsyncClient
from laps.ports import free_ports
from scheduler_svc.store.server import redis_binary, valkey_binary

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]

READY_TIMEOUT_S = 150.0
_POLL_S = 0.5
"""Asking costs a process each time."""


@dataclass
class Running:
    """The containers of the overlay, as processes. `ports`: what is used, by role and the manifest's port."""

    objects: list[Object]
    ports: dict[tuple[str, int], int]
    folder: Path
    processes: dict[str, subprocess.Popen[bytes]]

    def workload(self, role: str) -> Object:
        (found,) = (w for w in of_kind(self.objects, *rendered.WORKLOADS) if rendered.role(w) == role)
        return found

    def here(self, role: str, text: str) -> str:
        """A value, an argument or a line of a configuration of the manifests, as it is here."""
        text = re.sub(
            r"\b(redis|scheduler|gateway):(\d+)", lambda m: f"127.0.0.1:{self.ports[m[1], int(m[2])]}", text
        )
        text = re.sub(r"^(port )?(\d{4,5})$", lambda m: (m[1] or "") + str(self.port(role, m[2])), text)
        text = text.replace("bind * -::*", "bind 127.0.0.1").replace("/app/", f"{ROOT}/")
        return re.sub(r"(?<![\w/])/(data|etc/redis)\b", rf"{self.folder}/\1", text)

    def port(self, role: str, number: str) -> int:
        return self.ports.get((role, int(number)), int(number))

    def environment(self, role: str) -> dict[str, str]:
        values = rendered.environment(
            self.objects, self.workload(role), rendered.Pod(f"{role}-x", "127.0.0.1")
        )
        system = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(self.folder)}
        return system | {key: self.here(role, value) for key, value in values.items()}

    def command(self, role: str, command: list[str]) -> list[str]:
        programs = {
            "laps": [sys.executable, "-m", "laps.cli"],
            "python": [sys.executable],
            "redis-server": [redis_binary() or valkey_binary()],
            "redis-cli": ["redis-cli", "-p", str(self.ports["redis", 6379])],
            "sh": ["sh"],
        }
        init = ["tini-static", "--"]
        program, *arguments = command[2:] if command[:2] == init else command
        in_shell = " ".join(programs["redis-cli"])
        return [
            *programs[program],
            *(self.here(role, each).replace("redis-cli", in_shell) for each in arguments),
        ]

    def start(self, role: str) -> None:
        self.processes[role] = subprocess.Popen(
            self.command(role, rendered.command_line(self.workload(role))),
            env=self.environment(role),
            cwd=self.folder,
            stdout=(self.folder / f"{role}.log").open("ab"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def write_redis_files(self) -> None:
        """What the pod mounts: the configuration, the users, a volume."""
        (self.folder / "etc/redis/acl").mkdir(parents=True)
        (self.folder / "data").mkdir()
        (config,) = (
            each["data"]["redis.conf"]
            for each in of_kind(self.objects, "ConfigMap")
            if "redis.conf" in each["data"]
        )
        lines = "\n".join(self.here("redis", line) for line in config.splitlines())
        (self.folder / "etc/redis/redis.conf").write_text(lines + "\n")
        users = rendered.secret_values(self.objects, "laps-redis")["users.acl"]
        (self.folder / "etc/redis/acl/users.acl").write_text(users)

    def probe(self, role: str, kind: str) -> bool:
        """What the kubelet would find."""
        probe = container(self.workload(role))[f"{kind}Probe"]
        if "exec" in probe:
            command = self.command(role, probe["exec"]["command"])
            done = subprocess.run(command, env=self.environment(role), capture_output=True, check=False)
            return done.returncode == 0
        with channels.open_sync_channel(f"127.0.0.1:{self.ports[role, probe['grpc']['port']]}") as channel:
            request = health_pb2.HealthCheckRequest(service=probe["grpc"].get("service", ""))
            try:
                answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=probe["timeoutSeconds"])
            except Exception:
                return False
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def wait_for(self, what: str, condition: Callable[[], object]) -> None:
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        while not condition():
            ended = [role for role, process in self.processes.items() if process.poll() is not None]
            assert not ended, f"{ended} ended: {self.last_words(ended[0])}"
            assert time.monotonic() < deadline_s, f"{what}: {self.last_words(what.split()[0])}"
            time.sleep(_POLL_S)

    def last_words(self, role: str) -> str:
        return (self.folder / f"{role}.log").read_text()[-2000:]

    def metrics(self, role: str) -> str:
        with urllib.request.urlopen(
            f"http://127.0.0.1:{self.ports[role, 9090]}/metrics", timeout=60
        ) as answer:
            return str(answer.read(), "utf-8")

    def redis(self, user: str | None = None, password: str | None = None) -> redis.Redis:
        # redis-py takes a wrong password for something that passes, and tries for seconds.
        once = Retry(NoBackoff(), 0)
        return redis.Redis(port=self.ports["redis", 6379], username=user, password=password, retry=once)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    objects = rendered.render("dev")
    wanted = [
        (rendered.role(workload), port["containerPort"])
        for workload in of_kind(objects, *rendered.WORKLOADS)
        for port in container(workload)["ports"]
    ]
    ports = dict(zip(wanted, free_ports(len(wanted)), strict=True))
    stack = Running(objects, ports, tmp_path, {})
    stack.write_redis_files()
    with ExitStack() as cleanup:
        cleanup.callback(lambda: [_kill(process) for process in stack.processes.values()])
        yield stack


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def redis_is(running: Running, probe: str) -> bool:
    """By the manifest's own probe where redis-cli is installed."""
    if shutil.which("redis-cli"):
        return running.probe("redis", probe)
    try:
        return bool(running.redis("probe", "any").ping())
    except redis.ConnectionError:
        return False


def test_dev_overlay_serves_a_request(running: Running) -> None:
    # In an order that a cluster may well choose: the store comes last.
    for role in ("gateway", "worker", "scheduler"):
        running.start(role)
    for role in ("gateway", "scheduler", "worker"):
        running.wait_for(f"{role} to have started", lambda role=role: running.probe(role, "startup"))
    assert not any(running.probe(role, "readiness") for role in ("gateway", "scheduler", "worker"))
    # Without a store nobody is ready, and nobody is to be restarted for it.
    for role in ("scheduler", "gateway"):
        running.wait_for(f"{role} to be alive", lambda role=role: running.probe(role, "liveness"))

    running.start("redis")
    running.wait_for("redis to answer", lambda: redis_is(running, "startup"))
    for probe in ("readiness", "liveness"):
        running.wait_for(f"redis to answer its {probe}", lambda probe=probe: redis_is(running, probe))
    for role in ("scheduler", "worker", "gateway"):
        running.wait_for(f"{role} to be ready", lambda role=role: running.probe(role, "readiness"))
        running.wait_for(f"{role} to be alive", lambda role=role: running.probe(role, "liveness"))

    async def generate() -> int:
        async with AsyncClient(f"127.0.0.1:{running.ports['gateway', 50051]}") as client:
            return len((await client.generate("Hello", max_tokens=8, timeout_s=150)).token_ids)

    assert asyncio.run(generate()) > 0
    assert "store is not durable" not in (running.folder / "scheduler.log").read_text()

    assert "laps_gateway_tokens_total" in running.metrics("gateway")
    assert "laps_backlog_seconds" in running.metrics("scheduler")
    users_can_do_no_more_than_they_must(running)
    for role in ("gateway", "worker", "scheduler", "redis"):
        process = running.processes[role]
        process.send_signal(signal.SIGTERM)
        assert process.wait(rendered.pod_spec(running.workload(role))["terminationGracePeriodSeconds"]) == 0


def users_can_do_no_more_than_they_must(running: Running) -> None:
    password = "development-only"
    with running.redis("laps", password) as scheduler:
        for command in (
            "FLUSHALL",
            "FUNCTION FLUSH",
            "SHUTDOWN NOSAVE",
            "KEYS *",
            "CONFIG SET appendfsync no",
        ):
            with pytest.raises(redis.exceptions.NoPermissionError):
                scheduler.execute_command(*command.split())
        with pytest.raises(redis.exceptions.NoPermissionError):
            scheduler.set("other:key", "1")
    with running.redis("operator", password) as operator:
        assert operator.hget("laps:{default}:meta", "commit_seq")
        assert operator.memory_usage("laps:{default}:meta")
        with pytest.raises(redis.exceptions.NoPermissionError):
            operator.hset("laps:{default}:meta", "commit_seq", "0")
    with pytest.raises(redis.exceptions.AuthenticationError):
        running.redis("laps", "wrong").ping()
    with running.redis("probe", "any") as probe, pytest.raises(redis.exceptions.NoPermissionError):
        probe.get("laps:{default}:meta")
    with pytest.raises(redis.exceptions.AuthenticationError):
        running.redis().get("laps:{default}:meta")
