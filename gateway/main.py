"""The gateway process: `laps gateway`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import grpc.aio
from grpc_reflection.v1alpha import reflection

from gateway.edge import Edge
from gateway.inference import InferenceService
from gateway.metrics import Metrics
from gateway.queue_proxy import QueueProxy
from gateway.rpc import MAX_UNARY_CALLS, service_handler
from gateway.scheduler_link import SchedulerLink
from gateway.tokenizer import Tokenizer, TokenizerError, load_tokenizer
from laps import channels, logs, runtime, telemetry
from laps.errors import LocalError
from laps.security.interceptor import AccessInterceptor
from laps.security.tls import TlsFiles
from laps.settings import Settings
from laps.v1 import inference_pb2, queue_pb2

if TYPE_CHECKING:
    from gateway.http.server import HttpServer

log = logs.get_logger()

INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"]
QUEUE = queue_pb2.DESCRIPTOR.services_by_name["QueueService"]
HEALTH_NAME = "grpc.health.v1.Health"
_CLOSE_S = 0.2
"""Of the time to stop, what is kept for telling clients that their streams end."""


class Gateway:
    """A running gateway: `port` is where it listens."""

    def __init__(
        self, settings: Settings, link: SchedulerLink, inference: InferenceService, queue: QueueProxy
    ) -> None:
        self.port = 0
        self.link = link
        self.inference = inference
        self._settings = settings
        self._queue = queue
        self._server: grpc.aio.Server
        self._readiness: runtime.Readiness
        self._close_metrics: Callable[[], None] | None = None
        self._http: HttpServer | None = None
        self._readiness_wanted = asyncio.Event()
        self._readiness_task: asyncio.Task[None] | None = None

    async def stop(self, drain_s: float) -> None:
        """Refuses new work, lets streams end for up to `drain_s`, then ends them: their clients resume."""
        self.inference.draining = True
        await self._readiness.set(False)
        self._queue.drop_streams()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.inference.streams.wait_idle(), max(drain_s - _CLOSE_S, 0))
        self.inference.drop_streams()
        await asyncio.gather(
            self._server.stop(min(_CLOSE_S, drain_s)), *([self._http.stop()] if self._http else [])
        )
        await self.link.close()
        if self._readiness_task is not None:
            self._readiness_task.cancel()
        if self._close_metrics is not None:
            await asyncio.to_thread(self._close_metrics)

    @property
    def is_ready(self) -> bool:
        return self.link.connected and not self.inference.draining

    def scheduler_changed(self) -> None:
        """The scheduler came or went."""
        self._readiness_wanted.set()

    async def _start(
        self, server: grpc.aio.Server, readiness: runtime.Readiness, lifetime: runtime.Lifetime
    ) -> None:
        self._server, self._readiness = server, readiness
        await server.start()
        self._readiness_task = asyncio.create_task(self._keep_readiness(), name="readiness")
        lifetime.watch(self._readiness_task)
        lifetime.watch(await self.link.start())

    async def _keep_readiness(self) -> None:
        while True:
            await self._readiness_wanted.wait()
            self._readiness_wanted.clear()
            await self._readiness.set(self.is_ready)


async def serve(settings: Settings, lifetime: runtime.Lifetime) -> Gateway:
    """Listens, and serves as soon as the scheduler can be reached.

    Raises:
        SettingsError: a certificate or the file of keys cannot be used, or the port would stand open.
        TokenizerError: the target's tokenizer cannot be loaded.
        OSError: a port is taken.
    """
    edge, tls = Edge.open(settings), TlsFiles.of_service(settings)
    tokenizer = await asyncio.to_thread(load_tokenizer, settings.target)
    if not (settings.context_tokens or tokenizer.limits.context_tokens):
        raise TokenizerError("context_tokens: the model's configuration names no limit; set one")
    metrics = Metrics(settings.pool)
    gateway: Gateway

    def on_change(connected: bool) -> None:
        metrics.scheduler_connected.set(connected)
        gateway.scheduler_changed()

    link = SchedulerLink(
        settings.scheduler_address,
        settings.instance_id("gateway"),
        max_message_bytes=settings.max_message_bytes,
        stream_buffer_tokens=settings.stream_buffer_tokens,
        on_change=on_change,
        tls=tls,
        on_pool=lambda pool: metrics.pool_told(settings.model_name, pool),
    )
    inference = InferenceService(settings, tokenizer, link, metrics)
    queue = QueueProxy(link, inference.streams)
    gateway = Gateway(settings, link, inference, queue)

    def on_refused(method: str, status: str) -> None:
        metrics.calls.labels(method.removeprefix("/laps.v1.").replace("/", "."), status).inc()

    server = channels.new_server(
        max_message_bytes=settings.max_message_bytes,
        # Of one connection. A client that opens more streams than there may be is told so.
        max_concurrent_streams=settings.max_streams + MAX_UNARY_CALLS,
        share_port=settings.share_port,
        interceptors=[AccessInterceptor(edge.by_metadata, on_refused)],
    )
    try:
        gateway.port = channels.bind(
            server, settings.host, settings.port, edge.tls, ask_clients=edge.asks_for_certificates
        )
        if settings.health_port:
            channels.bind(
                server,
                settings.host,
                settings.health_port,
                edge.tls,
                ask_clients=edge.asks_for_certificates,
            )
        if settings.http_port:
            gateway._http = await _serve_http(settings, gateway, tokenizer, metrics, edge)
        if settings.metrics_port:
            gateway._close_metrics = metrics.listen(settings.host, settings.metrics_port)
    except OSError:
        await server.stop(None)
        if gateway._http is not None:
            await gateway._http.stop()
        raise
    readiness = await runtime.add_readiness(server, INFERENCE.full_name, QUEUE.full_name)
    server.add_generic_rpc_handlers(
        (
            service_handler(INFERENCE, inference.methods(), metrics),
            service_handler(QUEUE, queue.methods(), metrics),
        )
    )
    names = (INFERENCE.full_name, QUEUE.full_name, HEALTH_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    await gateway._start(server, readiness, lifetime)
    log.info("listening", address=f"{settings.host}:{gateway.port}", model=settings.model_name)
    return gateway


async def _serve_http(
    settings: Settings, gateway: Gateway, tokenizer: Tokenizer, metrics: Metrics, edge: Edge
) -> HttpServer:
    # Imported only where it is wanted: the library costs a start a fifth of a second.
    from gateway.http.console.routes import Console
    from gateway.http.server import HttpServer

    console = Console(settings, gateway.link, tokenizer) if settings.console else None
    server = HttpServer(
        settings, gateway.inference, tokenizer, metrics, lambda: gateway.is_ready, edge, console
    )
    await server.start()
    log.info("listening", address=f"{settings.host}:{server.port}", by="http")
    return server


def run(settings: Settings) -> int:
    """`laps gateway`: runs until it is told to stop; returns the exit code."""
    logs.configure_logging("gateway", pool=settings.pool, level=settings.log_level, form=settings.log_format)

    telemetry.configure_tracing(
        "gateway", settings.instance_id("gateway"), pool=settings.pool, endpoint=settings.otlp_endpoint
    )

    async def start(lifetime: runtime.Lifetime) -> runtime.Stop:
        return (await serve(settings, lifetime)).stop

    try:
        return runtime.run(runtime.run_until_signalled(start, settings.drain_s))
    except (LocalError, OSError) as error:
        log.error("cannot start", error=str(error))
        return runtime.EXIT_FAILED
    finally:
        telemetry.close_tracing()
