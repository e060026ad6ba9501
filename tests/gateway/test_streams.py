"""A request's way through the gateway while nothing breaks."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from gateway_calls import collect, failure, generate_request, read_tokens
from google.protobuf.duration_pb2 import Duration

from gateway.rpc import REQUEST_ID_KEY
from laps.errors import Reason
from laps.v1 import generation_pb2, inference_pb2


async def test_the_transcript_is_the_stored_output(harness: Any, backend: Any) -> None:
    call = harness.inference.Generate(generate_request(request_id="r1"))
    await harness.scheduler.until(lambda: harness.scheduler.follows)
    harness.scheduler.emit("r1", 20)
    result = await read_tokens(call, 1)
    harness.scheduler.emit("r1", 1000)
    result = await collect(call, result=result)
    stored = harness.scheduler.requests["r1"]
    assert result.tokens == stored.planned
    assert result.text == backend.decode(stored.planned, skip_special_tokens=True)
    assert result.complete == stored.complete
    assert result.request_id == "r1"
    assert result.messages > 2
    assert dict(await call.initial_metadata())[REQUEST_ID_KEY] == "r1"
    await harness.scheduler.until(lambda: harness.scheduler.unfollows == [("r1", True)])


async def test_the_text_ends_before_a_stop_string(harness: Any) -> None:
    harness.scheduler.auto_tokens = 1
    request = generate_request("a", max_tokens=400, stop=["e", "th"])
    result = await collect(harness.inference.Generate(request))
    assert result.complete is not None
    assert result.complete.finish_reason == generation_pb2.FINISH_REASON_STOP
    assert result.complete.matched_stop in ("e", "th")
    assert result.text
    assert "e" not in result.text
    assert "th" not in result.text


async def test_messages_are_rendered_and_ids_go_as_they_are(harness: Any, backend: Any) -> None:
    harness.scheduler.auto_tokens = 50
    turns = [generation_pb2.ChatMessage(role="user", content="hi")]
    chat = inference_pb2.GenerateRequest(
        request_id="chat", messages=generation_pb2.ChatMessages(messages=turns)
    )
    await collect(harness.inference.Generate(chat))
    prompt = harness.scheduler.requests["chat"].spec.prompt_token_ids
    expected = backend.encode("<|user|>hi<|assistant|>", add_special_tokens=False).ids
    assert list(memoryview(prompt).cast("I")) == expected
    ids = inference_pb2.GenerateRequest(request_id="ids", token_ids=generation_pb2.TokenIds(ids=[5, 0, 7, 5]))
    await collect(harness.inference.Generate(ids))
    assert list(memoryview(harness.scheduler.requests["ids"].spec.prompt_token_ids).cast("I")) == [5, 0, 7, 5]


async def test_logprobs_stand_beside_their_tokens(harness: Any) -> None:
    harness.scheduler.auto_tokens = 3
    request = generate_request(sampling=generation_pb2.SamplingParams(logprobs=0), max_tokens=300)
    result = await collect(harness.inference.Generate(request))
    assert result.logprobs == [-float(token) for token in result.tokens]


async def test_many_requests_at_once_keep_apart(harness: Any) -> None:
    harness.scheduler.auto_tokens = 2
    calls = [harness.inference.Generate(generate_request(str(i), request_id=f"r{i}")) for i in range(40)]
    for index, result in enumerate(await asyncio.gather(*map(collect, calls))):
        assert result.request_id == f"r{index}"
        assert result.tokens == harness.scheduler.requests[f"r{index}"].planned


async def test_the_same_request_joins(harness: Any) -> None:
    """Also while the first stream is open: both see everything."""
    request = generate_request(request_id="twice")
    first = harness.inference.Generate(request)
    await harness.scheduler.until(lambda: harness.scheduler.follows)
    harness.scheduler.emit("twice", 7)
    begun = await read_tokens(first, 7)
    second = harness.inference.Generate(request)
    assert (await read_tokens(second, 7)).tokens == begun.tokens
    harness.scheduler.emit("twice", 1000)
    await collect(first, result=begun)
    again = await collect(harness.inference.Generate(request))
    assert begun.tokens == again.tokens == harness.scheduler.requests["twice"].planned
    assert begun.text == again.text
    second.cancel()


async def test_a_server_made_id_is_new_each_time(harness: Any) -> None:
    harness.scheduler.auto_tokens = 50
    results = [await collect(harness.inference.Generate(generate_request())) for _ in range(2)]
    assert len({result.request_id for result in results}) == 2
    assert all(len(result.request_id) == 32 for result in results)


async def test_timeout_becomes_a_deadline_for_the_scheduler(harness: Any) -> None:
    request = generate_request(request_id="late", timeout=Duration(seconds=100))
    call = harness.inference.Generate(request, timeout=5000)
    await harness.scheduler.until(lambda: harness.scheduler.follows)
    stored = harness.scheduler.requests["late"]
    harness.scheduler.emit("late", 3)
    harness.scheduler.finish(stored, generation_pb2.FINISH_REASON_DEADLINE)
    result = await collect(call)
    assert result.complete is not None
    assert result.complete.finish_reason == generation_pb2.FINISH_REASON_DEADLINE
    assert result.tokens == stored.planned
    assert len(result.tokens) == 3


async def test_cancel_ends_the_stream_with_complete(harness: Any) -> None:
    call = harness.inference.Generate(generate_request(request_id="stop-me"))
    await harness.scheduler.until(lambda: harness.scheduler.follows)
    harness.scheduler.emit("stop-me", 4)
    await harness.inference.Cancel(inference_pb2.CancelRequest(request_id="stop-me"))
    result = await collect(call)
    assert result.complete is not None
    assert result.complete.finish_reason == generation_pb2.FINISH_REASON_CANCELLED
    assert len(result.tokens) == 4


async def test_get_request_has_the_output_so_far(harness: Any) -> None:
    call = harness.inference.Generate(generate_request(request_id="look", stop=["zzz"]))
    await harness.scheduler.until(lambda: harness.scheduler.follows)
    harness.scheduler.emit("look", 10)
    ask = inference_pb2.GetRequestRequest(request_id="look", include_output=True)
    midway = await harness.inference.GetRequest(ask)
    planned = harness.scheduler.requests["look"].planned
    assert list(midway.output.ids) == planned[:10]
    assert not midway.HasField("complete")
    harness.scheduler.emit("look", 1000)
    result = await collect(call)
    ended = await harness.inference.GetRequest(ask)
    assert ended.text == result.text
    assert ended.text.startswith(midway.text)
    assert ended.complete == result.complete
    ask.include_output = False
    assert not (await harness.inference.GetRequest(ask)).output.ids


async def test_streams_are_bounded_before_anything_is_stored(start_gateway: Any) -> None:
    harness = await start_gateway(max_streams=2)
    calls = [harness.inference.Generate(generate_request(request_id=f"r{i}")) for i in range(2)]
    await harness.scheduler.until(lambda: len(harness.scheduler.follows) == 2)
    error = await failure(harness.inference.Generate(generate_request(request_id="r2")))
    assert error.status == "RESOURCE_EXHAUSTED"
    assert error.reason is Reason.STREAMS_FULL
    assert error.retry_after_s
    assert set(harness.scheduler.requests) == {"r0", "r1"}
    harness.scheduler.auto_tokens = 50
    await asyncio.gather(*map(collect, calls))
    await collect(harness.inference.Generate(generate_request(request_id="r2")))


@pytest.mark.parametrize("stop", [[], ["t", "nd"]])
async def test_resume_at_every_offset_gives_the_tail(harness: Any, tokenizer: Any, stop: list[str]) -> None:
    harness.scheduler.auto_tokens = 2
    whole = await collect(
        harness.inference.Generate(generate_request(request_id="whole", max_tokens=60, stop=stop))
    )
    for offset in range(len(whole.tokens) + 1):
        ask = inference_pb2.ResumeRequest(request_id="whole", offset=offset)
        tail = await collect(harness.inference.Resume(ask), offset)
        decoder = tokenizer.decoder()
        had = "".join(decoder.push(token) for token in whole.tokens[:offset])
        assert tail.tokens == whole.tokens[offset:]
        assert tail.text == (whole.text[len(had) :] if offset < len(whole.tokens) else "")
        assert tail.complete == whole.complete
    for tokens, text in whole.texts_at:
        ask = inference_pb2.ResumeRequest(request_id="whole", offset=tokens)
        assert text + (await collect(harness.inference.Resume(ask), tokens)).text == whole.text


async def test_resume_while_it_runs(harness: Any) -> None:
    call = harness.inference.Generate(generate_request(request_id="run"))
    await harness.scheduler.until(lambda: harness.scheduler.follows)
    harness.scheduler.emit("run", 10)
    had = await read_tokens(call, 8)
    offset, text = had.texts_at[-1]
    call.cancel()
    resumed = harness.inference.Resume(inference_pb2.ResumeRequest(request_id="run", offset=offset))
    await harness.scheduler.until(lambda: len(harness.scheduler.follows) == 2)
    harness.scheduler.auto_tokens = 3
    rest = await collect(resumed, offset)
    whole = await collect(harness.inference.Resume(inference_pb2.ResumeRequest(request_id="run")))
    assert had.tokens + rest.tokens == whole.tokens == harness.scheduler.requests["run"].planned
    assert text + rest.text == whole.text


async def test_resume_beyond_the_output_is_refused(harness: Any) -> None:
    harness.scheduler.auto_tokens = 50
    await collect(harness.inference.Generate(generate_request(request_id="short", max_tokens=5)))
    ask = inference_pb2.ResumeRequest(request_id="short", offset=6)
    error = await failure(harness.inference.Resume(ask))
    assert error.status == "OUT_OF_RANGE"
    assert error.violations[0].field == "offset"
    assert error.metadata["output_tokens"] == "5"
