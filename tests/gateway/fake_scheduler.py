"""A scheduler for the gateway's tests: faithful to scheduler.proto, and breakable at will.

What it has stored outlives its server, as Redis outlives a scheduler. Outputs are made up from the
request's digest, so that a transcript can be checked token for token. Nothing runs by a clock:
tests call `emit` or `emit_all`, or turn on `auto_tokens`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
from google.rpc import status_pb2

from gateway.admission import pack
from laps import channels, errors
from laps.v1 import generation_pb2, queue_pb2, queue_pb2_grpc, scheduler_pb2, scheduler_pb2_grpc

TICK_S = 0.001
FINISHED = queue_pb2.REQUEST_STATE_FINISHED
RUNNING = queue_pb2.REQUEST_STATE_RUNNING

Tokens = list[int]
Follows = AsyncIterator[scheduler_pb2.DeliverRequest]
Ends = Callable[[Tokens, Any], tuple[int, str, int] | None]
"""Finds where a stop string cuts a planned output: (tokens up to there, the string, its position)."""


@dataclass
class Stored:
    """A request as the store has it."""

    spec: scheduler_pb2.RequestSpec
    planned: Tokens
    """The whole output that it will have."""
    complete: generation_pb2.Complete
    """How it will end."""
    emitted: int = 0
    finished: bool = False
    disconnects: int = 0

    def logprobs(self, start: int, end: int) -> list[generation_pb2.TokenLogprob]:
        if not self.spec.sampling.HasField("logprobs"):
            return []
        return [generation_pb2.TokenLogprob(logprob=-float(token)) for token in self.planned[start:end]]


@dataclass(eq=False)
class GatewayStream:
    followed: set[str] = field(default_factory=set)
    outgoing: asyncio.Queue[scheduler_pb2.DeliverResponse | None] = field(default_factory=asyncio.Queue)
    messages: int = 0


class FakeScheduler:
    def __init__(self, vocabulary_size: int, ends: Ends) -> None:
        self.requests: dict[str, Stored] = {}
        self.submits = 0
        self.gateways: set[str] = set()
        """Gateways that have submitted."""
        self.follows: list[tuple[str, int]] = []
        self.unfollows: list[tuple[str, bool]] = []
        self.quotas: dict[str, scheduler_pb2.TenantQuota | None] = {}
        """By request: that of its tenant, as it came with Submit."""
        self.refuse: errors.LapsError | None = None
        """What Submit answers instead of storing."""
        self.forget_acknowledgements = 0
        """So many Submits store the request and then fail, as if the answer had been lost."""
        self.thawed = asyncio.Event()
        self.thawed.set()
        self.waiting = 0
        """Calls that came while it was frozen."""
        self.drop_after_messages: int | None = None
        """Every Deliver stream breaks after so many messages."""
        self.distort: Callable[[scheduler_pb2.DeliverResponse], list[scheduler_pb2.DeliverResponse]] | None
        self.distort = None
        """Changes what goes out: repeats, gaps."""
        self.auto_tokens = 0
        self.preempted_because = ""
        self.submissions_read = 0
        """Tokens that every live request gets per tick; 0: only by `emit`."""
        self.pool = scheduler_pb2.DescribePoolResponse(
            pool="default",
            policy="fcfs",
            epoch=1,
            workers=2,
            slots=8,
            target="tiny-target",
            draft="tiny-draft",
        )
        self.port = 0
        self.streams: set[GatewayStream] = set()
        self.changed = asyncio.Condition()
        self._vocabulary_size = vocabulary_size
        self._ends = ends
        self._server: grpc.aio.Server | None = None
        self._ticking: asyncio.Task[None] | None = None
        self._timers: dict[str, asyncio.TimerHandle] = {}

    async def start(self) -> None:
        server = channels.new_server()
        scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(_Scheduler(self), server)
        queue_pb2_grpc.add_QueueServiceServicer_to_server(_Queue(self), server)
        self.port = channels.bind(server, "127.0.0.1", self.port)
        await server.start()
        self._server = server
        self._ticking = asyncio.create_task(self._tick())

    async def kill(self) -> None:
        """All connections break; what is stored stays."""
        assert self._server is not None
        assert self._ticking is not None
        self._ticking.cancel()
        await asyncio.gather(self._ticking, return_exceptions=True)
        server, self._server = self._server, None
        await server.stop(None)
        self.streams.clear()

    async def stop(self) -> None:
        self.thawed.set()
        for timer in self._timers.values():
            timer.cancel()
        if self._server is not None:
            await self.kill()

    async def until(self, condition: Callable[[], Any]) -> None:
        """Waits for something that the gateway does."""
        async with self.changed:
            await asyncio.wait_for(self.changed.wait_for(condition), 60)

    async def notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    def plan(self, spec: scheduler_pb2.RequestSpec) -> Stored:
        """The output follows from the body alone, up to a stop string or max_tokens."""
        chance = random.Random(spec.digest)
        planned = [chance.randrange(self._vocabulary_size) for _ in range(spec.stopping.max_tokens)]
        complete = generation_pb2.Complete(finish_reason=generation_pb2.FINISH_REASON_LENGTH)
        if (end := self._ends(planned, spec.stopping)) is not None:
            planned = planned[: end[0]]
            complete.finish_reason = generation_pb2.FINISH_REASON_STOP
            complete.matched_stop = end[1]
        complete.usage.prompt_tokens = len(spec.prompt_token_ids) // 4
        complete.usage.completion_tokens = len(planned)
        return Stored(spec, planned, complete)

    def emit(self, request_id: str, tokens: int) -> None:
        """One commit with so many tokens; the last one brings the end."""
        self.deliver([(self.requests[request_id], tokens)])

    def deliver(self, appends: list[tuple[Stored, int]]) -> None:
        """One commit: stored first, then sent, in one message per gateway."""
        entries: list[tuple[Stored, int, int]] = []
        for stored, tokens in appends:
            if stored.finished:
                continue
            start = stored.emitted
            stored.emitted = min(start + tokens, len(stored.planned))
            stored.finished = stored.emitted == len(stored.planned)
            entries.append((stored, start, stored.emitted))
        for stream in self.streams:
            mine = [entry for entry in entries if entry[0].spec.request_id in stream.followed]
            if mine:
                stream.outgoing.put_nowait(_response(mine))

    def finish(self, stored: Stored, reason: generation_pb2.FinishReason.ValueType) -> None:
        """Ends it where it is."""
        if not stored.finished:
            stored.planned = stored.planned[: stored.emitted]
            stored.complete = generation_pb2.Complete(finish_reason=reason)
            self.deliver([(stored, 0)])

    def follow(self, stream: GatewayStream, request_id: str, offset: int) -> None:
        self.follows.append((request_id, offset))
        if (timer := self._timers.pop(request_id, None)) is not None:
            timer.cancel()
        stored = self.requests.get(request_id)
        if stored is None:
            stream.outgoing.put_nowait(scheduler_pb2.DeliverResponse(unknown=[request_id]))
            return
        stream.followed.add(request_id)
        if stored.emitted > offset or stored.finished:
            stream.outgoing.put_nowait(_response([(stored, offset, stored.emitted)]))

    def unfollow(self, stream: GatewayStream, request_id: str, done: bool) -> None:
        self.unfollows.append((request_id, done))
        stream.followed.discard(request_id)
        stored = self.requests.get(request_id)
        if done or stored is None or any(request_id in each.followed for each in self.streams):
            return
        stored.disconnects += 1
        if stored.spec.cancel_on_disconnect:
            loop = asyncio.get_running_loop()
            self._timers[request_id] = loop.call_later(
                stored.spec.disconnect_grace_s, self.finish, stored, generation_pb2.FINISH_REASON_CANCELLED
            )

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            if self.auto_tokens:
                live = [stored for stored in self.requests.values() if not stored.finished]
                self.deliver([(stored, self.auto_tokens) for stored in live])


class _Scheduler(scheduler_pb2_grpc.SchedulerServiceServicer):
    def __init__(self, fake: FakeScheduler) -> None:
        self._fake = fake

    async def Submit(self, request: scheduler_pb2.SubmitRequest, context: Any) -> Any:
        await _thaw(self._fake)
        fake, spec = self._fake, request.spec
        fake.submits += 1
        assert request.gateway_id
        fake.gateways.add(request.gateway_id)
        fake.quotas[spec.request_id] = request.quota if request.HasField("quota") else None
        if fake.refuse is not None:
            await errors.abort(context, fake.refuse)
        known = fake.requests.get(spec.request_id)
        if known is not None and known.spec.digest != spec.digest:
            await errors.abort(
                context, errors.AlreadyExists(f"request_id {spec.request_id!r} was used with another body")
            )
        if known is None:
            fake.requests[spec.request_id] = fake.plan(spec)
        await fake.notify()
        if fake.forget_acknowledgements:
            fake.forget_acknowledgements -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "connection lost")
        state = fake.requests[spec.request_id]
        return scheduler_pb2.SubmitResponse(
            joined=known is not None, state=FINISHED if state.finished else RUNNING, epoch=1
        )

    async def SubmitMany(self, request_iterator: Any, context: Any) -> None:
        answering: set[asyncio.Task[None]] = set()
        # gRPC refuses a message while another is being written.
        writing = asyncio.Lock()

        async def answer(each: scheduler_pb2.Submission) -> None:
            response = scheduler_pb2.SubmitManyResponse()
            try:
                response.answers.add(number=each.number, stored=await self.Submit(each.request, _Answer()))
            except _Refused as refused:
                response.answers.add(number=each.number, refused=refused.status)
            async with writing:
                await context.write(response)

        async for message in request_iterator:
            self._fake.submissions_read += len(message.submissions)
            for each in message.submissions:
                answering.add(asyncio.create_task(answer(each)))
        await asyncio.gather(*answering)

    async def Deliver(self, request_iterator: Follows, context: Any) -> None:
        fake = self._fake
        await _thaw(fake)
        stream = GatewayStream()
        fake.streams.add(stream)
        reading = asyncio.create_task(self._read(stream, request_iterator))
        try:
            while (message := await stream.outgoing.get()) is not None:
                await _thaw(fake)
                for each in fake.distort(message) if fake.distort else [message]:
                    if stream.messages == fake.drop_after_messages:
                        await context.abort(grpc.StatusCode.UNAVAILABLE, "connection lost")
                    stream.messages += 1
                    await context.write(each)
        finally:
            reading.cancel()
            fake.streams.discard(stream)

    async def _read(self, stream: GatewayStream, requests: Follows) -> None:
        async for message in requests:
            await _thaw(self._fake)
            for follow in message.follow:
                self._fake.follow(stream, follow.request_id, follow.offset)
            for unfollow in message.unfollow:
                self._fake.unfollow(stream, unfollow.request_id, unfollow.done)
            await self._fake.notify()

    async def CancelRequest(self, request: scheduler_pb2.CancelRequestRequest, context: Any) -> Any:
        await _thaw(self._fake)
        stored = self._fake.requests.get(request.request_id)
        if stored is None:
            await errors.abort(context, errors.request_unknown(request.request_id))
        self._fake.finish(stored, generation_pb2.FINISH_REASON_CANCELLED)
        return scheduler_pb2.CancelRequestResponse(state=FINISHED)

    async def ReadRequest(self, request: scheduler_pb2.ReadRequestRequest, context: Any) -> Any:
        await _thaw(self._fake)
        stored = self._fake.requests.get(request.request_id)
        if stored is None:
            await errors.abort(context, errors.request_unknown(request.request_id))
        response = scheduler_pb2.ReadRequestResponse(
            request=queue_pb2.RequestInfo(
                request_id=request.request_id,
                state=FINISHED if stored.finished else RUNNING,
                output_tokens=stored.emitted,
                preempted_because=self._fake.preempted_because,
            )
        )
        if request.include_output:
            response.output_token_ids = packed(stored.planned[: stored.emitted])
        if request.include_prompt:
            response.prompt_token_ids = stored.spec.prompt_token_ids
        if stored.finished:
            response.complete.CopyFrom(stored.complete)
        response.stopping.CopyFrom(stored.spec.stopping)
        return response

    async def DescribePool(self, request: scheduler_pb2.DescribePoolRequest, context: Any) -> Any:
        await _thaw(self._fake)
        return self._fake.pool


class _Refused(Exception):
    def __init__(self, status: bytes) -> None:
        self.status = status


class _Answer:
    """In place of a call's context: its end is one answer of a stream."""

    async def abort(self, code: grpc.StatusCode, message: str, trailing: Any = ()) -> None:
        bare = status_pb2.Status(code=code.value[0], message=message).SerializeToString()
        raise _Refused(dict(trailing).get("grpc-status-details-bin", bare))


