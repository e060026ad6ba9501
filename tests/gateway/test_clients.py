"""Clients that leave, and clients that do not read."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc.aio
import pytest
from fake_scheduler import packed
from gateway_calls import collect, eventually, generate_request, read_tokens, read_until_error
from google.protobuf.message import Message

from gateway.calls import Call
from gateway.streams import Feed, Reader
from laps.errors import Cancelled, Reason, ResourceExhausted
from laps.v1 import generation_pb2, inference_pb2, inference_pb2_grpc

SMALL_WINDOW = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16_384)]
"""Of a client that takes in little which its program does not read."""


@pytest.mark.parametrize(
    ("fields", "cancels", "grace_s"),
    [
        ({}, True, 0.0),
        ({"request_id": "mine"}, True, 9.0),
        ({"cancel_on_disconnect": True, "request_id": "mine"}, True, 0.0),
        ({"cancel_on_disconnect": False, "request_id": "mine"}, False, 9.0),
        ({"cancel_on_disconnect": False}, False, 9.0),
    ],
)
async def test_a_client_leaves(
    start_gateway: Any, fields: dict[str, Any], cancels: bool, grace_s: float
) -> None:
    harness = await start_gateway(disconnect_grace_s=9.0)
    scheduler = harness.scheduler
    call = harness.inference.Generate(generate_request(**fields))
    await scheduler.until(lambda: scheduler.follows)
    call.cancel()
    await scheduler.until(lambda: scheduler.unfollows)
    ((request_id, stored),) = scheduler.requests.items()
    assert scheduler.unfollows == [(request_id, False)]
    assert (stored.spec.cancel_on_disconnect, stored.spec.disconnect_grace_s) == (cancels, grace_s)
    if cancels and not grace_s:
        await eventually(lambda: stored.finished)
    else:
        assert not stored.finished
        scheduler.auto_tokens = 50
        ask = inference_pb2.ResumeRequest(request_id=request_id)
        assert (await collect(harness.inference.Resume(ask))).tokens == stored.planned


async def test_a_client_leaves_before_its_request_is_stored(harness: Any) -> None:
    scheduler = harness.scheduler
    scheduler.thawed.clear()
    call = harness.inference.Generate(generate_request())
    await eventually(lambda: scheduler.submissions_read)
    call.cancel()
    await eventually(lambda: not harness.gateway.inference.streams.count)
    scheduler.thawed.set()
    await scheduler.until(lambda: scheduler.unfollows)
    (stored,) = scheduler.requests.values()
    assert stored.disconnects == 1


class Gone(Call):
    """Of a client that leaves just as its request is stored."""

    def __init__(self, how: BaseException) -> None:
        super().__init__("Generate")
        self._how = how

    async def accepted(self, request_id: str, before: Sequence[int]) -> None:
        raise self._how

    async def write(self, message: Message) -> None:
        raise AssertionError("there is nobody")

    def time_left_s(self) -> float | None:
        return None


@pytest.mark.parametrize("how", [Cancelled("the connection is closed"), asyncio.CancelledError()])
async def test_a_client_leaves_as_its_request_is_stored(harness: Any, how: BaseException) -> None:
    scheduler = harness.scheduler
    with pytest.raises(type(how)):
        await harness.gateway.inference.generate(generate_request(), Gone(how))
    ((request_id, stored),) = scheduler.requests.items()
    async with asyncio.timeout(10):
        await scheduler.until(lambda: scheduler.unfollows)
    assert scheduler.unfollows == [(request_id, False)]
    await eventually(lambda: stored.finished)
    assert harness.gateway.link.live_requests == 0


async def test_one_of_two_streams_leaves(harness: Any) -> None:
    scheduler = harness.scheduler
    request = generate_request(request_id="both")
    leaving, staying = harness.inference.Generate(request), harness.inference.Generate(request)
    await scheduler.until(lambda: scheduler.follows)
    scheduler.emit("both", 5)
    await asyncio.gather(read_tokens(leaving, 4), begun := asyncio.ensure_future(read_tokens(staying, 4)))
    leaving.cancel()
    scheduler.emit("both", 1000)
    result = await collect(staying, result=begun.result())
    assert result.tokens == scheduler.requests["both"].planned
    await scheduler.until(lambda: scheduler.unfollows == [("both", True)])


async def test_a_call_deadline_that_passes_is_a_disconnect(harness: Any) -> None:
    scheduler = harness.scheduler
    call = harness.inference.Generate(generate_request(request_id="mine"), timeout=2.0)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(call)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert scheduler.requests["mine"].spec.deadline_s > 0
    await scheduler.until(lambda: scheduler.unfollows == [("mine", False)])


@pytest.mark.parametrize("request_id", ["slow", ""])
async def test_a_slow_reader_costs_only_its_own_stream(start_gateway: Any, request_id: str) -> None:
    harness = await start_gateway(stream_buffer_tokens=500, default_max_tokens=30_000)
    scheduler = harness.scheduler
    async with grpc.aio.insecure_channel(harness.address, options=SMALL_WINDOW) as channel:
        stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        slow = stub.Generate(generate_request("slow", request_id=request_id))
        quick = harness.inference.Generate(generate_request("quick", request_id="quick"))
        await scheduler.until(lambda: len(scheduler.follows) == 2)
        scheduler.auto_tokens = 40
        # The other stream gets everything, and in time.
        assert (await collect(quick)).tokens == scheduler.requests["quick"].planned
        (stored,) = [each for each in scheduler.requests.values() if each.spec.request_id != "quick"]
        await eventually(lambda: stored.finished)
        had, error = await read_until_error(slow)
    assert error.status == "RESOURCE_EXHAUSTED"
    assert error.reason is Reason.CLIENT_TOO_SLOW
    assert len(had) < 400
    assert stored.complete.finish_reason == generation_pb2.FINISH_REASON_LENGTH
    offset = had[-1].offset + len(had[-1].chunk.token_ids)
    ask = inference_pb2.ResumeRequest(request_id=had[0].request_id, offset=offset)
    rest = await collect(harness.inference.Resume(ask), offset)
    tokens = [token for message in had for token in message.chunk.token_ids] + rest.tokens
    assert tokens == stored.planned
    whole = await collect(harness.inference.Resume(inference_pb2.ResumeRequest(request_id=had[0].request_id)))
    assert "".join(message.chunk.text for message in had) + rest.text == whole.text


async def test_what_came_meanwhile_comes_in_one_message() -> None:
    feed = Feed("r")
    reader = Reader(feed, buffer_tokens=100)
    for offset in range(0, 90, 3):
        feed.extend(offset, packed([offset, offset + 1, offset + 2]))
    assert list((await reader.take()).tokens) == list(range(90))
    feed.complete(generation_pb2.Complete(matched_stop="x"), 90)
    tokens, completion = await reader.take()
    assert not tokens
    assert completion is not None


async def test_the_bound_counts_what_waits_for_this_client() -> None:
    feed = Feed("r")

    async def attach() -> Reader:
        return Reader(feed, buffer_tokens=10)

    # In tasks of their own, because a lost stream's task is cancelled.
    quick, slow = [await asyncio.create_task(attach()) for _ in range(2)]
    for offset in range(12):
        feed.extend(offset, packed([offset]))
        await quick.take()
    assert quick.lost is None
    assert slow.lost is not None
    assert slow.lag_tokens == 12
    with pytest.raises(ResourceExhausted):
        await slow.take()


async def test_a_long_backlog_is_no_lag(start_gateway: Any) -> None:
    """Whoever joins late is not slow, however much there is to catch up on."""
    harness = await start_gateway(stream_buffer_tokens=100, default_max_tokens=20_000)
    scheduler = harness.scheduler
    call = harness.inference.Generate(generate_request(request_id="long"))
    await scheduler.until(lambda: scheduler.follows)
    scheduler.emit("long", 10_000)
    begun = await read_tokens(call, 10_000 - 1)
    late = harness.inference.Resume(inference_pb2.ResumeRequest(request_id="long"))
    joined = await read_tokens(late, 10_000 - 1)
    # One commit with more than the bound, as after an outage, is no lag either.
    scheduler.emit("long", 10_000)
    both = await asyncio.gather(collect(call, result=begun), collect(late, result=joined))
    assert [result.tokens for result in both] == [scheduler.requests["long"].planned] * 2
