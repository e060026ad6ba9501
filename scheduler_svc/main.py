"""The scheduler process: `laps scheduler`."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
import structlog
from grpc_reflection.v1alpha import reflection

from laps import channels, logs, runtime, telemetry
from laps.errors import LocalError
from laps.security.exposure import check_exposure
from laps.security.interceptor import AccessInterceptor, by_certificate, by_nothing
from laps.security.tls import SYSTEM_CA, TlsFiles
from laps.setting import SettingsError, host_port
from laps.settings import Settings
from laps.v1 import (
    queue_pb2,
    queue_pb2_grpc,
    scheduler_pb2,
    scheduler_pb2_grpc,
    worker_pb2,
    worker_pb2_grpc,
)
from scheduler_svc import compiled, metrics
from scheduler_svc.core.policies import servable_policies
from scheduler_svc.core.settings import SchedulerSettings
from scheduler_svc.queue_service import QueueService
from scheduler_svc.scheduler_service import SchedulerService
from scheduler_svc.store.errors import StoreError
from scheduler_svc.store.inspector import Inspector
from scheduler_svc.store.store import Store
from scheduler_svc.term import Terms
from scheduler_svc.worker_service import WorkerService

log = structlog.get_logger()

STORE_FULL_SHARE = 0.85
"""Of the store's memory: above it nothing new is accepted, and what was accepted goes on."""
MEMORY_INTERVAL_S = 0.5

READINESS_INTERVAL_S = 0.25

SERVICES = (
    scheduler_pb2.DESCRIPTOR.services_by_name["SchedulerService"].full_name,
    worker_pb2.DESCRIPTOR.services_by_name["WorkerService"].full_name,
    queue_pb2.DESCRIPTOR.services_by_name["QueueService"].full_name,
)


def core_settings(settings: Settings) -> SchedulerSettings:
    """The settings of the core, which knows nothing of ours."""
    return SchedulerSettings(
        draft_tokens=settings.draft_tokens,
        step_credit=settings.step_credit,
        lease_duration_s=settings.lease_duration_s,
        session_timeout_s=settings.session_timeout_s,
        max_queued_requests=settings.max_queued_requests,
        max_queued_tokens=settings.max_queued_tokens,
        retention_s=settings.retention_s,
        max_retained=settings.max_retained_requests,
        starvation_bound_s=settings.starvation_bound_s or None,
    )


@dataclass
class SchedulerServer:
    """A running scheduler: `port` is where it listens."""

    port: int
    terms: Terms
    _server: grpc.aio.Server
    _store: Store
    _readiness: runtime.Readiness
    leading: asyncio.Task[None]
    _watching: tuple[asyncio.Task[None], ...]
    _close_metrics: Callable[[], None]

    async def stop(self, drain_s: float) -> None:
        for task in self._watching:
            task.cancel()
        await self._readiness.set(False)
        self.leading.cancel()
        await asyncio.gather(self.leading, *self._watching, return_exceptions=True)
        await self._server.stop(grace=min(drain_s, 0.5))
        with contextlib.suppress(StoreError):
            await self._store.resign()
        await self._store.close()
        await asyncio.to_thread(self._close_metrics)


