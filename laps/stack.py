"""The whole of LAPS on one machine: store, scheduler, gateway and workers, each a process.

    async with Stack(load_settings(), any_ports=True) as stack:
        client = AsyncClient(stack.gateway_address)

Behind `laps up`, the demonstration and the tests.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Protocol, Self

from laps import log_files
from laps.child import Child, ChildSpec
from laps.errors import LocalError
from laps.logs import get_logger
from laps.ports import free_ports, is_free
from laps.readiness_watch import ReadinessWatch, causes, services
from laps.security.tls import TlsFiles
from laps.setting import reachable
from laps.settings import Settings

READY_TIMEOUT_S = 120.0
"""Workers load models before they are ready."""
USUAL_HTTP_PORT = 8000
_POLL_S = 0.05
_PATIENCE_S = 10.0
"""After this long, and again where there is a new reason, it says what it waits for."""
_LEAST_KILL_GRACE_S = 0.5
_SCHEDULER_METRICS = 1
"""The scheduler's metrics port is so far above the first gateway's."""
_GATEWAY_METRICS = 500
"""Further gateways take their metrics port from so far above the first one's."""
_LAST_PORT = 65_535
_CHILD_DRAIN_SHARE = 0.4
"""Of the time to stop: gateways drain, then workers, then the rest goes."""


class StackError(LocalError):
    """The stack cannot start. One line."""


class Managed(Protocol):
    """What the stack needs of a child."""

    @property
    def name(self) -> str: ...
    @property
    def pid(self) -> int | None: ...
    @property
    def log_path(self) -> Path: ...

    starts: int

    async def start(self) -> None: ...
    async def stop(self, grace_s: float) -> None: ...
    def signal(self, number: int) -> None: ...


Command = Callable[[str], list[str]]
"""The command line of a role: "scheduler", "gateway" or "worker"."""
ReadyCheck = Callable[[str], Awaitable[bool]]
"""Whether the server at an address is ready."""


def _gateway_metrics(number: int) -> int:
    """How far above the first one's a gateway's metrics port is."""
    return _GATEWAY_METRICS + number if number else 0


def service_command(role: str) -> list[str]:
    # -P: with -m alone, a redis.py in the folder where somebody happens to be would be taken for the package.
    return [sys.executable, "-P", "-m", "laps.cli", role]