class _Queue(queue_pb2_grpc.QueueServiceServicer):
    def __init__(self, fake: FakeScheduler) -> None:
        self._fake = fake

    async def ListQueues(self, request: queue_pb2.ListQueuesRequest, context: Any) -> Any:
        return queue_pb2.ListQueuesResponse(pools=[queue_pb2.PoolQueues(pool="default", commit_seq=7)])

    async def ListRequests(self, request: queue_pb2.ListRequestsRequest, context: Any) -> Any:
        infos = [queue_pb2.RequestInfo(request_id=request_id) for request_id in self._fake.requests]
        return queue_pb2.ListRequestsResponse(requests=infos)

    async def ListWorkers(self, request: queue_pb2.ListWorkersRequest, context: Any) -> Any:
        if request.pool not in ("", "default"):
            await errors.abort(context, errors.NotFound("no such pool", reason=errors.Reason.POOL_UNKNOWN))
        return queue_pb2.ListWorkersResponse(workers=[queue_pb2.WorkerInfo(worker_id="w1")])

    async def Watch(self, request: queue_pb2.WatchRequest, context: Any) -> None:
        moment = 0
        while True:
            moment += 1
            await context.write(queue_pb2.WatchResponse(time_s=moment))
            await asyncio.sleep(TICK_S)


async def _thaw(fake: FakeScheduler) -> None:
    if not fake.thawed.is_set():
        fake.waiting += 1
        await fake.notify()
        await fake.thawed.wait()


def packed(tokens: Tokens) -> bytes:
    from array import array

    return pack(array("I", tokens))


def _response(entries: list[tuple[Stored, int, int]]) -> scheduler_pb2.DeliverResponse:
    response = scheduler_pb2.DeliverResponse()
    tokens: Tokens = []
    for stored, start, end in entries:
        if end > start:
            logprobs = stored.logprobs(start, end)
            if logprobs:
                response.logprobs[len(response.request_ids)].logprobs.extend(logprobs)
            response.request_ids.append(stored.spec.request_id)
            response.offsets.append(start)
            response.counts.append(end - start)
            tokens += stored.planned[start:end]
        if stored.finished:
            response.completions.append(
                scheduler_pb2.Completion(
                    request_id=stored.spec.request_id,
                    output_tokens=len(stored.planned),
                    complete=stored.complete,
                )
            )
    response.token_ids = packed(tokens)
    return response
