"""WorkerService: sessions of workers with the leader."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, NoReturn

import grpc
import structlog

from laps import errors
from laps.history import HistoryPoint
from laps.v1 import worker_pb2, worker_pb2_grpc
from scheduler_svc import checks, convert
from scheduler_svc.leader import Leader
from scheduler_svc.sessions import WorkerSession
from scheduler_svc.term import Terms

log = structlog.get_logger()


class WorkerService(worker_pb2_grpc.WorkerServiceServicer):
    def __init__(
        self,
        terms: Terms,
        heartbeat_interval_s: float,
        on_refused: Callable[[str, str], None] = lambda method, status: None,
    ) -> None:
        self._terms = terms
        self._on_refused = on_refused
        self._heartbeat_interval_s = heartbeat_interval_s

    # Reads and writes by `context`: to iterate over what comes and to yield what goes out costs a coroutine
    # more for every message.
    async def Session(  # type: ignore[override]
        self, request_iterator: object, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        leader = await self._terms.leader_or_abort(context)
        hello = await self._hello_or_abort(leader, context)
        await self._terms.check_seen_or_abort(leader, HistoryPoint.from_proto(hello.seen), context)
        if leader.ended.is_set():
            # While the hello was on its way. Nobody would ever close a session with a term that is over.
            await errors.abort(context, self._terms.not_leading())
        session = WorkerSession(hello.worker_id)
        welcome = worker_pb2.SessionWelcome(
            epoch=leader.epoch,
            session_timeout_s=leader.core.settings.session_timeout_s,
            heartbeat_interval_s=self._heartbeat_interval_s,
            history=self._terms.store.seen.to_proto(),
            takes_several_reports=True,
        )
        leader.open_session(session, convert.worker(hello), convert.residents(hello))
        log.info("worker joined", worker_id=hello.worker_id, slots=hello.slots, resident=len(hello.resident))
        reading = asyncio.create_task(self._read(leader, session, context))
        try:
            await context.write(worker_pb2.SessionResponse(welcome=welcome))
            while (message := await session.outbox.get()) is not None:
                await context.write(message)
            if reading.done() and isinstance(refusal := reading.exception(), errors.InvalidArgument):
                await self._refuse(context, refusal)
            await errors.abort(context, self._terms.not_leading())
        finally:
            reading.cancel()
            leader.close_session(session)
            log.info("worker left", worker_id=hello.worker_id)

    async def _hello_or_abort(
        self,
        leader: Leader,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> worker_pb2.WorkerHello:
        first = await context.read()
        if first is grpc.aio.EOF or first.WhichOneof("message") != "hello":  # type: ignore[attr-defined]
            await self._refuse(context, errors.InvalidArgument("message", "a session begins with hello"))
        hello: worker_pb2.WorkerHello = first.hello
        if hello.pool != self._terms.pool:
            message = f"this scheduler leads pool {self._terms.pool!r}, not {hello.pool!r}"
            await self._refuse(context, errors.InvalidArgument("hello.pool", message))
        try:
            checks.check_hello(hello)
        except errors.InvalidArgument as error:
            await self._refuse(context, error)
        for other in leader.core.workers.values():
            if other.worker_id != hello.worker_id and other.model_fingerprint != hello.model_fingerprint:
                # Two models in one pool would make a request's output depend on where it runs.
                message = f"worker {other.worker_id} of this pool serves another model pair"
                await self._refuse(context, errors.FailedPrecondition(message))
        return hello

    async def _refuse(
        self, context: grpc.aio.ServicerContext[Any, Any], refusal: errors.LapsError
    ) -> NoReturn:
        self._on_refused("/laps.v1.WorkerService/Session", refusal.status)
        log.warning("worker refused", because=str(refusal))
        await errors.abort(context, refusal)

    @staticmethod
    async def _read(
        leader: Leader, session: WorkerSession, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        """Ends by itself when the stream does.

        Raises:
            InvalidArgument: the worker said what cannot be. Its session is over, its requests wait again.
        """
        try:
            while (message := await context.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
                match message.WhichOneof("message"):
                    case "report":
                        _take(leader, session, message.report)
                    case "reports":
                        for report in message.reports.reports:
                            _take(leader, session, report)
                    case "heartbeat":
                        leader.heartbeat(session)
                    case "drain":
                        leader.drain(session)
                    case unexpected:
                        raise errors.InvalidArgument("message", f"{unexpected} does not come in a session")
        except errors.InvalidArgument as refusal:
            leader.core.counters.reports_refused += 1
            log.error("worker's session refused", worker_id=session.worker_id, because=str(refusal))
            raise
        finally:
            session.close()


def _take(leader: Leader, session: WorkerSession, report: worker_pb2.StepReport) -> None:
    if report.epoch != leader.epoch:
        log.info("report of another term ignored", worker_id=session.worker_id)
        return
    checks.check_report(report)
    leader.report(session, report.step, convert.step_report(session.worker_id, report))
