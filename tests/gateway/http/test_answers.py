"""OpenAI's own client gets what the scheduler has stored."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fake_scheduler import Stored
from gateway_calls import collect, generate_request

from laps.v1 import generation_pb2

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
TEXT: dict[str, Any] = {"model": "tiny", "prompt": "the end"}


@pytest.fixture
def text_of(backend: Any) -> Any:
    def text_of(stored: Stored) -> str:
        return str(backend.decode(stored.planned, skip_special_tokens=True))

    return text_of


async def test_chat(http: Any, text_of: Any, backend: Any) -> None:
    answer = await http.client.chat.completions.create(**CHAT)
    stored = http.stored()
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", text_of(stored))
    assert (choice.finish_reason, choice.index, choice.logprobs) == ("length", 0, None)
    assert (answer.object, answer.model) == ("chat.completion", "tiny")
    assert answer.id == f"chatcmpl-{stored.spec.request_id}"
    assert answer._request_id == stored.spec.request_id
    usage = answer.usage
    assert usage.completion_tokens == 40
    assert usage.total_tokens == usage.prompt_tokens + 40
    prompt = backend.encode("<|user|>hi<|assistant|>", add_special_tokens=False).ids
    assert list(memoryview(stored.spec.prompt_token_ids).cast("I")) == prompt
    assert usage.prompt_tokens == len(prompt)
    assert answer.laps["finish_reason"] == "length"
    assert {"timing", "speculation"} <= set(answer.laps)


async def test_completion(http: Any, text_of: Any) -> None:
    answer = await http.client.completions.create(**TEXT, max_tokens=30)
    stored = http.stored()
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == (text_of(stored), "length")
    assert answer.object == "text_completion"
    assert answer.id == f"cmpl-{stored.spec.request_id}"
    assert answer.usage.completion_tokens == 30


async def test_chat_stream(http: Any, text_of: Any) -> None:
    http.scheduler.auto_tokens = 0
    stream = await http.client.chat.completions.create(
        **CHAT, stream=True, stream_options={"include_usage": True}
    )
    await http.scheduler.until(lambda: http.scheduler.follows)
    chunks = [await anext(stream)]
    while not http.stored().finished:
        http.scheduler.emit(http.stored().spec.request_id, 10)
        chunks.append(await anext(stream))
    first, *middle, last, usage = [*chunks, *[chunk async for chunk in stream]]
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert len(middle) > 2
    assert "".join(chunk.choices[0].delta.content for chunk in middle) == text_of(http.stored())
    assert all(chunk.choices[0].finish_reason is None and chunk.usage is None for chunk in middle)
    assert last.choices[0].finish_reason == "length"
    assert last.laps["finish_reason"] == "length"
    assert usage.choices == []
    assert usage.usage.completion_tokens == 40
    assert {chunk.id for chunk in (first, *middle, last, usage)} == {
        f"chatcmpl-{http.stored().spec.request_id}"
    }


async def test_completion_stream(http: Any, text_of: Any) -> None:
    stream = await http.client.completions.create(**TEXT, stream=True)
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == text_of(http.stored())
    assert [chunk.choices[0].finish_reason for chunk in chunks][-2:] == [None, "length"]
    assert all(chunk.usage is None for chunk in chunks)


@pytest.mark.parametrize("stop", ["e", ["e", "th"]])
@pytest.mark.parametrize("stream", [False, True])
async def test_stop(http: Any, stop: Any, stream: bool) -> None:
    given = {**TEXT, "prompt": "a", "max_tokens": 400, "stop": stop, "stream": stream}
    answer = await http.client.completions.create(**given)
    chunks = [chunk async for chunk in answer] if stream else [answer]
    text = "".join(chunk.choices[0].text for chunk in chunks)
    assert text
    assert "e" not in text
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[-1].laps["matched_stop"] in stop


async def test_parameters_reach_the_scheduler(http: Any) -> None:
    await http.client.chat.completions.create(
        **CHAT,
        max_completion_tokens=9,
        temperature=0.5,
        top_p=0.75,
        seed=-1,
        stop=["zzz"],
        frequency_penalty=0.25,
        presence_penalty=-2,
        logit_bias={"3": -100, "5": 1.5},
        user="someone",
        n=1,
        extra_body={
            "top_k": 5, "min_p": 0.25, "repetition_penalty": 1.5, "min_tokens": 2, "ignore_eos": True,
            "stop_token_ids": [3],
            "laps": {"priority": 7, "request_class": "c", "predicted_output_tokens": 5, "timeout_s": 60},
        },
    )  # fmt: skip
    spec = http.stored().spec
    assert spec.sampling == generation_pb2.SamplingParams(
        temperature=0.5, top_p=0.75, top_k=5, min_p=0.25, repetition_penalty=1.5,
        frequency_penalty=0.25, presence_penalty=-2.0, logit_bias={3: -100.0, 5: 1.5},
        seed=(1 << 64) - 1,
    )  # fmt: skip
    assert spec.stopping == generation_pb2.StoppingParams(
        max_tokens=9, min_tokens=2, stop=["zzz"], stop_token_ids=[3], ignore_eos=True
    )
    assert (spec.priority, spec.request_class, spec.predicted_output_tokens) == (7, "c", 5)
    assert spec.deadline_s
    assert spec.cancel_on_disconnect


async def test_defaults_are_openais(http: Any) -> None:
    await http.client.completions.create(model="tiny", prompt=[5, 0, 7, 5])
    spec = http.stored().spec
    assert (spec.sampling.temperature, spec.sampling.top_p) == (1.0, 1.0)
    assert not spec.sampling.HasField("seed")
    assert spec.stopping.max_tokens == 40
    assert list(memoryview(spec.prompt_token_ids).cast("I")) == [5, 0, 7, 5]


async def test_roles_and_parts(http: Any, backend: Any) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": parts}, {"role": "user", "content": "c", "name": "Ann"}]
    await http.client.chat.completions.create(model="tiny", messages=messages)
    prompt = list(memoryview(http.stored().spec.prompt_token_ids).cast("I"))
    assert prompt == backend.encode("<|system|>ab<|user|>c<|assistant|>", add_special_tokens=False).ids


async def test_one_id_is_one_request(http: Any) -> None:
    """An `x-request-id` is the request's own, for gRPC as well; the same body joins it, another does not."""
    header = {"x-request-id": "mine-1"}
    first = await http.client.completions.create(**TEXT, extra_headers=header)
    again = await http.client.completions.create(**TEXT, extra_headers=header)
    assert first.choices[0].text == again.choices[0].text
    assert set(http.scheduler.requests) == {"mine-1"}
    other = await http.post("/v1/completions", TEXT | {"prompt": "other"}, x_request_id="mine-1")
    assert (other.status, other.error["code"]) == (409, "request_id_reused")
    assert other.headers["x-should-retry"] == "false"
    strange = await http.post("/v1/completions", TEXT, x_request_id="not/ours")
    assert strange.status == 200
    assert strange.headers["x-request-id"] != "not/ours"


