"""The gateway's way to the scheduler that leads the pool.

One Deliver stream brings the tokens of all followed requests. It ends when the scheduler dies,
freezes or loses the pool; the link then connects again, follows every live request from the
offset that it has, and the clients' streams go on as if nothing had been. Nothing that has a gap
is ever passed on.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc
import grpc.aio

from gateway.deliveries import Feeds, ProtocolError
from gateway.streams import Reader
from gateway.submissions import Submissions
from laps.channels import open_channel
from laps.errors import DeadlineExceeded, LapsError, Reason, Unavailable, from_rpc_error
from laps.history import HistoryPoint
from laps.logs import get_logger
from laps.security.principal import Quota
from laps.security.tls import TlsFiles
from laps.v1 import queue_pb2_grpc, scheduler_pb2, scheduler_pb2_grpc

Response = TypeVar("Response")

HEARTBEAT_INTERVAL_S = 1.0
HEARTBEAT_TIMEOUT_S = 2.0
"""A scheduler that answers nothing for this long is taken for frozen. gRPC's own keepalive does not
notice a process whose event loop stands still."""
ATTEMPT_TIMEOUT_S = 5.0
"""One attempt of a call; a frozen scheduler must not use up the whole time for retries."""
RETRY_S = 10.0
"""Calls are retried this long while the scheduler cannot be reached: longer than a standby takes to lead."""
RETRY_AFTER_S = 1.0
"""What clients are told when the scheduler stays away."""
REMIND_S = 30.0
"""The log says this often that the scheduler is still away."""
BACKOFF_FIRST_S = 0.05
BACKOFF_MAX_S = 1.0
UNREACHABLE = frozenset({"UNAVAILABLE", "ABORTED"})
BROKEN = frozenset({"DEADLINE_EXCEEDED", "CANCELLED"})

SCHEDULER = scheduler_pb2.DESCRIPTOR.services_by_name["SchedulerService"].full_name

log = get_logger()


class Stubs:
    """One connection to the scheduler."""

    def __init__(
        self, address: str, max_message_bytes: int, tls: TlsFiles | None, on_left: Callable[[str], None]
    ) -> None:
        self.channel = open_channel(address, max_message_bytes=max_message_bytes, serving=SCHEDULER, tls=tls)
        self.scheduler = scheduler_pb2_grpc.SchedulerServiceStub(self.channel)
        self.submissions = Submissions(self.scheduler, max_message_bytes, on_left)
        self.queue = queue_pb2_grpc.QueueServiceStub(self.channel)


class SchedulerLink:
    """Keeps the connection and the Deliver stream; `start` it, `close` it."""

    def __init__(
        self,
        address: str,
        gateway_id: str,
        *,
        max_message_bytes: int,
        stream_buffer_tokens: int,
        tls: TlsFiles | None = None,
        on_change: Callable[[bool], None] = lambda connected: None,
        on_pool: Callable[[scheduler_pb2.DescribePoolResponse], None] = lambda pool: None,
        retry_s: float = RETRY_S,
        heartbeat_interval_s: float = HEARTBEAT_INTERVAL_S,
        heartbeat_timeout_s: float = HEARTBEAT_TIMEOUT_S,
    ) -> None:
        self.gateway_id = gateway_id
        self.pool: scheduler_pb2.DescribePoolResponse | None = None
        """What the scheduler said last about its pool."""
        self.seen = HistoryPoint()
        """The furthest that any scheduler has said the pool's history to be stored."""
        self.connected = False
        self._addresses = itertools.cycle(address.split(","))
        self._address = next(self._addresses)
        self._max_message_bytes = max_message_bytes
        self._tls = tls
        self._on_change = on_change
        self._on_pool = on_pool
        self._retry_s = retry_s
        self._heartbeat_interval_s = heartbeat_interval_s
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._feeds = Feeds(stream_buffer_tokens)
        self._stubs = self._new_stubs()
        self._task: asyncio.Task[None] | None = None
        self._told_s = -REMIND_S
        """When the log said last that the scheduler is away."""
        self._closing: set[asyncio.Task[None]] = set()

    async def start(self) -> asyncio.Task[None]:
        self._task = asyncio.create_task(self._keep_connected(), name="scheduler link")
        return self._task

    async def close(self) -> None:
        """Ends the Deliver stream; the scheduler then waits a while for the requests' clients."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._feeds.close()
        for closing in tuple(self._closing):
            closing.cancel()
        await asyncio.gather(*self._closing, return_exceptions=True)
        self._stubs.submissions.retire()
        await self._stubs.channel.close(None)

    @property
    def live_requests(self) -> int:
        return len(self._feeds)

    def attach(self, request_id: str) -> Reader:
        """The output of a request that is stored, from its first token on. To be given back by `detach`."""
        return self._feeds.attach(request_id)

    def detach(self, reader: Reader, *, done: bool, linger_s: float = 0.0) -> None:
        """The client's stream has ended. Not `done`: it is gone, and may be back within `linger_s`."""
        self._feeds.detach(reader, done=done, linger_s=linger_s)

    async def submit(
        self, spec: scheduler_pb2.RequestSpec, quota: Quota | None = None
    ) -> scheduler_pb2.SubmitResponse:
        """Stores a request. Safe to repeat, so it is repeated while the scheduler cannot be reached.
        `quota` is that of the request's tenant. Whoever is cancelled meanwhile leaves no request behind."""
        request = scheduler_pb2.SubmitRequest(spec=spec, gateway_id=self.gateway_id)
        if quota is not None:
            request.quota.CopyFrom(
                scheduler_pb2.TenantQuota(
                    max_queued_requests=quota.max_queued_requests, max_queued_tokens=quota.max_queued_tokens
                )
            )
        return await self._call(lambda stubs: stubs.submissions.submit, request, spec.deadline_s)

    def _nobody_is_there(self, request_id: str) -> None:
        self.detach(self.attach(request_id), done=False)

    async def cancel(self, request_id: str, until_s: float = 0.0) -> scheduler_pb2.CancelRequestResponse:
        request = scheduler_pb2.CancelRequestRequest(request_id=request_id)
        return await self._call(lambda stubs: stubs.scheduler.CancelRequest, request, until_s)

    async def read(
        self, request_id: str, *, include_output: bool, include_prompt: bool = False, until_s: float = 0.0
    ) -> scheduler_pb2.ReadRequestResponse:
        request = scheduler_pb2.ReadRequestRequest(
            request_id=request_id, include_output=include_output, include_prompt=include_prompt
        )
        return await self._call(lambda stubs: stubs.scheduler.ReadRequest, request, until_s)

    async def query(self, method: str, request: Any, until_s: float = 0.0) -> Any:
        """A unary call of QueueService."""
        return await self._call(lambda stubs: getattr(stubs.queue, method), request, until_s)

    def watch(self, request: Any) -> Any:
        """The stream of QueueService.Watch."""
        return self._stubs.queue.Watch(request)

    async def _call(
        self, method: Callable[[Stubs], Callable[..., Awaitable[Response]]], request: Any, until_s: float
    ) -> Response:
        """Raises a LapsError. `until_s`: instant after which the answer is of no use; 0: none."""
        give_up_s = time.monotonic() + self._retry_s
        backoff = Backoff()
        while True:
            left_s = give_up_s - time.monotonic()
            if until_s:
                left_s = min(left_s, until_s - time.time())
            try:
                return await method(self._stubs)(request, timeout=max(min(ATTEMPT_TIMEOUT_S, left_s), 0.01))
            except grpc.aio.AioRpcError as caught:
                error = from_rpc_error(caught)
                # Statuses that no scheduler gave: our own time limit, and what a server that is stopped says.
                broken = error.from_transport and error.status in BROKEN
            except (grpc.aio.UsageError, asyncio.CancelledError):
                if (task := asyncio.current_task()) is not None and task.cancelling():
                    raise
                # The connection was replaced under the call.
                error, broken = Unavailable("the connection was replaced"), True
            if not (broken or error.status in UNREACHABLE):
                raise error
            delay_s = backoff.next_s()
            if until_s and time.time() + delay_s >= until_s:
                raise DeadlineExceeded("the deadline passed before the scheduler could be reached")
            if time.monotonic() + delay_s >= give_up_s:
                raise _unreachable(error)
            await asyncio.sleep(delay_s)

    async def _keep_connected(self) -> None:
        backoff = Backoff()
        while True:
            try:
                await self._session(backoff)
                because = "the stream ended"
            except grpc.aio.AioRpcError as error:
                because = f"{error.code().name}: {from_rpc_error(error).message}"
            except ProtocolError as error:
                because = str(error)
            self._tell(because)
            self._feeds.offline()
            self._replace_stubs()
            self._set_connected(False)
            await asyncio.sleep(backoff.next_s())

    def _tell(self, because: str) -> None:
        now_s = time.monotonic()
        if self.connected:
            log.warning("scheduler lost", address=self._address, because=because, live=len(self._feeds))
        elif now_s - self._told_s >= REMIND_S:
            log.warning("scheduler not reachable", address=self._address, because=because)
        else:
            return
        self._told_s = now_s

    def _new_stubs(self) -> Stubs:
        return Stubs(self._address, self._max_message_bytes, self._tls, self._nobody_is_there)

    def _replace_stubs(self) -> None:
        # A new connection: the old one may hang with a frozen peer. Calls on it come to their own ends. It
        # is also what takes a new certificate into use.
        if not self.connected:
            # It does not lead. Of one that has just been lost it is not known yet.
            self._address = next(self._addresses)
        try:
            fresh = self._new_stubs()
        except OSError as error:
            log.error("certificates not readable, the last ones stay", error=str(error))
            return
        old, self._stubs = self._stubs, fresh
        old.submissions.retire()
        closing = asyncio.create_task(old.channel.close(ATTEMPT_TIMEOUT_S))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def _session(self, backoff: Backoff) -> None:
        """One Deliver stream, from the first sign of life of the scheduler to the last."""
        await self._describe()
        call: Any = self._stubs.scheduler.Deliver(None)
        tasks = [
            asyncio.create_task(self._receive(call), name="deliver: receive"),
            asyncio.create_task(self._send(call), name="deliver: send"),
            asyncio.create_task(self._heartbeat(backoff), name="scheduler heartbeat"),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            call.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _send(self, call: Any) -> None:
        await call.write(scheduler_pb2.DeliverRequest(gateway_id=self.gateway_id))
        self._feeds.follow_all()
        self._set_connected(True)
        while True:
            for message in await self._feeds.outgoing():
                try:
                    await call.write(message)
                except asyncio.InvalidStateError:
                    # The stream is over; the receiving side knows why.
                    await asyncio.Event().wait()

    async def _receive(self, call: Any) -> None:
        while (response := await call.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
            self.seen = max(self.seen, HistoryPoint.from_proto(response.history))
            self._feeds.accept(response)

    async def _heartbeat(self, backoff: Backoff) -> None:
        while True:
            await asyncio.sleep(self._heartbeat_interval_s)
            await self._describe()
            # Only a connection that lasts makes the next attempt an early one again.
            backoff.reset()

    async def _describe(self) -> None:
        request = scheduler_pb2.DescribePoolRequest(seen=self.seen.to_proto())
        self.pool = await self._stubs.scheduler.DescribePool(request, timeout=self._heartbeat_timeout_s)
        self.seen = max(self.seen, HistoryPoint.from_proto(self.pool.history))
        self._on_pool(self.pool)

    def _set_connected(self, connected: bool) -> None:
        if connected != self.connected:
            self.connected = connected
            if connected:
                log.info("scheduler connected", address=self._address, live=len(self._feeds))
            self._on_change(connected)


class Backoff:
    """Growing pauses with jitter, so that many gateways do not come back at the same instant."""

    def __init__(self) -> None:
        self._pause_s = BACKOFF_FIRST_S

    def reset(self) -> None:
        self._pause_s = BACKOFF_FIRST_S

    def next_s(self) -> float:
        pause_s = self._pause_s
        self._pause_s = min(2 * pause_s, BACKOFF_MAX_S)
        return pause_s * random.uniform(0.5, 1.0)


def _unreachable(error: LapsError) -> LapsError:
    if not error.from_transport and error.retry_after_s is not None:
        return error
    return Unavailable(
        f"the pool's scheduler cannot be reached: {error.message}",
        reason=Reason.SCHEDULER_UNREACHABLE,
        retry_after_s=RETRY_AFTER_S,
    )
