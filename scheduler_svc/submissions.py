"""Requests as they come from gateways: each in a call, or many in the messages of a stream.

A stream is there because gRPC's asyncio server accepts a call only every few turns of its event loop, however
many wait (docs/performance.md), and messages of a stream come twice as fast and hold as many as there are.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import grpc
import structlog

from laps import errors, telemetry
from laps.v1 import scheduler_pb2
from scheduler_svc import checks, convert
from scheduler_svc.core.records import Refused, Request, RequestSpec
from scheduler_svc.leader import Leader
from scheduler_svc.term import Terms

MOST_AT_ONCE = 32
"""Requests of one message that are taken before others have their turn: some milliseconds."""
MOST_UNREAD = 1000
"""Answers of one stream that wait to be sent or stored. No more is read before some of them are."""

Answers = asyncio.Queue[scheduler_pb2.SubmitManyResponse | None]

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Taken:
    """A request that the leader's core has. It is not stored before the leader is settled."""

    leader: Leader
    spec: RequestSpec
    request: Request | None
    """None: it has ended already."""
    joined: bool

    def stored(self) -> scheduler_pb2.SubmitResponse:
        """The acknowledgement: it cannot be lost any more."""
        if not self.joined:
            log.info(
                "accepted",
                request_id=self.spec.request_id,
                prompt_tokens=self.spec.prompt_tokens,
                **telemetry.trace_field(self.spec.traceparent),
            )
        state = convert.STATE_TO_PROTO[self.request.state] if self.request else convert.FINISHED
        return scheduler_pb2.SubmitResponse(joined=self.joined, state=state, epoch=self.leader.epoch)


class Submissions:
    def __init__(self, terms: Terms, on_refused: Callable[[str, str], None]) -> None:
        self._terms = terms
        self._on_refused = on_refused

    def take(self, request: scheduler_pb2.SubmitRequest) -> Taken:
        """Hands the request to the core. Raises a LapsError."""
        leader = self._terms.leader_or_raise()
        try:
            checks.check_spec(request.spec)
            if request.spec.pool not in ("", self._terms.pool):
                # Another pool serves other models.
                message = f"this scheduler leads pool {self._terms.pool!r}, not {request.spec.pool!r}"
                raise errors.InvalidArgument("spec.pool", message)
        except errors.InvalidArgument as error:
            self._on_refused("/laps.v1.SchedulerService/Submit", error.status)
            log.warning("request refused", because=str(error))
            raise
        spec = convert.request_spec(request.spec)
        if spec.deadline_s is not None:
            # Told by the host's clock. The leader's never jumps, so after a step of that one they differ.
            left_s = spec.deadline_s - time.time()
            spec = replace(spec, deadline_s=leader.now_s() + left_s)
        known = leader.core.get(spec.request_id) or leader.core.retained(spec.request_id)
        if self._terms.store_full and known is None:
            leader.core.counters.refused += 1
            message = "the store has no memory for another request"
            raise errors.ResourceExhausted(message, reason=errors.Reason.STORE_FULL, retry_after_s=2.0)
        try:
            accepted, joined = leader.core.submit(spec, leader.now_s(), convert.tenant_quota(request))
        except Refused as refused:
            raise _refusal(refused) from None
        return Taken(leader, spec, accepted, joined)

    async def serve(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """One stream, until the gateway ends it."""
        answers: Answers = asyncio.Queue()
        room = asyncio.Semaphore(MOST_UNREAD)
        reading = asyncio.create_task(self._read(context, answers, room))
        reading.add_done_callback(lambda _: answers.put_nowait(None))
        try:
            while (response := await answers.get()) is not None:
                await context.write(response)
                room.release()
            reading.result()
        finally:
            reading.cancel()

    async def _read(
        self, context: grpc.aio.ServicerContext[Any, Any], answers: Answers, room: asyncio.Semaphore
    ) -> None:
        settling: dict[asyncio.Task[None], None] = {}
        try:
            while (message := await context.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
                for first in range(0, len(message.submissions), MOST_AT_ONCE):
                    if first:
                        await asyncio.sleep(0)
                    taken, refused = self._take_some(message.submissions[first : first + MOST_AT_ONCE])
                    if taken:
                        task = asyncio.create_task(self._settle(taken, answers))
                        settling[task] = None
                        task.add_done_callback(settling.pop)
                        await room.acquire()
                    if refused:
                        answers.put_nowait(_refusals(refused))
                        await room.acquire()
            await asyncio.gather(*settling)
        finally:
            for task in settling:
                task.cancel()

    def _take_some(
        self, submissions: Sequence[scheduler_pb2.Submission]
    ) -> tuple[list[tuple[int, Taken]], list[tuple[int, errors.LapsError]]]:
        taken: list[tuple[int, Taken]] = []
        refused: list[tuple[int, errors.LapsError]] = []
        for each in submissions:
            try:
                taken.append((each.number, self.take(each.request)))
            except errors.LapsError as error:
                refused.append((each.number, error))
            except Exception:
                # A defect. Without an answer it would end the stream, and come again, for all others too.
                log.exception("defect", request_id=each.request.spec.request_id)
                refused.append((each.number, errors.Internal("internal error")))
        return taken, refused

    async def _settle(
        self,
        taken: Sequence[tuple[int, Taken]],
        answers: Answers,
    ) -> None:
        try:
            await taken[0][1].leader.settled()
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise
            # The term has ended. Whoever asks again, with the same id, is safe.
            error = self._terms.not_leading()
            answers.put_nowait(_refusals([(number, error) for number, _ in taken]))
            return
        response = scheduler_pb2.SubmitManyResponse()
        for number, each in taken:
            response.answers.add(number=number, stored=each.stored())
        answers.put_nowait(response)


def _refusals(refused: Sequence[tuple[int, errors.LapsError]]) -> scheduler_pb2.SubmitManyResponse:
    response = scheduler_pb2.SubmitManyResponse()
    for number, error in refused:
        response.answers.add(number=number, refused=errors.to_status(error).SerializeToString())
    return response


def _refusal(refused: Refused) -> errors.LapsError:
    message = str(refused)
    match refused.reason:
        case "ID_CONFLICT":
            return errors.AlreadyExists(message)
        case "DEADLINE_PASSED":
            return errors.DeadlineExceeded(message)
        case "TOO_LONG":
            return errors.InvalidArgument("prompt", message, reason=errors.Reason.PROMPT_TOO_LONG)
        case _:
            return errors.ResourceExhausted(
                message,
                reason=errors.Reason[refused.reason],
                retry_after_s=refused.retry_after_s or 1.0,
                quota_subject="pool",
            )
