"""Sessions of workers with a leader that ends, or that has seen less than they."""

from __future__ import annotations

import asyncio
import math
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from laps import errors
from laps.history import HistoryPoint
from laps.v1 import worker_pb2
from scheduler_svc import convert
from scheduler_svc.core.policies import make_policy
from scheduler_svc.core.scheduler import Scheduler
from scheduler_svc.core.settings import SchedulerSettings
from scheduler_svc.leader import Leader
from scheduler_svc.sessions import WorkerSession
from scheduler_svc.worker_service import WorkerService


class Aborted(Exception):
    pass


class Context:
    """A call on which messages can be put and read."""

    def __init__(self, *messages: worker_pb2.SessionRequest) -> None:
        self.requests: asyncio.Queue[worker_pb2.SessionRequest] = asyncio.Queue()
        self.responses: asyncio.Queue[worker_pb2.SessionResponse] = asyncio.Queue()
        for message in messages:
            self.requests.put_nowait(message)

    async def read(self) -> worker_pb2.SessionRequest:
        return await self.requests.get()

    async def write(self, message: worker_pb2.SessionResponse) -> None:
        self.responses.put_nowait(message)

    async def abort(self, code: grpc.StatusCode, details: str, trailing: Any = ()) -> None:
        raise Aborted(code.name)


class FakeTerms:
    pool = "p"

    def __init__(self) -> None:
        self.store: Any = SimpleNamespace(seen=HistoryPoint(1, 1, 5))
        core = Scheduler("p", make_policy("fcfs"), SchedulerSettings())
        self.leader = Leader(
            core, self.store, epoch=1, tick_interval_s=0.0, gateway_grace_s=5.0, leader_ttl_s=3.0
        )

    async def leader_or_abort(self, context: Any) -> Leader:
        return self.leader

    async def check_seen_or_abort(self, leader: Leader, seen: HistoryPoint, context: Any) -> None:
        if seen > self.store.seen:
            await errors.abort(context, self.not_leading())

    def not_leading(self) -> errors.LapsError:
        return errors.Unavailable("not the leader", reason=errors.Reason.NOT_LEADER)


def hello(**fields: Any) -> worker_pb2.SessionRequest:
    return worker_pb2.SessionRequest(hello=worker_pb2.WorkerHello(worker_id="w", pool="p", slots=1, **fields))


async def test_a_hello_that_comes_when_the_term_is_over_is_turned_away() -> None:
    terms: Any = FakeTerms()
    context: Any = Context()
    session = asyncio.create_task(WorkerService(terms, 1.0).Session(None, context))
    await asyncio.sleep(0)
    terms.leader.ended.set()
    context.requests.put_nowait(hello())
    with pytest.raises(Aborted, match="UNAVAILABLE"):
        await asyncio.wait_for(session, 60)
    assert terms.leader.core.workers == {}


async def test_reports_of_one_message_are_taken_in_order_and_the_last_one_is_acknowledged() -> None:
    terms: Any = FakeTerms()
    service = WorkerService(terms, 1.0)
    context: Any = Context(hello())
    session = asyncio.create_task(service.Session(None, context))
    welcome = (await asyncio.wait_for(context.responses.get(), 60)).welcome
    assert welcome.takes_several_reports
    taken: list[int] = []
    terms.leader.report = lambda session, step, report: taken.append(step)
    of_terms = [worker_pb2.StepReport(epoch=epoch, step=step) for epoch, step in ((1, 1), (9, 2), (1, 3))]
    message = worker_pb2.SessionRequest(reports=worker_pb2.StepReports(reports=of_terms))
    context.requests.put_nowait(message)
    impossible = worker_pb2.StepReport(epoch=1, step=5, timings=worker_pb2.StepTimings(step_s=math.nan))
    last = [worker_pb2.StepReport(epoch=1, step=4), impossible, worker_pb2.StepReport(epoch=1, step=6)]
    context.requests.put_nowait(worker_pb2.SessionRequest(reports=worker_pb2.StepReports(reports=last)))
    with pytest.raises(Aborted, match="INVALID_ARGUMENT"):
        await asyncio.wait_for(session, 60)
    assert taken == [1, 3, 4]


def test_an_older_session_of_a_worker_neither_drains_nor_keeps_alive_the_newer_one() -> None:
    leader, core = (terms := FakeTerms()).leader, terms.leader.core
    old, new = WorkerSession("w"), WorkerSession("w")
    for session in (old, new):
        leader.open_session(session, convert.worker(hello().hello), [])
    core.workers["w"].last_seen_s = -5.0
    leader.heartbeat(old)
    leader.drain(old)
    assert core.workers["w"].last_seen_s == -5.0
    assert not core.workers["w"].draining
    leader.drain(new)
    assert core.workers["w"].last_seen_s >= 0.0
    assert core.workers["w"].draining


async def test_a_worker_that_has_seen_more_is_turned_away_and_one_that_has_not_is_told_how_far_it_is() -> (
    None
):
    terms: Any = FakeTerms()
    service = WorkerService(terms, 1.0)
    ahead: Any = Context(hello(seen=HistoryPoint(1, 1, 6).to_proto()))
    with pytest.raises(Aborted):
        await service.Session(None, ahead)
    even: Any = Context(hello(seen=HistoryPoint(1, 1, 5).to_proto()))
    session = asyncio.create_task(service.Session(None, even))
    welcome = (await asyncio.wait_for(even.responses.get(), 60)).welcome
    assert HistoryPoint.from_proto(welcome.history) == terms.store.seen
    session.cancel()
    with pytest.raises(asyncio.CancelledError):
        await session
