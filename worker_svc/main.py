"""The worker process: `laps worker`."""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from dataclasses import dataclass

import grpc
import structlog
import torch

from laps import channels, logs, runtime, telemetry
from laps.security.interceptor import AccessInterceptor, by_nothing
from laps.security.tls import TlsFiles
from laps.settings import Settings
from laps.v1 import worker_pb2
from worker_svc import convert, shards
from worker_svc.driver import EngineDriver
from worker_svc.engine import Engine, EngineConfig, ModelError, ModelPair, load_pair
from worker_svc.session import RefusedByScheduler, WorkerLink

log = structlog.get_logger()

STALLED_S = 60.0
"""A worker whose engine has not turned for this long is not alive."""
HEALTH_INTERVAL_S = 0.1


@dataclass
class WorkerServer:
    """A running worker: its engine, its session, and a health port for probes."""

    driver: EngineDriver
    link: WorkerLink
    _linking: asyncio.Task[None]
    _server: grpc.aio.Server
    _readiness: runtime.Readiness
    _watching: asyncio.Task[None]

    async def stop(self, drain_s: float) -> None:
        """Lets what holds a slot finish within the time, then goes: what is left is taken over."""
        self._watching.cancel()
        await asyncio.gather(self._watching, return_exceptions=True)
        await self._readiness.set(False)
        self.link.drain()
        await asyncio.to_thread(self.driver.wait_idle, drain_s)
        self._linking.cancel()
        await asyncio.gather(self._linking, return_exceptions=True)
        await asyncio.to_thread(self.driver.stop, 5.0)
        await self._server.stop(grace=0)


def make_engine(settings: Settings, pair: ModelPair) -> Engine:
    return Engine(
        pair,
        EngineConfig(
            slots=settings.slots,
            spare_slots=settings.spare_slots,
            context_tokens=settings.context_tokens or None,
            draft_tokens=settings.draft_tokens,
            prompt_lookup=settings.lookup_tokens > 0,
            lookup_tokens=settings.lookup_tokens,
            host_cache_bytes=settings.host_cache_bytes,
            kv_limit_bytes=settings.kv_limit_bytes or None,
            prefix_sharing=settings.prefix_sharing,
            hold_finished=True,
            prefill_tokens=settings.prefill_tokens,
            threads=settings.threads,
            cuda_graphs=settings.cuda_graphs,
        ),
    )


async def serve(settings: Settings, engine: Engine, lifetime: runtime.Lifetime) -> WorkerServer:
    """Starts the engine's thread and the session."""
    loop = asyncio.get_running_loop()

    def on_failure(error: BaseException) -> None:
        loop.call_soon_threadsafe(lifetime.end, runtime.EXIT_FAILED, f"engine failed: {error}")

    driver = EngineDriver(engine, on_failure)
    driver.start()
    worker_id = settings.instance_id("worker")
    tls = TlsFiles.of_service(settings)
    link = WorkerLink(
        settings.scheduler_address,
        driver,
        hello=lambda: hello(settings, engine, worker_id),
        tls=tls,
        report_interval_s=settings.report_interval_s,
        max_message_bytes=settings.max_message_bytes,
    )
    linking = asyncio.create_task(_keep_linked(link, lifetime), name="session")
    lifetime.watch(linking)
    server = channels.new_server(interceptors=[AccessInterceptor(by_nothing)])
    readiness = await runtime.add_readiness(server)
    port = channels.bind(server, settings.host, settings.worker_port, tls)
    await server.start()
    log.info("worker started", worker_id=worker_id, slots=settings.slots, health_port=port)
    watching = asyncio.create_task(_watch_health(driver, link, readiness), name="health")
    lifetime.watch(watching)
    return WorkerServer(driver, link, linking, server, readiness, watching)


async def _keep_linked(link: WorkerLink, lifetime: runtime.Lifetime) -> None:
    try:
        await link.run()
    except RefusedByScheduler as refusal:
        log.error("the scheduler will not have this worker", error=str(refusal))
        lifetime.end(runtime.EXIT_FAILED, "refused by the scheduler")


async def _watch_health(driver: EngineDriver, link: WorkerLink, readiness: runtime.Readiness) -> None:
    """Alive while the engine turns, serving while it is in session too. A scheduler that is away makes no
    worker dead: a restart would cost the models' loading and bring nobody back."""
    while True:
        turns = time.monotonic() - driver.last_progress_s <= STALLED_S
        await readiness.set(turns and link.connected)
        await readiness.set_alive(turns)
        await asyncio.sleep(HEALTH_INTERVAL_S)


def hello(settings: Settings, engine: Engine, worker_id: str) -> worker_pb2.WorkerHello:
    """Who this worker is. Resident requests are the session's to add."""
    pair = engine.pair
    return worker_pb2.WorkerHello(
        worker_id=worker_id,
        pool=settings.pool,
        slots=settings.slots,
        device=str(pair.device),
        target=settings.target,
        draft=settings.draft_model or "",
        model_fingerprint=pair.fingerprint,
        vocabulary_size=pair.vocabulary_size,
        context_tokens=engine.context_tokens,
        costs=convert.Costs.measured(engine.costs, settings.draft_tokens, switch_s=0.0).to_proto(),
    )


def device(settings: Settings) -> str:
    if settings.device != "auto":
        return settings.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def dtype(settings: Settings) -> str:
    """float32 on a CPU, where greedy output is promised to be exactly the target's; on a GPU bfloat16."""
    if settings.dtype != "auto":
        return settings.dtype
    return "float32" if device(settings) == "cpu" else "bfloat16"


def run(settings: Settings) -> int:
    """`laps worker`: runs until it is told to stop; returns the exit code."""
    logs.configure_logging("worker", pool=settings.pool, level=settings.log_level, form=settings.log_format)
    try:
        settings.check_models()
        TlsFiles.of_service(settings)
        if shards.wanted(settings):
            shards.launch(settings)
        group = shards.join(settings, device(settings))
        leads = group is None or group.rank == 0
        with runtime.resting_collector():
            pair = load_pair(
                settings.target,
                settings.draft_model if leads else None,
                dtype=dtype(settings),
                device=str(group.device) if group else device(settings),
                device_map=settings.device_map,
                group=group,
            )
            engine = make_engine(settings, pair)
        if not leads:
            return shards.follow(engine)
        engine.calibrate()
    except ModelError as error:
        print(f"laps worker: {error}", file=sys.stderr)
        return runtime.EXIT_FAILED

    async def start(lifetime: runtime.Lifetime) -> runtime.Stop:
        return (await serve(settings, engine, lifetime)).stop

    telemetry.configure_tracing(
        "worker", settings.instance_id("worker"), pool=settings.pool, endpoint=settings.otlp_endpoint
    )
    code = runtime.run(runtime.run_until_signalled(start, settings.drain_s))
    if group is not None:
        group.stop()
    telemetry.close_tracing()
    # The interpreter would look through all of torch's objects once more before it ends.
    gc.freeze()
    return code
