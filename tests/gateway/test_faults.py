"""What breaks between gateway and scheduler is not seen by clients, except as time."""

from __future__ import annotations

import asyncio
from typing import Any

from gateway_calls import collect, eventually, failure, generate_request, read_tokens
from google.protobuf.duration_pb2 import Duration
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from laps.errors import Reason
from laps.ports import free_ports
from laps.v1 import scheduler_pb2

MAX_TOKENS = 40


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drops=st.lists(st.integers(0, 12), min_size=1, max_size=4), step=st.integers(1, 9), serial=st.uuids())
async def test_a_stream_that_breaks_anywhere(harness: Any, drops: list[int], step: int, serial: Any) -> None:
    """The Deliver stream ends after so many messages, several times over."""
    scheduler = harness.scheduler
    request_id = serial.hex
    scheduler.auto_tokens = 0
    call = harness.inference.Generate(generate_request(request_id=request_id, stop=["the"]))
    await scheduler.until(lambda: any(followed == request_id for followed, _ in scheduler.follows))
    for messages in drops:
        await scheduler.until(lambda: scheduler.streams)
        for _ in range(messages):
            scheduler.emit(request_id, step)
        for stream in tuple(scheduler.streams):
            stream.outgoing.put_nowait(None)
        await eventually(lambda: not scheduler.streams)
    scheduler.auto_tokens = step
    result = await collect(call)
    stored = scheduler.requests[request_id]
    assert result.tokens == stored.planned
    assert result.complete == stored.complete


async def test_the_scheduler_dies_and_comes_back(harness: Any) -> None:
    scheduler = harness.scheduler
    calls = [harness.inference.Generate(generate_request(str(i), request_id=f"r{i}")) for i in range(5)]
    await scheduler.until(lambda: len(scheduler.follows) == 5)
    begun = []
    for index, call in enumerate(calls):
        scheduler.emit(f"r{index}", 5 + index)
        begun.append(await read_tokens(call, 4 + index))
    await scheduler.kill()
    scheduler.follows.clear()
    await scheduler.start()
    await scheduler.until(lambda: len(scheduler.follows) == 5)
    assert sorted(scheduler.follows) == [(f"r{index}", 5 + index) for index in range(5)]
    scheduler.auto_tokens = 4
    for index, call in enumerate(calls):
        result = await collect(call, result=begun[index])
        assert result.tokens == scheduler.requests[f"r{index}"].planned


async def test_a_frozen_scheduler_is_noticed(start_gateway: Any, scheduler: Any) -> None:
    """The connection stays up and answers pings; nothing else comes."""
    harness = await start_gateway(heartbeat_timeout_s=0.5)
    call = harness.inference.Generate(generate_request(request_id="wait"))
    await scheduler.until(lambda: scheduler.follows)
    scheduler.thawed.clear()
    await eventually(lambda: not harness.gateway.link.connected)
    scheduler.thawed.set()
    scheduler.auto_tokens = 5
    assert (await collect(call)).tokens == scheduler.requests["wait"].planned


async def test_an_acknowledgement_that_is_lost(harness: Any) -> None:
    """Submit is repeated with the same id: one request, not two."""
    scheduler = harness.scheduler
    scheduler.forget_acknowledgements = 2
    scheduler.auto_tokens = 50
    result = await collect(harness.inference.Generate(generate_request()))
    assert scheduler.submits == 3
    assert list(scheduler.requests) == [result.request_id]


async def test_a_request_waits_for_the_scheduler(harness: Any) -> None:
    scheduler = harness.scheduler
    await scheduler.kill()
    call = harness.inference.Generate(generate_request(request_id="early"))
    await eventually(lambda: harness.gateway.inference.streams.count)
    await scheduler.start()
    scheduler.auto_tokens = 50
    assert (await collect(call)).tokens == scheduler.requests["early"].planned


async def test_a_scheduler_that_stops_while_it_is_asked(harness: Any) -> None:
    scheduler = harness.scheduler
    scheduler.thawed.clear()
    call = harness.inference.Generate(generate_request(request_id="asked"))
    await eventually(lambda: harness.gateway.inference.streams.count)
    await scheduler.until(lambda: scheduler.waiting)
    await scheduler.kill()
    scheduler.thawed.set()
    await scheduler.start()
    scheduler.auto_tokens = 50
    assert (await collect(call)).tokens == scheduler.requests["asked"].planned


