"""The worker's session with the scheduler that leads its pool: one stream, reopened for ever."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import grpc
import structlog

from laps import channels
from laps.history import HistoryPoint
from laps.security.tls import TlsFiles
from laps.v1 import worker_pb2, worker_pb2_grpc
from worker_svc.driver import EngineDriver, SessionLost, SessionOpened
from worker_svc.reports import Report

log = structlog.get_logger()

RECONNECT_FIRST_S = 0.05
RECONNECT_LAST_S = 2.0
DETACH_TIMEOUT_S = 60.0
SCHEDULER = worker_pb2.DESCRIPTOR.services_by_name["WorkerService"].full_name
REFUSALS = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.PERMISSION_DENIED,
    }
)
"""Statuses that another attempt would not change."""

Outbox = asyncio.Queue[worker_pb2.SessionRequest]
Call = grpc.aio.StreamStreamCall[worker_pb2.SessionRequest, worker_pb2.SessionResponse]


class RefusedByScheduler(Exception):
    """The scheduler will never take this worker: wrong pool or wrong model."""


@dataclass
class WorkerLink:
    """Keeps the driver in session. `hello` is asked for at every new session."""

    address: str
    driver: EngineDriver
    hello: Callable[[], worker_pb2.WorkerHello]
    tls: TlsFiles | None = None
    report_interval_s: float = 0.0
    """About how far apart reports that only tell of tokens are; 0: every step by itself."""
    max_message_bytes: int = channels.DEFAULT_MAX_MESSAGE_BYTES
    connected: bool = False
    seen: HistoryPoint = field(default_factory=HistoryPoint)
    """The furthest that any scheduler has said the pool's history to be stored."""
    draining: bool = False
    _outbox: Outbox | None = None

    async def run(self) -> None:
        """Reconnects until cancelled.

        Raises:
            RefusedByScheduler: the scheduler said that trying again is of no use.
        """
        wait_s = RECONNECT_FIRST_S
        complained = False
        addresses = itertools.cycle(self.address.split(","))
        address = next(addresses)
        while True:
            try:
                # A new connection each time: behind one name another scheduler may lead by now, and an
                # old connection would go on to the one that does not. It also has the newest certificate.
                async with channels.open_channel(
                    address, max_message_bytes=self.max_message_bytes, serving=SCHEDULER, tls=self.tls
                ) as channel:
                    await self._session(worker_pb2_grpc.WorkerServiceStub(channel))
            except grpc.aio.AioRpcError as error:
                if error.code() in REFUSALS:
                    raise RefusedByScheduler(error.details()) from error
                if self.connected:
                    wait_s, complained = RECONNECT_FIRST_S, False
                else:
                    address = next(addresses)
                if not complained:
                    log.warning(
                        "no session, trying again until there is one",
                        address=address,
                        because=f"{error.code().name}: {error.details()}",
                    )
                    complained = True
            except OSError as error:
                log.error("certificates not readable, trying again until they are", error=str(error))
            finally:
                self.connected = False
            # Jitter: all workers of a pool lose the same scheduler in the same moment.
            await asyncio.sleep(wait_s * random.uniform(0.5, 1.0))
            wait_s = min(2 * wait_s, RECONNECT_LAST_S)

    def drain(self) -> None:
        """Asks for no more leases, in this session and in any later one."""
        self.draining = True
        if self._outbox is not None:
            self._outbox.put_nowait(worker_pb2.SessionRequest(drain=worker_pb2.Drain()))

    async def _session(self, stub: worker_pb2_grpc.WorkerServiceAsyncStub) -> None:
        outbox: Outbox = asyncio.Queue()
        hello = self.hello()
        hello.resident.extend(self.driver.resident())
        hello.seen.CopyFrom(self.seen.to_proto())
        outbox.put_nowait(worker_pb2.SessionRequest(hello=hello))
        call: Call = stub.Session()  # type: ignore[call-arg]  # the stubs do not know that it is optional
        tasks = [asyncio.create_task(self._write(call, outbox))]
        try:
            async for message in call:
                if message.WhichOneof("message") == "leases":
                    self.seen = max(self.seen, HistoryPoint.from_proto(message.leases.history))
                    self.driver.post(message.leases)
                    continue
                self.seen = max(self.seen, HistoryPoint.from_proto(message.welcome.history))
                self._open(outbox, message.welcome)
                tasks.append(asyncio.create_task(self._beat(outbox, message.welcome)))
        finally:
            for task in tasks:
                task.cancel()
            call.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._outbox = None
            self.driver.post(SessionLost())
            if not await asyncio.to_thread(self.driver.wait_detached, DETACH_TIMEOUT_S):
                log.error("engine does not come to a step boundary", waited_s=DETACH_TIMEOUT_S)

    def _open(self, outbox: Outbox, welcome: worker_pb2.SessionWelcome) -> None:
        loop = asyncio.get_running_loop()

        def put(reports: Sequence[Report]) -> None:
            try:
                outbox.put_nowait(_message(reports))
            except Exception as error:
                # The engine would wait for the answer for ever.
                log.exception("report cannot be sent")
                self.driver.on_failure(error)

        def send(reports: Sequence[Report]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the process is ending
                loop.call_soon_threadsafe(put, reports)

        # A scheduler that does not know of several reports in a message gets each by itself.
        interval_s = self.report_interval_s if welcome.takes_several_reports else 0.0
        self.driver.post(SessionOpened(welcome.epoch, send, interval_s))
        self._outbox = outbox
        self.connected = True
        log.info("in session", epoch=welcome.epoch)
        if self.draining:
            self.drain()

    @staticmethod
    async def _write(call: Call, outbox: Outbox) -> None:
        while True:
            await call.write(await outbox.get())

    @staticmethod
    async def _beat(outbox: Outbox, welcome: worker_pb2.SessionWelcome) -> None:
        """A heartbeat of our own: gRPC's keepalive is answered by a process whose event loop is blocked."""
        while True:
            await asyncio.sleep(welcome.heartbeat_interval_s)
            outbox.put_nowait(worker_pb2.SessionRequest(heartbeat=worker_pb2.Heartbeat()))


def _message(reports: Sequence[Report]) -> worker_pb2.SessionRequest:
    steps = [report.to_proto() for report in reports]
    if len(steps) == 1:
        return worker_pb2.SessionRequest(report=steps[0])
    return worker_pb2.SessionRequest(reports=worker_pb2.StepReports(reports=steps))
