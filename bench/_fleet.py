"""A pool of real processes with a spare of everything, for treating badly: two gateways, two schedulers, two
workers and a store, every connection between them through a link that can be cut."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import redis.asyncio

from bench._processes import bound_to_us
from bench._proxy import Link
from laps.ports import free_ports
from laps.settings import Settings
from laps.stack import service_command
from scheduler_svc.store import keys
from scheduler_svc.store.server import LocalServer

STORE = "store"
SCHEDULERS = ("scheduler-0", "scheduler-1")
GATEWAYS = ("gateway-0", "gateway-1")
LOG_END_LINES = 40


class Process:
    """A command that is started again by whoever killed it, and ends with us."""

    def __init__(self, name: str, role: str, env: dict[str, str], log_path: Path) -> None:
        self.name = name
        self.log_path = log_path
        self._env = env
        self._role = role
        self._process: subprocess.Popen[bytes] | None = None
        self._crashes: list[int] = []

    @property
    def pid(self) -> int:
        """0: not running."""
        running = self._process is not None and self._process.poll() is None
        return self._process.pid if running and self._process is not None else 0

    @property
    def crashes(self) -> list[int]:
        """Exit codes of those that ended before anybody killed them."""
        code = self._process.poll() if self._process is not None else None
        return self._crashes if code in (None, -signal.SIGKILL) else [*self._crashes, code]

    def start(self) -> None:
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                bound_to_us(service_command(self._role)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self._env},
                start_new_session=True,
            )

    def kill(self) -> None:
        if self._process is not None:
            self._crashes = self.crashes
            self._process.kill()
            self._process.wait()

    def terminate(self, timeout_s: float) -> int:
        """SIGTERM; returns the exit code. Raises subprocess.TimeoutExpired."""
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(timeout_s)

    def end_of_log(self) -> str:
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-LOG_END_LINES:])

    def logged(self, event: str) -> list[dict[str, Any]]:
        """Its log lines about an event."""
        lines = (line for line in self.log_path.read_text().splitlines() if line.startswith("{"))
        return [record for record in map(json.loads, lines) if record.get("event") == event]


class Fleet:
    def __init__(
        self, data_dir: Path, store_binary: str | None = None, workers: int = 2, **settings: Any
    ) -> None:
        self.settings = Settings(data_dir=data_dir, workers=workers, **settings)
        self.links: list[Link] = []
        self.processes: dict[str, Process] = {}
        self.store = LocalServer(binary=store_binary, data_dir=data_dir / "store", appendfsync="always")
        self.gateway_addresses: list[str] = []
        self._data_dir = data_dir
        self._pool = self.settings.pool
        self._workers = workers

    @property
    def names(self) -> list[str]:
        return [*self.processes, STORE]

    async def start(self) -> None:
        self.store.start()
        self.redis = redis.asyncio.Redis.from_url(
            self.store.url, decode_responses=True, socket_timeout=2.0, socket_connect_timeout=1.0
        )
        (self._data_dir / "logs").mkdir(parents=True)
        workers = [f"worker-{number}" for number in range(self._workers)]
        names = [*SCHEDULERS, *GATEWAYS, *workers]
        # A process listens on one port; it is called through a port of its own for every caller.
        taken = free_ports(len(names) * 4 + 8, "127.0.0.1")
        listens = {name: taken.pop() for name in names}
        for name in SCHEDULERS:
            link = await self._link(taken.pop(), self.store.port, (name, STORE))
            env = {"scheduler_port": listens[name], "scheduler_id": name}
            self._add(name, "scheduler", redis_url=f"redis://127.0.0.1:{link.port}/0", **env)
        for name in (*GATEWAYS, *workers):
            role = name.partition("-")[0]
            links = [await self._link(taken.pop(), listens[s], (name, s)) for s in SCHEDULERS]
            address = "ipv4:" + ",".join(f"127.0.0.1:{link.port}" for link in links)
            port = "port" if role == "gateway" else "worker_port"
            self._add(name, role, scheduler_address=address, **{port: listens[name], f"{role}_id": name})
        inward = [await self._link(taken.pop(), listens[name], ("clients", name)) for name in GATEWAYS]
        addresses = [f"127.0.0.1:{link.port}" for link in inward]
        self.gateway_addresses = ["ipv4:" + ",".join(order) for order in (addresses, addresses[::-1])]
        for process in self.processes.values():
            process.start()

    async def _link(self, port: int, target_port: int, ends: tuple[str, str]) -> Link:
        link = Link(port, target_port, ends)
        await link.start()
        self.links.append(link)
        return link

    def _add(self, name: str, role: str, **settings: Any) -> None:
        env = self.settings.to_env(http_port=0, metrics_port=0, log_format="json", drain_s=1.0, **settings)
        env["TORCHINDUCTOR_CACHE_DIR"] = str(self._data_dir / "torch")
        self.processes[name] = Process(name, role, env, self._data_dir / "logs" / f"{name}.log")

    async def close(self) -> None:
        for process in self.processes.values():
            process.kill()
        for link in self.links:
            await link.close()
        await self.redis.aclose()
        self.store.close()

    # --- What is done to it ---------------------------------------------------------------------

    def runs(self, name: str) -> bool:
        return bool(self.store.pid if name == STORE else self.processes[name].pid)

    def kill(self, name: str) -> None:
        if name == STORE:
            self.store.kill()
        else:
            self.processes[name].kill()

    def start_again(self, name: str) -> None:
        if name == STORE:
            self.store.start()
        elif not self.processes[name].pid:
            self.processes[name].start()

    def freeze(self, name: str) -> None:
        self._signal(name, signal.SIGSTOP)

    def thaw(self, name: str) -> None:
        self._signal(name, signal.SIGCONT)

    def _signal(self, name: str, number: int) -> None:
        pid = self.store.pid if name == STORE else self.processes[name].pid
        if pid:
            os.kill(pid, number)

    def links_of(self, name: str) -> list[Link]:
        return [link for link in self.links if name in link.ends]

    # --- What is seen of it ---------------------------------------------------------------------

    async def leader(self) -> tuple[int, str]:
        """Epoch and name of whoever leads. Raises redis.RedisError while the store does not answer."""
        epoch, holder = await self.redis.hmget(keys.leader(self._pool), "epoch", "holder")
        return int(epoch or 0), (holder or "").partition("@")[0]

    async def until_led_anew(self, epoch: int, timeout_s: float) -> float | None:
        """Seconds until an epoch after this one begins; None: none did."""
        began_s = asyncio.get_running_loop().time()
        while (took_s := asyncio.get_running_loop().time() - began_s) < timeout_s:
            try:
                if (await self.leader())[0] > epoch:
                    return took_s
            except (redis.RedisError, OSError):
                pass
            await asyncio.sleep(0.02)
        return None