async def serve(settings: Settings, lifetime: runtime.Lifetime) -> SchedulerServer:
    """Starts listening at once and leads when it can.

    Raises:
        SettingsError: a certificate cannot be used, or the port would stand open.
        OSError: the port is taken.
    """
    tls = TlsFiles.of_service(settings)
    check_exposure(settings, checks_callers=tls is not None, with_what="tls_cert, tls_key and tls_ca")
    authenticate = by_certificate(settings.tls_trust_domain) if tls else by_nothing
    refusals = metrics.Refusals(settings.pool)
    server = channels.new_server(
        max_message_bytes=settings.max_message_bytes,
        interceptors=[AccessInterceptor(authenticate, refusals)],
    )
    port = channels.bind(server, settings.host, settings.scheduler_port, tls)
    readiness = await runtime.add_readiness(server, *SERVICES)
    store = Store(settings.redis_url, settings.pool, **store_tls(settings, tls))
    changes: set[asyncio.Task[None]] = set()

    def on_change(leading: bool) -> None:
        change = asyncio.ensure_future(readiness.set_serving(leading))
        changes.add(change)
        change.add_done_callback(changes.discard)

    terms = Terms(
        pool=settings.pool,
        store=store,
        policy=settings.policy,
        core_settings=core_settings(settings),
        holder=f"{settings.scheduler_id}@{socket.gethostname()}/{host_port(settings.host, port)}",
        address=host_port(settings.host, port),
        tick_interval_s=settings.tick_interval_s,
        leader_ttl_s=settings.leader_ttl_s,
        gateway_grace_s=settings.session_timeout_s,
        on_change=on_change,
    )
    scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(
        SchedulerService(terms, refusals, settings.max_message_bytes), server
    )
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(
        WorkerService(terms, settings.heartbeat_interval_s, refusals), server
    )
    queue_pb2_grpc.add_QueueServiceServicer_to_server(
        QueueService(Inspector(store.reader, settings.pool)), server
    )
    reflection.enable_server_reflection((*SERVICES, reflection.SERVICE_NAME), server)
    close_metrics: Callable[[], None] = lambda: None  # noqa: E731
    if settings.metrics_port:
        close_metrics = metrics.listen(
            settings.host,
            settings.metrics_port,
            settings.pool,
            lambda: terms.leader,
            lambda: terms.store_answers,
            refusals,
        )
    await server.start()
    log.info("listening", address=f"{settings.host}:{port}")
    leading = asyncio.create_task(terms.run(), name="leadership")
    watching = (
        asyncio.create_task(_watch_readiness(terms, readiness), name="readiness"),
        asyncio.create_task(_watch_memory(terms), name="store memory"),
    )
    for task in (leading, *watching):
        lifetime.watch(task)
    return SchedulerServer(port, terms, server, store, readiness, leading, watching, close_metrics)


async def _watch_memory(terms: Terms) -> None:
    """Room must be left for the output of what is accepted: a store that is full refuses that too."""
    while True:
        with contextlib.suppress(StoreError):
            share = await terms.store.memory_share()
            if (share > STORE_FULL_SHARE) != terms.store_full:
                terms.store_full = not terms.store_full
                log.warning("store memory", full=terms.store_full, share=round(share, 3))
        await asyncio.sleep(MEMORY_INTERVAL_S)


async def _watch_readiness(terms: Terms, readiness: runtime.Readiness) -> None:
    while True:
        await readiness.set_ready(terms.ready)
        await asyncio.sleep(READINESS_INTERVAL_S)


def store_tls(settings: Settings, tls: TlsFiles | None) -> dict[str, Any]:
    """What redis-py needs for a rediss:// store: by what it is known, and the certificate that we show."""
    if not settings.redis_url.startswith("rediss:"):
        return {}
    authorities = settings.redis_ca or (tls.authorities if tls else SYSTEM_CA)
    options = {} if authorities == SYSTEM_CA else {"ssl_ca_certs": authorities}
    if tls is not None:
        options |= {"ssl_certfile": tls.certificate, "ssl_keyfile": tls.key}
    return options


def run(settings: Settings) -> int:
    """`laps scheduler`: runs until it is told to stop; returns the exit code."""
    logs.configure_logging(
        "scheduler", pool=settings.pool, level=settings.log_level, form=settings.log_format
    )
    telemetry.configure_tracing(
        "scheduler", settings.instance_id("scheduler"), pool=settings.pool, endpoint=settings.otlp_endpoint
    )

    build = compiled.running()
    if build.stale:
        log.warning("runs as plain Python", because=build.why, to_do="build it anew, or remove it")
    else:
        log.info("hot path", compiled=build.usable, why=build.why)

    async def start(lifetime: runtime.Lifetime) -> runtime.Stop:
        return (await serve(settings, lifetime)).stop

    try:
        check(settings)
        return runtime.run(runtime.run_until_signalled(start, settings.drain_s))
    except (LocalError, OSError) as error:
        print(f"laps scheduler: {error}", file=sys.stderr)
        return runtime.EXIT_FAILED
    finally:
        telemetry.close_tracing()


def check(settings: Settings) -> None:
    """Raises SettingsError for what would otherwise be found out only when leading begins."""
    if settings.policy not in servable_policies():
        known = ", ".join(servable_policies())
        raise SettingsError(
            f"policy: {settings.policy!r} cannot serve; choose one of {known} "
            f"(from {settings.origin('policy')})"
        )
    try:
        core_settings(settings)
    except ValueError as error:
        raise SettingsError(str(error)) from None