async def test_clients_that_leave_meanwhile_leave_nothing_with_the_gateway(harness: Any) -> None:
    scheduler = harness.scheduler
    await scheduler.kill()
    tasks = len(asyncio.all_tasks())
    calls = [harness.inference.Generate(generate_request()) for _ in range(50)]
    await eventually(lambda: harness.gateway.inference.streams.count == 50)
    for call in calls:
        call.cancel()
    await eventually(lambda: not harness.gateway.inference.streams.count)
    await eventually(lambda: len(asyncio.all_tasks()) <= tasks + 2)
    await scheduler.start()
    scheduler.auto_tokens = 50
    await collect(harness.inference.Generate(generate_request(request_id="after")))
    assert list(scheduler.requests) == ["after"]


async def test_a_scheduler_that_stays_away(harness: Any) -> None:
    await harness.scheduler.kill()
    harness.gateway.link._retry_s = 0.2
    error = await failure(harness.inference.Generate(generate_request()))
    assert error.status == "UNAVAILABLE"
    assert error.reason is Reason.SCHEDULER_UNREACHABLE
    assert error.retry_after_s
    harness.gateway.link._retry_s = 60.0
    # A time limit that the gateway alone knows of: the call itself has none.
    request = generate_request(timeout=Duration(nanos=100_000_000))
    error = await asyncio.wait_for(failure(harness.inference.Generate(request)), 30)
    assert (error.status, error.reason) == ("DEADLINE_EXCEEDED", Reason.DEADLINE_PASSED)


async def test_repeats_and_gaps_never_reach_a_client(harness: Any) -> None:
    scheduler = harness.scheduler
    sent = 0

    def distort(message: scheduler_pb2.DeliverResponse) -> list[scheduler_pb2.DeliverResponse]:
        nonlocal sent
        sent += 1
        if sent % 5 == 0 and not message.completions:
            return []
        return [message, message] if sent % 3 == 0 else [message]

    scheduler.distort = distort
    call = harness.inference.Generate(generate_request(request_id="torn", max_tokens=60))
    await scheduler.until(lambda: scheduler.follows)
    scheduler.auto_tokens = 2
    result = await collect(call)
    assert result.tokens == scheduler.requests["torn"].planned
    assert len(scheduler.follows) > 1


async def test_tokens_that_are_rewritten_end_the_stream(harness: Any) -> None:
    """What a client has seen can never change; this is an alarm."""
    scheduler = harness.scheduler
    call = harness.inference.Generate(generate_request(request_id="liar"))
    await scheduler.until(lambda: scheduler.follows)
    scheduler.emit("liar", 5)
    await read_tokens(call, 4)
    stored = scheduler.requests["liar"]
    stored.planned[3] += 1
    stored.emitted = 2
    scheduler.emit("liar", 5)
    error = await failure(call)
    assert error.status == "DATA_LOSS"
    assert error.reason is Reason.OUTPUT_INCOMPLETE


async def test_a_request_that_the_scheduler_lost(harness: Any) -> None:
    scheduler = harness.scheduler
    call = harness.inference.Generate(generate_request(request_id="gone"))
    await scheduler.until(lambda: scheduler.follows)
    scheduler.requests.clear()
    for stream in tuple(scheduler.streams):
        stream.outgoing.put_nowait(None)
    error = await failure(call)
    assert error.status == "NOT_FOUND"
    assert error.resource_name == "gone"


async def test_a_delivery_that_contradicts_itself_ends_the_connection(harness: Any) -> None:
    scheduler = harness.scheduler
    call = harness.inference.Generate(generate_request(request_id="odd"))
    await scheduler.until(lambda: scheduler.follows)
    for stream in scheduler.streams:
        stream.outgoing.put_nowait(
            scheduler_pb2.DeliverResponse(request_ids=["odd"], offsets=[0], counts=[2], token_ids=b"1234")
        )
    await scheduler.until(lambda: len(scheduler.follows) == 2)
    scheduler.auto_tokens = 5
    assert (await collect(call)).tokens == scheduler.requests["odd"].planned


async def test_of_several_schedulers_the_one_that_serves_is_found_again_and_again(
    scheduler: Any, start_gateway: Any
) -> None:
    """Leadership moves from one address to another; the others refuse connections."""
    first, second = scheduler.port, free_ports(1, "127.0.0.1", avoid=(scheduler.port,))[0]
    harness = await start_gateway(scheduler_address=f"127.0.0.1:{second},127.0.0.1:{first}")
    call = harness.inference.Generate(generate_request(request_id="moving"))
    await scheduler.until(lambda: "moving" in scheduler.requests)
    for port in (second, first):
        await scheduler.kill()
        scheduler.port = port
        await scheduler.start()
        await scheduler.until(lambda: scheduler.streams)
        scheduler.emit("moving", 3)
    scheduler.auto_tokens = 4
    assert (await collect(call)).tokens == scheduler.requests["moving"].planned
