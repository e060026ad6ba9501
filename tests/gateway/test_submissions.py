"""Submissions over one stream: each gets its own answer, whatever becomes of the stream or of the others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc
import grpc.aio
import pytest

from gateway import submissions
from gateway.submissions import Submissions
from laps import channels, errors
from laps.ports import free_ports
from laps.v1 import scheduler_pb2, scheduler_pb2_grpc
from tests.servers import listening

REFUSAL = errors.ResourceExhausted("full", reason=errors.Reason.QUEUE_FULL, retry_after_s=3.0)
Answer = Callable[[scheduler_pb2.Submission], scheduler_pb2.SubmitAnswer | None]


class Calls(scheduler_pb2_grpc.SchedulerServiceServicer):
    """A scheduler of the version before: it has calls alone."""

    def __init__(self) -> None:
        self.calls = 0

    async def Submit(self, request: scheduler_pb2.SubmitRequest, context: Any) -> Any:
        self.calls += 1
        return scheduler_pb2.SubmitResponse(epoch=7)


class CallsWithDetails(Calls):
    """It says itself what it does not know."""

    async def SubmitMany(self, request_iterator: Any, context: Any) -> None:
        # Nothing is being written any more: the client sees this status and no other.
        await anext(request_iterator)
        await errors.abort(context, errors.Unimplemented("there is no such method"))


class Streams(Calls):
    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self.answer = answer
        self.messages: list[int] = []
        self.ended = asyncio.Event()
        self.read = asyncio.Event()
        self.breaks = False

    async def SubmitMany(self, request_iterator: Any, context: Any) -> None:
        try:
            async for message in request_iterator:
                self.messages.append(len(message.submissions))
                self.read.set()
                if self.breaks:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "connection lost")
                response = scheduler_pb2.SubmitManyResponse()
                # In any order.
                for each in reversed(message.submissions):
                    if (answer := self.answer(each)) is not None:
                        response.answers.append(answer)
                await context.write(response)
        finally:
            self.ended.set()


@asynccontextmanager
async def client_of(service: Calls, **options: Any) -> AsyncIterator[Submissions]:
    server = channels.new_server()
    scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(service, server)
    async with listening(server) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        client = Submissions(scheduler_pb2_grpc.SchedulerServiceStub(channel), **options)
        yield client
        client.retire()


def request(number: int, prompt: bytes = b"\1\0\0\0") -> scheduler_pb2.SubmitRequest:
    return scheduler_pb2.SubmitRequest(
        spec=scheduler_pb2.RequestSpec(request_id=f"r{number}", prompt_token_ids=prompt)
    )


def by_id(each: scheduler_pb2.Submission) -> scheduler_pb2.SubmitAnswer:
    """The epoch tells which request was answered; each third one is refused."""
    number = int(each.request.spec.request_id[1:])
    if number % 3 == 0:
        refused = errors.to_status(REFUSAL).SerializeToString()
        return scheduler_pb2.SubmitAnswer(number=each.number, refused=refused)
    return scheduler_pb2.SubmitAnswer(number=each.number, stored=scheduler_pb2.SubmitResponse(epoch=number))


async def test_each_request_has_its_own_answer_and_those_that_come_together_share_messages() -> None:
    service = Streams(by_id)
    async with client_of(service) as client:
        waiting = [client.submit(request(number), 30.0) for number in range(200)]
        answers = await asyncio.gather(*waiting, return_exceptions=True)
        for number, answer in enumerate(answers):
            if number % 3:
                assert isinstance(answer, scheduler_pb2.SubmitResponse)
                assert answer.epoch == number
            else:
                assert isinstance(answer, grpc.aio.AioRpcError)
                error = errors.from_rpc_error(answer)
                assert (error.status, error.reason) == ("RESOURCE_EXHAUSTED", errors.Reason.QUEUE_FULL)
                assert error.retry_after_s == 3.0
                assert not error.from_transport
    assert service.messages == [100, 100]
    assert service.calls == 0


async def test_long_prompts_do_not_share_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submissions, "MESSAGE_BYTES", 10_000)
    service = Streams(by_id)
    async with client_of(service) as client:
        sizes = {1: 4_000, 2: 4_000, 4: 20_000, 5: 4_000, 7: 4_000}
        requests = [request(number, bytes(size)) for number, size in sizes.items()]
        await asyncio.gather(*(client.submit(each, 30.0) for each in requests))
    # Not even one that is longer than a message of many.
    assert service.messages == [2, 1, 2]


async def test_a_scheduler_that_says_itself_that_it_has_no_stream_gets_calls() -> None:
    service = CallsWithDetails()
    async with client_of(service) as client:
        assert (await client.submit(request(1), 30.0)).epoch == 7
    assert service.calls == 1


async def test_a_scheduler_of_the_version_before_gets_calls() -> None:
    service = Calls()
    async with client_of(service) as client:
        answers = await asyncio.gather(*(client.submit(request(number), 30.0) for number in range(500)))
        assert [answer.epoch for answer in answers] == [7] * 500
        assert (await client.submit(request(500))).epoch == 7
    assert service.calls == 501


async def test_what_was_under_way_when_the_stream_broke_can_be_submitted_again() -> None:
    service = Streams(by_id)
    async with client_of(service) as client:
        assert (await client.submit(request(1))).epoch == 1
        service.breaks = True
        broken = await asyncio.gather(
            *(client.submit(request(number)) for number in range(1, 200)), return_exceptions=True
        )
        for each in broken:
            assert isinstance(each, grpc.aio.AioRpcError)
            error = errors.from_rpc_error(each)
            assert (error.status, error.from_transport) == ("UNAVAILABLE", True)
        service.breaks = False
        assert (await client.submit(request(1))).epoch == 1
    assert service.calls == 0


async def test_who_is_not_there_yet_gets_a_stream_when_he_comes() -> None:
    (port,) = free_ports(1)
    service = Streams(by_id)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        client = Submissions(scheduler_pb2_grpc.SchedulerServiceStub(channel))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.submit(request(1))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        server = channels.new_server()
        scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(service, server)
        async with listening(server, port=port), asyncio.timeout(60):
            while True:
                with suppress(grpc.aio.AioRpcError):
                    assert (await client.submit(request(1))).epoch == 1
                    break
            assert service.calls == 0
            client.retire()


async def test_no_answer_in_time_is_told_as_of_a_call_and_others_go_on() -> None:
    def first_never(each: scheduler_pb2.Submission) -> scheduler_pb2.SubmitAnswer | None:
        return None if each.request.spec.request_id == "r1" else by_id(each)

    service = Streams(first_never)
    async with client_of(service) as client:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.submit(request(1), 0.05)
        error = errors.from_rpc_error(caught.value)
        assert (error.status, error.from_transport) == ("DEADLINE_EXCEEDED", True)
        assert (await client.submit(request(2), 30.0)).epoch == 2


async def test_retired_it_ends_its_stream_with_the_last_answer() -> None:
    answered: dict[int, bool] = {}

    def when_allowed(each: scheduler_pb2.Submission) -> scheduler_pb2.SubmitAnswer | None:
        answered[each.number] = True
        return by_id(each)

    service = Streams(when_allowed)
    async with client_of(service) as client:
        last = asyncio.ensure_future(client.submit(request(1)))
        await asyncio.sleep(0)
        client.retire()
        assert (await last).epoch == 1
        await asyncio.wait_for(service.ended.wait(), 60)


class Slow(Streams):
    """Reads, and answers when it is told to."""

    def __init__(self) -> None:
        super().__init__(by_id)
        self.go_on = asyncio.Event()

    async def SubmitMany(self, request_iterator: Any, context: Any) -> None:
        async for message in request_iterator:
            self.messages.append(len(message.submissions))
            self.read.set()
            await self.go_on.wait()
            answers = [self.answer(each) for each in message.submissions]
            await context.write(scheduler_pb2.SubmitManyResponse(answers=filter(None, answers)))


async def test_who_leaves_leaves_nothing_behind() -> None:
    service, left = Slow(), list[str]()
    async with client_of(service, on_left=left.append) as client:
        sent = [asyncio.create_task(client.submit(request(number), 30.0)) for number in (1, 2, 3)]
        await service.read.wait()
        # The third is refused in the end.
        for each in sent:
            each.cancel()
        await asyncio.gather(*sent, return_exceptions=True)
        assert all(each.cancelled() for each in sent)
        # By hand, so that nothing is written before it leaves.
        unsent = client.submit(request(4))
        unsent.send(None)
        with pytest.raises(asyncio.CancelledError):
            unsent.throw(asyncio.CancelledError())
        assert not client._unsent
        service.go_on.set()
        assert (await client.submit(request(5), 30.0)).epoch == 5
    assert left == ["r1", "r2"]
    assert sum(service.messages) == 4


async def test_what_no_message_can_hold_is_refused_at_once() -> None:
    service = Streams(by_id)
    async with client_of(service, max_message_bytes=100_000) as client:
        with pytest.raises(errors.ResourceExhausted, match="more than") as caught:
            await client.submit(request(1, bytes(100_000)), 30.0)
        assert caught.value.reason is errors.Reason.MESSAGE_TOO_LARGE
        assert (await client.submit(request(2, bytes(99_000)), 30.0)).epoch == 2
