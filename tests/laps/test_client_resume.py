"""A stream that breaks anywhere, any number of times, gives the same transcript as one that does not."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from laps.client.results import Chunk
from laps.client.retry import Backoff, RetryPolicy
from laps.client.transcript import Transcript
from laps.errors import DataLoss, NotFound, Reason, ResourceExhausted, Unavailable
from laps.v1 import generation_pb2
from laps.v1 import inference_pb2 as pb

FAST = RetryPolicy(connect_attempts=20, resume_attempts=20, first_backoff_s=0.001, max_backoff_s=0.002)


async def read(gateway: Any) -> tuple[list[Chunk], Any]:
    from laps.client import AsyncClient

    async with AsyncClient(gateway.address, retry=FAST) as client:
        stream = client.stream("prompt", request_id="mine")
        chunks = [chunk async for chunk in stream]
        return chunks, stream.result


breaks = st.lists(st.tuples(st.integers(0, 6), st.sampled_from(["status", "silent", "slow"])), max_size=6)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pieces=st.lists(st.text("abc é漢", max_size=5), max_size=12),
    chunk_tokens=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    breaks=breaks,
    flush_alone=st.booleans(),
)
async def test_broken_streams_give_the_whole_output_once(
    pieces: list[str], chunk_tokens: list[int], breaks: Any, flush_alone: bool, serve: Any, script: Any
) -> None:
    played = script(pieces=pieces, chunk_tokens=chunk_tokens, breaks=breaks, flush_alone=flush_alone)
    async with serve(played) as gateway:
        chunks, result = await read(gateway)
    assert "".join(chunk.text for chunk in chunks) == result.text == "".join(pieces)
    assert (
        [i for chunk in chunks for i in chunk.token_ids] == list(result.token_ids) == list(range(len(pieces)))
    )
    at = 0
    for chunk in chunks:
        assert chunk.offset == at
        at += len(chunk.token_ids)
    assert result.finish_reason == "stop"
    assert result.resumptions == len(gateway.calls) - 1


async def test_a_lost_stream_is_taken_up_at_its_last_chunk(serve: Any, script: Any) -> None:
    async with serve(script(breaks=[(3, "status")])) as gateway:
        await read(gateway)
    assert [name for name, _ in gateway.calls] == ["Generate", "Resume"]
    assert gateway.calls[1][1] == pb.ResumeRequest(request_id="mine", offset=2)


async def test_generate_is_sent_again_with_the_same_body_while_nothing_came(serve: Any, script: Any) -> None:
    async with serve(script(breaks=[(0, "silent"), (0, "status")])) as gateway:
        await read(gateway)
    assert [name for name, _ in gateway.calls] == ["Generate"] * 3
    assert gateway.calls[0][1] == gateway.calls[2][1]


async def test_attempts_are_bounded(serve: Any, script: Any) -> None:
    async with serve(script(breaks=[(0, "silent")] * 50)) as gateway:
        with pytest.raises(Unavailable) as caught:
            await read(gateway)
    assert caught.value.reason is Reason.STREAM_LOST
    assert len(gateway.calls) == FAST.connect_attempts


async def test_a_resumed_request_that_is_gone_is_an_error(serve: Any, script: Any) -> None:
    from laps.client import AsyncClient

    async with serve(script(error=NotFound("gone"))) as gateway, AsyncClient(gateway.address) as client:
        with pytest.raises(NotFound):
            await client.resume("r1", 5).finish()
    assert gateway.calls == [("Resume", pb.ResumeRequest(request_id="r1", offset=5))]


def chunk(offset: int, ids: list[int], text: str = "") -> pb.GenerateResponse:
    body = generation_pb2.Chunk(token_ids=ids, text=text)
    return pb.GenerateResponse(request_id="r", offset=offset, chunk=body)


def begun() -> Transcript:
    transcript = Transcript(pb.GenerateRequest(request_id="r"))
    transcript.next_call()
    transcript.accept(chunk(0, [1, 2], "ab"))
    return transcript


@pytest.mark.parametrize(
    "wrong",
    [chunk(3, [4]), chunk(0, [1, 9], "ab"), chunk(0, [1, 2], "ax")],
    ids=["a gap", "other tokens", "other text"],
)
def test_a_contradiction_is_an_alarm(wrong: pb.GenerateResponse) -> None:
    transcript = begun()
    transcript.next_call()
    with pytest.raises(DataLoss):
        transcript.accept(wrong)


def test_an_end_before_all_tokens_came_is_an_alarm() -> None:
    complete = generation_pb2.Complete(finish_reason=generation_pb2.FINISH_REASON_STOP)
    with pytest.raises(DataLoss):
        begun().accept(pb.GenerateResponse(request_id="r", offset=5, complete=complete))


def test_the_servers_patience_is_respected_and_bounded() -> None:
    backoff = Backoff(RetryPolicy(), random.Random(0))
    assert backoff.after(Unavailable("", retry_after_s=3.0), begun=True) == 3.0
    with pytest.raises(Unavailable):
        backoff.after(Unavailable("", retry_after_s=300.0), begun=True)


def test_what_the_server_refuses_is_not_tried_again() -> None:
    with pytest.raises(ResourceExhausted):
        Backoff(RetryPolicy()).after(ResourceExhausted("full", retry_after_s=1), begun=False)


def test_backoff_grows_and_is_jittered() -> None:
    policy = RetryPolicy(resume_attempts=100)
    backoff = Backoff(policy, random.Random(0))
    waits = [backoff.after(Unavailable(""), begun=True) for _ in range(20)]
    assert waits[0] <= policy.first_backoff_s
    assert policy.max_backoff_s / 2 <= min(waits[-5:]) <= max(waits) <= policy.max_backoff_s
    assert len(set(waits)) == len(waits)
