"""What the engine's thread hands over goes out from the event loop's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc.aio
import pytest_asyncio

from laps.v1 import worker_pb2, worker_pb2_grpc
from worker_svc.driver import Command, SessionLost, SessionOpened
from worker_svc.engine import StepResult
from worker_svc.reports import Report
from worker_svc.session import WorkerLink

TIMEOUT_S = 60.0


@dataclass
class Driver:
    """What `WorkerLink` asks of an `EngineDriver`."""

    opened: asyncio.Queue[SessionOpened] = field(default_factory=asyncio.Queue)
    failures: asyncio.Queue[BaseException] = field(default_factory=asyncio.Queue)

    def post(self, command: Command) -> None:
        if isinstance(command, SessionOpened):
            self.opened.put_nowait(command)
        else:
            assert isinstance(command, SessionLost)

    def on_failure(self, error: BaseException) -> None:
        self.failures.put_nowait(error)

    def resident(self) -> list[worker_pb2.ResidentRequest]:
        return []

    def wait_detached(self, timeout_s: float) -> bool:
        return True


class Scheduler(worker_pb2_grpc.WorkerServiceServicer):
    def __init__(self) -> None:
        self.received: asyncio.Queue[worker_pb2.SessionRequest] = asyncio.Queue()

    async def Session(self, requests: AsyncIterator[worker_pb2.SessionRequest], context: object) -> object:  # type: ignore[override]
        assert (await anext(requests)).HasField("hello")
        welcome = worker_pb2.SessionWelcome(epoch=3, heartbeat_interval_s=3600, takes_several_reports=True)
        yield worker_pb2.SessionResponse(welcome=welcome)
        async for request in requests:
            self.received.put_nowait(request)


@dataclass
class House:
    driver: Driver
    scheduler: Scheduler
    session: SessionOpened

    async def send(self, *reports: Report) -> None:
        """As the engine does it: from a thread of its own."""
        await asyncio.to_thread(self.session.send, reports)

    async def next(self) -> worker_pb2.SessionRequest:
        return await asyncio.wait_for(self.scheduler.received.get(), TIMEOUT_S)


@pytest_asyncio.fixture
async def house() -> AsyncIterator[House]:
    scheduler, driver = Scheduler(), Driver()
    server = grpc.aio.server()
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(scheduler, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    link = WorkerLink(f"127.0.0.1:{port}", driver, worker_pb2.WorkerHello, report_interval_s=0.03)  # type: ignore[arg-type]
    running = asyncio.create_task(link.run())
    yield House(driver, scheduler, await asyncio.wait_for(driver.opened.get(), TIMEOUT_S))
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await server.stop(0)


async def test_reports_go_out_alone_and_together(house: House) -> None:
    assert (house.session.epoch, house.session.report_interval_s) == (3, 0.03)
    result = StepResult(request_ids=("a",), offsets=(4,), finish=(None,), matched_stop=(None,), step_s=0.5)
    await house.send(Report(3, 1, result, [7]))
    message = await house.next()
    assert (message.report.step, list(message.report.lease_ids)) == (1, [7])
    assert list(message.report.offsets) == [4]
    assert message.report.timings.step_s == 0.5
    await house.send(Report(3, 2), Report(3, 3, released_lease_ids=[7]))
    steps = (await house.next()).reports.reports
    assert [(report.step, list(report.released_lease_ids)) for report in steps] == [(2, []), (3, [7])]


async def test_a_report_that_no_message_holds_ends_the_worker(house: House) -> None:
    """Else the engine would wait for the answer to it for ever."""
    await house.send(Report(3, 1, released_lease_ids=[-1]))
    error = await asyncio.wait_for(house.driver.failures.get(), TIMEOUT_S)
    assert isinstance(error, ValueError)
