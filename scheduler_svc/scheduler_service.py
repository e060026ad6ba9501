"""SchedulerService: what gateways call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import structlog

from laps import errors
from laps.channels import DEFAULT_MAX_MESSAGE_BYTES
from laps.history import HistoryPoint
from laps.v1 import scheduler_pb2, scheduler_pb2_grpc
from scheduler_svc import convert
from scheduler_svc.core.records import TOKEN_BYTES, Request
from scheduler_svc.deliveries import MESSAGE_BYTES, Follower
from scheduler_svc.leader import Leader
from scheduler_svc.metrics import kv_cache_utilization
from scheduler_svc.store import inspector_proto
from scheduler_svc.store.errors import RecordDamaged, StoreUnavailable
from scheduler_svc.submissions import Submissions
from scheduler_svc.term import Terms

log = structlog.get_logger()

MOST_ENDED = 50_000
"""Follows of ended or unknown requests that one stream may have waiting. No more is read before some of them
are answered."""


class SchedulerService(scheduler_pb2_grpc.SchedulerServiceServicer):
    def __init__(
        self,
        terms: Terms,
        on_refused: Callable[[str, str], None] = lambda method, status: None,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    ) -> None:
        self._terms = terms
        self._submissions = Submissions(terms, on_refused)
        # What a follower counts is about a third of a message whose rows have long ids and a token each.
        self._message_bytes = min(MESSAGE_BYTES, max_message_bytes // 4)

    async def Submit(
        self, request: scheduler_pb2.SubmitRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> scheduler_pb2.SubmitResponse:
        try:
            taken = self._submissions.take(request)
        except errors.LapsError as error:
            await errors.abort(context, error)
        await self._terms.settled_or_abort(taken.leader, context)
        return taken.stored()

    async def SubmitMany(  # type: ignore[override]
        self, request_iterator: object, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        await self._terms.leader_or_abort(context)
        await self._submissions.serve(context)

    async def Deliver(  # type: ignore[override]
        self, request_iterator: object, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        leader = await self._terms.leader_or_abort(context)
        follower = Follower(self._message_bytes)
        leader.hub.opened(follower)
        reading = asyncio.create_task(self._read_follows(leader, follower, context))
        reading.add_done_callback(lambda _: follower.close())
        try:
            while (response := await follower.next_message()) is not None:
                response.history.CopyFrom(self._terms.store.seen.to_proto())
                response.commit_seq = response.history.commit_seq
                await context.write(response)
                if follower.overrun:
                    await errors.abort(
                        context,
                        errors.ResourceExhausted(
                            "the gateway reads too slowly",
                            reason=errors.Reason.CLIENT_TOO_SLOW,
                            retry_after_s=0.1,
                        ),
                    )
            if not reading.done() or reading.cancelled():
                await errors.abort(context, self._terms.not_leading())
            if (failure := reading.exception()) is not None:
                # The gateway comes back and follows again from its offsets.
                if isinstance(failure, StoreUnavailable):
                    await errors.abort(context, errors.store_unreachable(str(failure)))
                raise failure
        finally:
            reading.cancel()
            leader.hub.lost(follower, leader.core.requests, leader.now_s())
            leader.wake()

    async def _read_follows(
        self,
        leader: Leader,
        follower: Follower,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> None:
        """A gateway that comes back follows all at once, what has ended meanwhile too. That is read from the
        store one by one, and live requests do not wait for it: whom nobody follows is cancelled."""
        ended = _Ended()
        tasks = [
            asyncio.create_task(work)
            for work in (
                self._read_messages(leader, follower, context, ended),
                self._answer_ended(leader, follower, ended),
            )
        ]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _read_messages(
        self,
        leader: Leader,
        follower: Follower,
        context: grpc.aio.ServicerContext[Any, Any],
        ended: _Ended,
    ) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
            later = []
            for follow in message.follow:
                if leader.core.get(follow.request_id) is None:
                    later.append(follow)
                    continue
                await follower.until_room()
                if not await self._follow_live(leader, follower, follow.request_id, follow.offset):
                    later.append(follow)
            for follow in later:
                await ended.add(follow.request_id, follow.offset)
            if message.unfollow:
                gone: dict[str, Request | None] = {}
                for unfollow in message.unfollow:
                    ended.take(unfollow.request_id)
                    live = None if unfollow.done else leader.core.get(unfollow.request_id)
                    gone[unfollow.request_id] = live or gone.get(unfollow.request_id)
                leader.hub.unfollow(follower, gone, leader.now_s())
                leader.wake()
        ended.close()

    async def _answer_ended(self, leader: Leader, follower: Follower, ended: _Ended) -> None:
        while request_ids := await ended.next():
            # The last commit of one may be under way. Of all that were asked for by now it is stored then.
            await leader.settled()
            for request_id in request_ids:
                await follower.until_room()
                offset = ended.take(request_id)
                if offset is not None:
                    await self._follow_ended(leader, follower, request_id, offset)

    async def _follow_live(self, leader: Leader, follower: Follower, request_id: str, offset: int) -> bool:
        """False: it is not live, or not any more."""
        logprobs = b""
        logged_tokens = offset
        while (live := leader.core.get(request_id)) is not None:
            stored = leader.stored_tokens(live)
            if not convert.wants_logprobs(live.spec) or stored <= logged_tokens:
                leader.hub.follow(follower, live, stored, offset, logprobs)
                return True
            # Logprobs are in the store alone. More may be stored while we read: look again.
            tokens, logprobs = await self._terms.store.read_log(request_id, offset)
            logged_tokens = offset + len(tokens) // TOKEN_BYTES
        return False

    async def _follow_ended(self, leader: Leader, follower: Follower, request_id: str, offset: int) -> None:
        """Of one that had ended, or was never heard of, before the leader was settled."""
        try:
            stored_request = await self._terms.store.read_request(request_id)
        except RecordDamaged as error:
            # Of one request that has ended. Whoever follows others on this stream must not suffer for it.
            log.error("record not readable", request_id=request_id, error=str(error))
            stored_request = None
        if stored_request is None:
            follower.add_unknown(request_id)
            return
        if stored_request.finish_reason is None:
            if await self._follow_live(leader, follower, request_id, offset):
                # Its id was given to another request meanwhile.
                return
            # It has ended here, so the store went back, and the next commit will notice. Until then nothing
            # is to be told from it.
            raise StoreUnavailable(f"request {request_id} has not ended in the store")
        tokens, logprobs = await self._terms.store.read_log(request_id, offset)
        if tokens:
            follower.add_missed(request_id, offset, tokens, logprobs)
        follower.add_completion(
            scheduler_pb2.Completion(
                request_id=request_id,
                output_tokens=stored_request.output_tokens,
                complete=convert.complete(stored_request),
            ),
            missed=True,
        )

    async def CancelRequest(
        self, request: scheduler_pb2.CancelRequestRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> scheduler_pb2.CancelRequestResponse:
        leader = await self._terms.leader_or_abort(context)
        state = leader.core.cancel(request.request_id, leader.now_s())
        await self._terms.settled_or_abort(leader, context)
        if state is None:
            await self._read_or_abort(request.request_id, context)
            return scheduler_pb2.CancelRequestResponse(state=convert.FINISHED)
        return scheduler_pb2.CancelRequestResponse(state=convert.STATE_TO_PROTO[state])

    async def ReadRequest(
        self, request: scheduler_pb2.ReadRequestRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> scheduler_pb2.ReadRequestResponse:
        leader = await self._terms.leader_or_abort(context)
        found = await self._read_or_abort(request.request_id, context)
        while (live := leader.core.get(request.request_id)) is None and found.finish_reason is None:
            # It has ended since it was read. What is read once that is stored has all of its output.
            await self._terms.settled_or_abort(leader, context)
            found = await self._read_or_abort(request.request_id, context)
        if live is not None:
            # What is stored but not in its log yet: whoever has read it in a stream shall find it here too.
            stored_bytes = leader.stored_tokens(live) * TOKEN_BYTES
            found.output += live.output[len(found.output) : stored_bytes]
        response = scheduler_pb2.ReadRequestResponse(
            request=inspector_proto.request_to_proto(found, self._terms.pool),
            stopping=convert.stopping_params(found.spec),
        )
        if request.include_output:
            response.output_token_ids = bytes(found.output)
        if request.include_prompt:
            response.prompt_token_ids = found.spec.packed_prompt
        if found.finish_reason is not None:
            response.complete.CopyFrom(convert.complete(found))
        return response

    async def _read_or_abort(self, request_id: str, context: grpc.aio.ServicerContext[Any, Any]) -> Request:
        """A stored request; NOT_FOUND, or UNAVAILABLE while the store does not answer."""
        try:
            found = await self._terms.store.read_request(request_id)
        except StoreUnavailable as error:
            await errors.abort(context, errors.store_unreachable(str(error)))
        except RecordDamaged as error:
            log.error("record not readable", request_id=request_id, error=str(error))
            await errors.abort(context, errors.DataLoss(str(error), reason=errors.Reason.RECORD_DAMAGED))
        if found is None:
            await errors.abort(context, errors.request_unknown(request_id))
        return found

    async def DescribePool(
        self, request: scheduler_pb2.DescribePoolRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> scheduler_pb2.DescribePoolResponse:
        leader = await self._terms.leader_or_abort(context)
        await self._terms.check_seen_or_abort(leader, HistoryPoint.from_proto(request.seen), context)
        response = scheduler_pb2.DescribePoolResponse(
            pool=self._terms.pool,
            policy=leader.core.policy.name,
            epoch=leader.epoch,
            history=self._terms.store.seen.to_proto(),
            context_tokens=leader.core.context_tokens,
        )
        for worker in leader.core.workers.values():
            response.workers += 1
            response.slots += worker.slots
            response.vocabulary_size = worker.vocabulary_size
            response.model_fingerprint = worker.model_fingerprint
            response.target = worker.target
            response.draft = worker.draft
        response.queued_requests = leader.core.waiting_requests
        response.running_requests = leader.core.running_requests
        response.kv_cache_utilization = kv_cache_utilization(leader.core)
        return response


class _Ended:
    """Follows of a stream that are still to be answered from the store: offsets by request."""

    def __init__(self) -> None:
        self._offsets: dict[str, int] = {}
        self._changed = asyncio.Event()
        self._closed = False

    async def add(self, request_id: str, offset: int) -> None:
        """Waits while there are too many."""
        while len(self._offsets) >= MOST_ENDED:
            self._changed.clear()
            await self._changed.wait()
        self._offsets[request_id] = offset
        self._changed.set()

    def take(self, request_id: str) -> int | None:
        """None: it is not asked for any more."""
        offset = self._offsets.pop(request_id, None)
        self._changed.set()
        return offset

    def close(self) -> None:
        """No more come."""
        self._closed = True
        self._changed.set()

    async def next(self) -> list[str]:
        """All that there are, as soon as there are some; none: no more come."""
        while not (self._offsets or self._closed):
            self._changed.clear()
            await self._changed.wait()
        return list(self._offsets)
