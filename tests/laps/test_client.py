from __future__ import annotations

import asyncio
from typing import Any

import pytest

from laps.client import AsyncClient, Client, RetryPolicy
from laps.client.requests import build_request
from laps.errors import InvalidArgument, NotFound, Unavailable


async def test_generate_returns_everything(serve: Any, script: Any) -> None:
    async with serve(script()) as gateway, AsyncClient(gateway.address) as client:
        done = await client.generate("hi", max_tokens=4)
    assert (done.text, done.finish_reason, done.resumptions) == ("one two three four", "stop", 0)
    assert done.usage.prompt_tokens == 3
    assert done.timing.queue_time_ms == 1.5
    assert done.speculation.num_accepted_tokens == 4
    assert done.matched_stop_token_id is None


async def test_the_same_in_a_thread(serve: Any, script: Any) -> None:
    def blocking(address: str) -> tuple[str, int]:
        with Client(address, retry=RetryPolicy(first_backoff_s=0.001)) as client:
            stream = client.stream("hi", request_id="mine")
            text = "".join(chunk.text for chunk in stream)
            assert text == stream.result.text
            return text, stream.result.resumptions

    async with serve(script(breaks=[(1, "silent"), (2, "status")])) as gateway:
        assert await asyncio.to_thread(blocking, gateway.address) == ("one two three four", 2)


async def test_a_stream_that_is_left_cancels_what_nobody_can_resume(serve: Any, script: Any) -> None:
    async with serve(script()) as gateway, AsyncClient(gateway.address) as client:
        async with client.stream("hi") as anonymous:
            await anext(anonymous)
        async with client.stream("hi", request_id="mine") as mine:
            await anext(mine)
        async with client.stream("hi") as finished:
            await finished.finish()
        # No id is chosen by saying so either.
        async with client.stream("hi", request_id=None) as unnamed:  # type: ignore[arg-type]
            await anext(unnamed)

        def blocking() -> str:
            with Client(gateway.address) as plain, plain.stream("hi", request_id="") as stream:
                next(iter(stream))
                return stream.request_id

        left = await asyncio.to_thread(blocking)
        assert gateway.cancelled == [anonymous.request_id, unnamed.request_id, left]


async def test_result_before_the_end_is_a_mistake(serve: Any, script: Any) -> None:
    async with serve(script()) as gateway, AsyncClient(gateway.address) as client:
        stream = client.stream("hi")
        with pytest.raises(RuntimeError, match="has not ended"):
            _ = stream.result
        await stream.aclose()


async def test_lists_follow_their_pages(serve: Any, script: Any) -> None:
    async with serve(script()) as gateway, AsyncClient(gateway.address) as client:
        assert [r.request_id for r in await client.requests("running")] == ["r0", "r1", "r2", "r3", "r4"]
        assert len(await client.requests(limit=3)) == 3
        with pytest.raises(InvalidArgument, match="asleep"):
            await client.requests("asleep")


async def test_questions(serve: Any, script: Any) -> None:
    async with serve(script()) as gateway, AsyncClient(gateway.address) as client:
        assert (await client.models())[0].context_tokens == 512
        (pool,) = await client.queues(head_limit=5)
        assert (pool.policy, pool.levels[0].head[0].state) == ("laps-sd", "running")
        (worker,) = await client.workers()
        assert [slot.request_id for slot in worker.slots] == ["r1", ""]
        assert await client.cancel("r1") == "finished"
        detail = await client.get("r1", include_output=True)
        assert detail.completion is not None
        assert (detail.text, detail.completion.finish_reason) == ("one two three four", "stop")
        with pytest.raises(NotFound):
            await client.get("unknown")


async def test_an_absent_server_is_named() -> None:
    from laps.ports import free_ports

    (port,) = free_ports(1)
    client = AsyncClient(f"127.0.0.1:{port}", retry=RetryPolicy(connect_attempts=2, first_backoff_s=0.001))
    with pytest.raises(Unavailable, match=f"no connection to 127.0.0.1:{port}"):
        await client.generate("hi")
    await client.close()


async def test_an_interrupted_generate_cancels_its_request(serve: Any, script: Any) -> None:
    hanging = asyncio.Event()

    async with serve(script()) as gateway, AsyncClient(gateway.address) as client:
        play = gateway._play

        async def hang(request_id: str, offset: int, context: Any, message: Any) -> Any:
            async for each in play(request_id, offset, context, message):
                yield each
                hanging.set()
                await asyncio.sleep(60)

        gateway._play = hang
        task = asyncio.create_task(client.generate("hi"))
        await hanging.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert gateway.cancelled == [gateway.calls[0][1].request_id]


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"max_tokens": 1 << 40}, "stopping.max_tokens"),
        ({"seed": -1}, "sampling.seed"),
        ({"temperature": "warm"}, "sampling.temperature"),
        ({"stop": [1]}, "stopping.stop"),
        ({"stop_token_ids": [-1]}, "stopping.stop_token_ids"),
        ({"timeout_s": float("inf")}, "timeout"),
    ],
)
def test_what_no_message_can_hold_is_refused_by_name(options: Any, field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        build_request("hi", options)
    assert caught.value.field == field


def test_prompts_of_each_kind() -> None:
    assert build_request("hi", {}).text == "hi"
    assert list(build_request([1, 2], {}).token_ids.ids) == [1, 2]
    assert build_request([], {}).WhichOneof("prompt") == "token_ids"
    chat = build_request([{"role": "user", "content": "hi"}], {})
    assert chat.messages.messages[0].content == "hi"
    with pytest.raises(InvalidArgument, match=r"messages\[0\]\.name"):
        build_request([{"name": "x"}], {})
    with pytest.raises(InvalidArgument, match="token_ids"):
        build_request([-1], {})


def test_zero_is_a_value_and_absent_is_absent() -> None:
    request = build_request("hi", {"temperature": 0.0, "logprobs": 0, "cancel_on_disconnect": False})
    assert request.sampling.HasField("temperature")
    assert request.sampling.HasField("logprobs")
    assert request.HasField("cancel_on_disconnect")
    assert not request.sampling.HasField("top_p")
    assert request.request_id


def test_biases_are_by_token() -> None:
    request = build_request("hi", {"logit_bias": {3: -100, 70_000: 0.5}, "frequency_penalty": 0.25})
    assert dict(request.sampling.logit_bias) == {3: -100.0, 70_000: 0.5}
    assert request.sampling.frequency_penalty == 0.25
    wrong: list[Any] = [{-1: 1.0}, {"3": 1.0}, {3: "x"}, {1 << 32: 1.0}, [3]]
    for biases in wrong:
        with pytest.raises(InvalidArgument, match=r"sampling\.logit_bias: .*cannot be sent"):
            build_request("hi", {"logit_bias": biases})


def test_an_unknown_argument_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="max_token"):
        build_request("hi", {"max_token": 3})  # type: ignore[typeddict-unknown-key]