async def test_two_clients_and_grpc_at_once(http: Any, text_of: Any) -> None:
    http.scheduler.auto_tokens = 2

    async def ask(client: Any, index: int) -> None:
        name = f"r{index}"
        answer = await client.completions.create(
            model="tiny", prompt=name, extra_headers={"x-request-id": name}
        )
        assert answer.choices[0].text == text_of(http.scheduler.requests[name])

    async def stream(client: Any, index: int) -> None:
        name = f"s{index}"
        chunks = await client.chat.completions.create(
            **CHAT, stream=True, extra_headers={"x-request-id": name}
        )
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])
        assert text == text_of(http.scheduler.requests[name])

    other = http.new_client()
    over_grpc = http.grpc.inference.Generate(generate_request(request_id="grpc"))
    calls = [kind(client, n) for n in range(8) for kind in (ask, stream) for client in (http.client,)]
    calls += [kind(other, n + 100) for n in range(8) for kind in (ask, stream)]
    result, *_ = await asyncio.gather(collect(over_grpc), *calls)
    assert result.tokens == http.scheduler.requests["grpc"].planned


async def test_models(http: Any) -> None:
    (model,) = [model async for model in http.client.models.list()]
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "laps")
    assert model.max_model_len == 200_000
    assert model.laps["workers"] == 2
    assert (await http.client.models.retrieve("tiny")) == model


async def test_a_deadline_keeps_what_there_is(http: Any) -> None:
    http.scheduler.auto_tokens = 0
    asking = asyncio.create_task(http.client.completions.create(**TEXT))
    await http.scheduler.until(lambda: http.scheduler.follows)
    stored = http.stored()
    http.scheduler.emit(stored.spec.request_id, 3)
    http.scheduler.finish(stored, generation_pb2.FINISH_REASON_DEADLINE)
    answer = await asking
    assert answer.choices[0].finish_reason == "length"
    assert answer.laps["finish_reason"] == "deadline"
