"""`n` and several prompts: every output is a request of its own, and the answer is one."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest
from fake_scheduler import Stored
from gateway_calls import eventually

from gateway.http.parameters import Endpoint
from gateway.http.requests import MAX_OUTPUTS, read_request
from laps.errors import ResourceExhausted
from laps.v1 import generation_pb2

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
PROMPTS = ["the end", "a", "and then"]


@pytest.fixture
def text_of(backend: Any) -> Any:
    def text_of(stored: Stored) -> str:
        return str(backend.decode(stored.planned, skip_special_tokens=True))

    return text_of


def by_seed(http: Any) -> list[Stored]:
    return sorted(http.scheduler.requests.values(), key=lambda stored: stored.spec.sampling.seed)


async def test_n_outputs_of_a_chat(http: Any, text_of: Any) -> None:
    answer = await http.client.chat.completions.create(**CHAT, n=3, seed=5)
    stored = by_seed(http)
    assert [each.spec.sampling.seed for each in stored] == [5, 6, 7]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in answer.choices]
    assert texts == [text_of(each) for each in stored]
    assert len(set(texts)) == 3
    assert answer.usage.completion_tokens == 3 * 40
    assert answer.usage.prompt_tokens == len(stored[0].spec.prompt_token_ids) // 4
    told = answer.laps["outputs"]
    assert [each["request_id"] for each in told] == [each.spec.request_id for each in stored]
    assert {each["finish_reason"] for each in told} == {"length"}
    assert answer.id == f"chatcmpl-{told[0]['request_id']}"


async def test_the_first_of_several_is_the_one_alone(http: Any) -> None:
    alone = await http.client.completions.create(model="tiny", prompt="a", seed=5)
    several = await http.client.completions.create(model="tiny", prompt="a", seed=5, n=2)
    assert several.choices[0].text == alone.choices[0].text


async def test_seeds_go_round(http: Any) -> None:
    await http.client.completions.create(model="tiny", prompt="a", seed=-1, n=2)
    assert [each.spec.sampling.seed for each in by_seed(http)] == [0, (1 << 64) - 1]


@pytest.mark.parametrize("prompts", [PROMPTS, [[5, 0], [7], [5, 0, 7, 5]]])
async def test_prompts_times_n_in_order(http: Any, text_of: Any, prompts: Any) -> None:
    header = {"x-request-id": "mine"}
    answer = await http.client.completions.create(model="tiny", prompt=prompts, n=2, extra_headers=header)
    stored = [http.scheduler.requests[f"mine-{index}"] for index in range(6)]
    assert len(http.scheduler.requests) == 6
    assert [choice.text for choice in answer.choices] == [text_of(each) for each in stored]
    given = [list(memoryview(each.spec.prompt_token_ids).cast("I")) for each in stored]
    assert given[0] == given[1] != given[2]
    assert given[4] == given[5]
    assert answer.usage.prompt_tokens == sum(map(len, given[::2]))
    assert (answer.id, answer._request_id) == ("cmpl-mine", "mine")
    again = await http.client.completions.create(model="tiny", prompt=prompts, n=2, extra_headers=header)
    assert again.choices == answer.choices
    assert len(http.scheduler.requests) == 6


@pytest.mark.parametrize("usage", [False, True])
async def test_a_stream_tells_its_outputs_apart(http: Any, text_of: Any, usage: bool) -> None:
    options: dict[str, Any] = {"stream_options": {"include_usage": True}} if usage else {}
    stream = await http.client.completions.create(model="tiny", prompt=PROMPTS, stream=True, **options)
    chunks = [chunk async for chunk in stream]
    texts, finishes, named = [""] * 3, [0] * 3, [""] * 3
    for chunk in chunks:
        for choice in chunk.choices:
            assert not finishes[choice.index]
            texts[choice.index] += choice.text
            if choice.finish_reason:
                finishes[choice.index] += 1
                named[choice.index] = chunk.laps["request_id"]
    assert finishes == [1, 1, 1]
    assert texts == [text_of(http.scheduler.requests[name]) for name in named]
    assert len({chunk.id for chunk in chunks}) == 1
    if usage:
        assert chunks[-1].choices == []
        assert chunks[-1].usage.completion_tokens == 3 * 40


async def test_a_chat_stream_opens_every_output(http: Any) -> None:
    stream = await http.client.chat.completions.create(**CHAT, n=2, stream=True, logprobs=True)
    chunks = [chunk async for chunk in stream]
    assert [(chunk.choices[0].index, chunk.choices[0].delta.role) for chunk in chunks[:2]] == [
        (0, "assistant"),
        (1, "assistant"),
    ]
    entries = [0, 0]
    for chunk in chunks[2:]:
        choice = chunk.choices[0]
        entries[choice.index] += len(choice.logprobs.content) if choice.logprobs else 0
    assert entries == [40, 40]


async def test_nothing_is_said_before_all_are_stored(http: Any) -> None:
    http.scheduler.thawed.clear()
    asking = asyncio.create_task(http.post("/v1/completions", {"prompt": PROMPTS, "stream": True}))
    await http.scheduler.until(lambda: http.scheduler.waiting)
    http.scheduler.refuse = ResourceExhausted("full", retry_after_s=3.0)
    http.scheduler.thawed.set()
    answered = await asking
    assert (answered.status, answered.headers["retry-after"]) == (429, "3")
    assert not http.scheduler.requests


async def test_leaving_cancels_all(http: Any) -> None:
    http.scheduler.auto_tokens = 0
    body = json.dumps({"prompt": PROMPTS, "n": 2, "stream": True}).encode()
    _, writer = await http.send("POST", "/v1/completions", body)
    await http.scheduler.until(lambda: len(http.scheduler.follows) == 6)
    writer.transport.abort()
    await eventually(lambda: all(each.finished for each in http.scheduler.requests.values()))
    await eventually(lambda: http.gateway.inference.streams.count == 0)
    assert len(http.scheduler.requests) == 6


@pytest.mark.parametrize("stream", [False, True])
async def test_one_that_fails_takes_the_others_with_it(http: Any, stream: bool) -> None:
    http.scheduler.auto_tokens = 0
    body = {"prompt": PROMPTS, "stream": stream}
    asking = asyncio.create_task(http.post("/v1/completions", body))
    await http.scheduler.until(lambda: len(http.scheduler.follows) == 3)
    second = list(http.scheduler.requests.values())[1]
    http.scheduler.finish(second, generation_pb2.FINISH_REASON_CANCELLED)
    answered = await asking
    if stream:
        *_, last, nothing = answered.body.split(b"\n\n")
        assert nothing == b""
        error = json.loads(last.removeprefix(b"data: "))["error"]
    else:
        assert answered.status == 499
        error = answered.error
    assert error["code"] == "cancelled"
    await eventually(lambda: all(each.finished for each in http.scheduler.requests.values()))
    await eventually(lambda: http.gateway.inference.streams.count == 0)


async def test_outputs_are_streams(start_http: Any) -> None:
    http = await start_http(max_streams=2)
    with pytest.raises(openai.RateLimitError) as caught:
        await http.client.completions.create(model="tiny", prompt="a", n=3)
    assert caught.value.code == "streams_full"
    await eventually(lambda: http.gateway.inference.streams.count == 0)
    await eventually(lambda: all(each.finished for each in http.scheduler.requests.values()))


async def test_each_is_a_call_of_its_own_in_the_metrics(http: Any) -> None:
    registry = http.gateway.inference._metrics.registry
    labels = {"pool": "default", "method": "OpenAI.Completions", "code": "OK"}
    await http.client.completions.create(model="tiny", prompt="a", n=3)
    await eventually(lambda: registry.get_sample_value("laps_gateway_calls_total", labels) == 3)


def test_an_id_without_room_for_a_number_is_none() -> None:
    body: dict[str, Any] = {"prompt": "a", "n": MAX_OUTPUTS}
    asked = read_request(body, Endpoint.COMPLETIONS, "x" * 124)
    assert asked.output(127).request_id == "x" * 124 + "-127"
    assert read_request(body, Endpoint.COMPLETIONS, "x" * 125).output(127).request_id == ""
    assert read_request({"prompt": "a"}, Endpoint.COMPLETIONS, "x" * 128).output(0).request_id == "x" * 128
