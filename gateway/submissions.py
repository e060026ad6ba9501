"""Submissions to the scheduler: over one stream, those that come together in one message.

As calls of their own they would wait for each other where many come to a busy scheduler: gRPC's asyncio
server accepts one every few turns of its event loop (docs/performance.md).
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio

from laps.channels import DEFAULT_MAX_MESSAGE_BYTES
from laps.errors import Reason, ResourceExhausted, from_rpc_error, rpc_error_of
from laps.v1 import scheduler_pb2, scheduler_pb2_grpc

MESSAGE_BYTES = 1 << 20
"""At most in a message of many. One request may be larger."""
MESSAGE_REQUESTS = 100
_FRAME_BYTES = 64
"""More than a message has beyond its one request."""


class _ByCalls(Exception):
    """The scheduler has no such stream."""


class Submissions:
    """Of one connection. The stream is opened when the first request comes; when it breaks, what is under way
    ends as calls would that were broken, and the next request opens another. Where the scheduler is of the
    version before, which has no such stream, each request is a call."""

    def __init__(
        self,
        scheduler: scheduler_pb2_grpc.SchedulerServiceAsyncStub,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        on_left: Callable[[str], None] = lambda request_id: None,
    ) -> None:
        """`on_left` gets the id of a request that was stored when whoever asked for it was gone."""
        self._scheduler: Any = scheduler
        self._most_bytes = max_message_bytes - _FRAME_BYTES
        self._on_left = on_left
        self._left: dict[int, str] = {}
        """What is under way for nobody, by number: its request's id."""
        self._numbers = itertools.count(1)
        self._unsent: dict[int, scheduler_pb2.SubmitRequest] = {}
        self._answers: dict[int, asyncio.Future[scheduler_pb2.SubmitResponse]] = {}
        self._wake = asyncio.Event()
        self._stream: asyncio.Task[None] | None = None
        self._has_answered = False
        self._by_calls = False
        self._is_retired = False

    async def submit(
        self, request: scheduler_pb2.SubmitRequest, timeout: float | None = None
    ) -> scheduler_pb2.SubmitResponse:
        """As the call `Submit`. Who is cancelled meanwhile leaves nothing behind: what was not sent is
        dropped, and what turns out to be stored is told to `on_left`.

        Raises:
            AioRpcError
            ResourceExhausted: the request is larger than a message may be.
        """
        size_bytes = request.ByteSize()
        if size_bytes > self._most_bytes:
            message = f"the request takes {size_bytes} bytes with its tokens, more than {self._most_bytes}"
            raise ResourceExhausted(message, reason=Reason.MESSAGE_TOO_LARGE)
        if not self._by_calls:
            try:
                return await self._submit(request, timeout)
            except _ByCalls:
                pass
        stored: scheduler_pb2.SubmitResponse = await self._scheduler.Submit(request, timeout=timeout)
        return stored

    def retire(self) -> None:
        """No more requests come. The stream ends when the last one is answered."""
        self._is_retired = True
        self._end_if_done()

    async def _submit(
        self, request: scheduler_pb2.SubmitRequest, timeout: float | None
    ) -> scheduler_pb2.SubmitResponse:
        number = next(self._numbers)
        answer: asyncio.Future[scheduler_pb2.SubmitResponse] = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        self._unsent[number] = request
        self._wake.set()
        if self._stream is None:
            self._stream = asyncio.create_task(self._run(), name="submissions")
        try:
            async with asyncio.timeout(timeout):
                return await answer
        except TimeoutError:
            raise _error(grpc.StatusCode.DEADLINE_EXCEEDED, "no answer in time") from None
        except asyncio.CancelledError:
            if answer.done() and not answer.cancelled():
                if answer.exception() is None:
                    self._on_left(request.spec.request_id)
            elif number not in self._unsent and self._stream is not None:
                self._left[number] = request.spec.request_id
            raise
        finally:
            self._answers.pop(number, None)
            self._unsent.pop(number, None)
            self._end_if_done()

    def _end_if_done(self) -> None:
        if self._is_retired and not (self._answers or self._left) and self._stream is not None:
            self._stream.cancel()

    async def _run(self) -> None:
        call = self._scheduler.SubmitMany()
        writing = asyncio.create_task(self._write(call), name="submissions: write")
        error: Exception = _error(grpc.StatusCode.UNAVAILABLE, "the stream ended")
        try:
            while (message := await call.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
                self._has_answered = True
                for answer in message.answers:
                    self._take(answer)
        except grpc.aio.AioRpcError as caught:
            # A status of the transport may be any, INTERNAL if a message was being written.
            from_transport = from_rpc_error(caught).from_transport
            # The scheduler itself may say that it does not know the stream, or gRPC for it.
            unknown = caught.code() is grpc.StatusCode.UNIMPLEMENTED
            unknown |= from_transport and caught.code() is grpc.StatusCode.INTERNAL
            self._by_calls = unknown and not self._has_answered
            error = _error(grpc.StatusCode.UNAVAILABLE, caught.details() or "") if from_transport else caught
        except (grpc.aio.UsageError, asyncio.CancelledError):
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise
            error = _error(grpc.StatusCode.UNAVAILABLE, "the connection was replaced")
        finally:
            self._stream = None
            writing.cancel()
            call.cancel()
            self._unsent.clear()
            # Where one of them was stored all the same, the scheduler hears of nobody who follows it.
            self._left.clear()
            for waiting in self._answers.values():
                if not waiting.done():
                    waiting.set_exception(_ByCalls() if self._by_calls else error)

    async def _write(self, call: Any) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._unsent:
                try:
                    await call.write(self._next_message())
                except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError):
                    return  # The stream is over; the reading side knows why.

    def _next_message(self) -> scheduler_pb2.SubmitManyRequest:
        """Takes what has come first of what is unsent."""
        message, size_bytes = scheduler_pb2.SubmitManyRequest(), 0
        for number, request in itertools.islice(self._unsent.items(), MESSAGE_REQUESTS):
            size_bytes += request.ByteSize()
            if message.submissions and size_bytes > min(MESSAGE_BYTES, self._most_bytes // 2):
                break
            message.submissions.add(number=number, request=request)
        for submission in message.submissions:
            del self._unsent[submission.number]
        return message

    def _take(self, answer: scheduler_pb2.SubmitAnswer) -> None:
        left = self._left.pop(answer.number, None)
        if left is not None:
            if answer.HasField("stored"):
                self._on_left(left)
            self._end_if_done()
            return
        waiting = self._answers.get(answer.number)
        if waiting is None or waiting.done():
            return
        if answer.HasField("stored"):
            waiting.set_result(answer.stored)
        else:
            waiting.set_exception(rpc_error_of(answer.refused))


def _error(code: grpc.StatusCode, details: str) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details, None)