class Stack:
    """Starts, watches and stops the processes.

    `children` are by name: store, scheduler, gateway, worker-0, ...
    `any_ports`: gateway and scheduler take free ports whatever the settings say. Use it in the main thread:
    on Linux the children end with the thread that started them.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        any_ports: bool = False,
        command: Command = service_command,
        is_ready: ReadyCheck | None = None,
    ) -> None:
        self.settings = settings
        self.children: dict[str, Managed] = {}
        self.redis_url = settings.redis_url
        self._any_ports = any_ports
        self._command = command
        self._is_ready = is_ready
        self._lock: IO[str] | None = None
        self._keeping: list[asyncio.Task[None]] = []
        self._resources = AsyncExitStack()
        self.port = 0
        self.scheduler_port = 0
        self.http_port = 0

    @property
    def gateway_address(self) -> str:
        return reachable(self.settings.host, self.port)

    @property
    def http_url(self) -> str:
        """Where OpenAI's clients find the gateway; empty: it does not serve them."""
        scheme = "https" if TlsFiles.of_edge(self.settings) else "http"
        return f"{scheme}://{reachable(self.settings.host, self.http_port)}/v1" if self.http_port else ""

    @property
    def console_url(self) -> str:
        """Where a browser finds the web console; empty: it is not served."""
        return (
            f"{self.http_url.removesuffix('/v1')}/console" if self.http_url and self.settings.console else ""
        )

    @property
    def scheduler_address(self) -> str:
        return reachable(self.settings.host, self.scheduler_port)

    @property
    def log_dir(self) -> Path:
        return self.settings.data_dir / "logs"

    async def __aenter__(self) -> Self:
        try:
            await self.start()
            await self.wait_ready()
        except BaseException:
            await self.stop(drain_s=0)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Starts everything at once; services wait for each other. Raises StackError."""
        settings = self.settings
        self._take_data_dir()
        store_port, *own_ports = self._choose_ports()
        # Behind a shared port nobody can tell which gateway has answered.
        health_ports = [own_ports.pop() for _ in range(settings.gateways)] if settings.gateways > 1 else [0]
        if not self.redis_url:
            from laps.store_child import StoreChild

            store = StoreChild(settings.data_dir / "store", store_port)
            self.children["store"] = store
            await store.start()
            self.redis_url = store.url
        await self._add("scheduler", "scheduler", self.scheduler_port, metrics_offset=_SCHEDULER_METRICS)
        for number, health_port in enumerate(health_ports):
            name = f"gateway-{number}" if number else "gateway"
            await self._add(name, "gateway", self.port, health_port, _gateway_metrics(number))
        for number, worker_port in enumerate(own_ports):
            # It serves no metrics: the scheduler tells of it.
            await self._add(f"worker-{number}", "worker", worker_port)
        self._keeping.append(asyncio.create_task(self._bound_logs(), name="log files"))

    async def wait_ready(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Returns when every service says that it is ready. From then on it is told which ones cease to be.

        Raises StackError when one ends by itself before that, or the time is over.
        """
        began_s = time.monotonic()
        patience_s = began_s + _PATIENCE_S
        waiting = services(self.children)
        told: dict[str, set[str]] = {}
        while waiting:
            for child in list(waiting):
                if await child.spec.is_ready():
                    waiting.remove(child)
                    child.ends_for_good = False
                    if child.name in told:
                        # A warning as well, for those who have read the other one.
                        after_s = round(time.monotonic() - began_s)
                        get_logger().warning("ready now", child=child.name, after_s=after_s)
                elif child.exit_code is not None and child.exit_code > 0:
                    raise StackError(
                        f"{child.name} ended with exit code {child.exit_code}: "
                        f"{child.ended_with or 'it does not say why'} (log: {child.log_path})"
                    )
            now_s = time.monotonic()
            if waiting and now_s > began_s + timeout_s:
                names = ", ".join(child.name for child in waiting)
                said = "".join(
                    f"; {each.name}: {words}" for each in causes(waiting) if (words := each.last_words())
                )
                raise StackError(f"not ready after {timeout_s:g} s: {names}{said} (logs: {self.log_dir})")
            if waiting and now_s > patience_s:
                patience_s = now_s + _PATIENCE_S
                for child in causes(waiting):
                    because = child.last_words() or "it is starting"
                    if because in told.setdefault(child.name, set()):
                        continue
                    told[child.name].add(because)
                    get_logger().warning(
                        "not ready yet",
                        child=child.name,
                        because=because,
                        after_s=round(now_s - began_s),
                        log=str(child.log_path),
                    )
            if waiting:
                await asyncio.sleep(_POLL_S)
        watch = ReadinessWatch(self.children)
        self._keeping.append(asyncio.create_task(watch.run(), name="readiness"))

    async def stop(self, drain_s: float | None = None) -> None:
        """Stops gateway, workers, scheduler, store, in this order, within about `drain_s` seconds."""
        for task in self._keeping:
            task.cancel()
        whole_s = self.settings.drain_s if drain_s is None else drain_s
        deadline_s = time.monotonic() + whole_s
        for stage in ("gateway", "worker", "scheduler", "store"):
            members = [child for child in self.children.values() if child.name.split("-")[0] == stage]
            share_s = whole_s * _CHILD_DRAIN_SHARE + _LEAST_KILL_GRACE_S
            grace_s = max(min(share_s, deadline_s - time.monotonic()), _LEAST_KILL_GRACE_S)
            await asyncio.gather(*(child.stop(grace_s) for child in members))
            for child in members:
                del self.children[child.name]
        await self._resources.aclose()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    async def _bound_logs(self) -> None:
        while True:
            for path in [child.log_path for child in self.children.values()]:
                try:
                    if log_files.bound(path):
                        get_logger().info("log moved", log=str(path), older=str(log_files.older(path)))
                except OSError as error:
                    # A full disk, say. The services go on, and so does this.
                    get_logger().warning("log cannot be bounded", log=str(path), error=str(error))
            await asyncio.sleep(log_files.INTERVAL_S)

    async def _add(
        self, name: str, role: str, port: int, health_port: int = 0, metrics_offset: int | None = None
    ) -> None:
        settings = self.settings
        metrics_port = 0
        if settings.metrics_port and metrics_offset is not None:
            metrics_port = settings.metrics_port + metrics_offset
        port_setting = {"gateway": "port", "scheduler": "scheduler_port", "worker": "worker_port"}[role]
        env = settings.to_env(
            **{port_setting: port, f"{role}_id": name},
            redis_url=self.redis_url,
            http_port=self.http_port,
            health_port=health_port,
            share_port=settings.share_port or settings.gateways > 1,
            scheduler_address=self.scheduler_address,
            metrics_port=metrics_port,
            drain_s=settings.drain_s * _CHILD_DRAIN_SHARE,
            # Files are read by people and machines alike; the console form is for terminals.
            log_format="json",
        )
        ready = await self._ready_check(reachable(settings.host, health_port or port))
        env |= {
            "PYTHONUNBUFFERED": "1",
            # torch makes this folder as soon as it is imported, and would leave it in the temporary one.
            "TORCHINDUCTOR_CACHE_DIR": str(settings.data_dir.resolve() / "torch"),
        }
        spec = ChildSpec(name, self._command(role), env, ready)
        child = Child(spec, self.log_dir / f"{name}.log")
        # Until it was ready once: it would fail again, and for the same reason.
        child.ends_for_good = True
        self.children[name] = child
        await child.start()
        get_logger().info("started", child=name, pid=child.pid, log=str(child.log_path))

    async def _ready_check(self, address: str) -> Callable[[], Awaitable[bool]]:
        if (check := self._is_ready) is not None:
            return lambda: check(address)
        from laps import channels, runtime

        channel = channels.open_channel(address, tls=TlsFiles.of_client(self.settings))
        self._resources.push_async_callback(channel.close, None)
        return lambda: runtime.is_ready(channel)

    def _choose_ports(self) -> list[int]:
        """Sets the services' ports; returns one for the store, and for the health of each worker and of each
        gateway that shares its port."""
        settings = self.settings
        if not is_free(0, settings.host):
            raise StackError(f"host: {settings.host} is no address of this machine; correct --host")
        for setting in ("port", "scheduler_port", "http_port"):
            wanted = 0 if self._any_ports else getattr(settings, setting)
            if wanted and not is_free(wanted, settings.host):
                raise StackError(
                    f"port {wanted} is in use; choose another with --{setting.replace('_', '-')}"
                )
            setattr(self, setting, wanted)
        taken = (self.port, self.scheduler_port, self.http_port, *self._metrics_ports())
        of_gateways = settings.gateways if settings.gateways > 1 else 0
        free = free_ports(4 + settings.workers + of_gateways, settings.host, avoid=taken)
        self.port = self.port or free[0]
        self.scheduler_port = self.scheduler_port or free[1]
        refused = "http_port" in settings.model_fields_set and settings.http_port == 0
        if not self.http_port and not refused:
            # Nobody asked for a certain port, so a taken one is no reason to fail.
            usual = not self._any_ports and USUAL_HTTP_PORT not in taken
            is_usual = usual and is_free(USUAL_HTTP_PORT, settings.host)
            self.http_port = USUAL_HTTP_PORT if is_usual else free[2]
        return free[3:]

    def _metrics_ports(self) -> list[int]:
        """Where scheduler and gateways will serve metrics. Raises StackError when one of them is taken."""
        first = self.settings.metrics_port
        if not first:
            return []
        gateways = map(_gateway_metrics, range(self.settings.gateways))
        metrics_ports = [first + offset for offset in sorted((*gateways, _SCHEDULER_METRICS))]
        own = (self.port, self.scheduler_port, self.http_port)
        for port in metrics_ports:
            if port > _LAST_PORT:
                raise StackError(
                    f"metrics_port: counting on from {first} leads beyond {_LAST_PORT}; "
                    "choose a lower one with --metrics-port"
                )
            if port in own or not is_free(port, self.settings.host):
                counted = "" if port == first else f", which counts on from {first}"
                raise StackError(f"port {port} is in use; choose another with --metrics-port{counted}")
        return metrics_ports

    def _take_data_dir(self) -> None:
        """Two stacks on one folder would write one append-only file."""
        folder = self.settings.data_dir
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / "lock").open("w")
        except OSError as error:
            raise StackError(f"data_dir: {folder} cannot be used: {error.strerror}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise StackError(
                f"data_dir: {folder} is used by another 'laps up'; end that one, or name another folder "
                "with --data-dir"
            ) from None
        self._lock = lock
        try:
            lock.write(f"{os.getpid()}\n")
            lock.flush()
        except OSError as error:
            raise StackError(f"data_dir: {folder} cannot be written: {error.strerror}") from None
