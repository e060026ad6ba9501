"""Errors arrive as OpenAI's exception classes, each naming its parameter."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from gateway_calls import eventually, failure, generate_request

from laps.errors import LapsError, ResourceExhausted, Unavailable
from laps.reasons import Reason
from laps.v1 import generation_pb2

TEXT: dict[str, Any] = {"model": "tiny", "prompt": "the end"}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"temperature": -1}, "temperature", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_type"),
        ({"temperature": True}, "temperature", "invalid_type"),
        ({"temperature": 1e39}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"repetition_penalty": 0.009}, "repetition_penalty", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 1.5}, "max_tokens", "invalid_type"),
        ({"max_tokens": 1 << 40}, "max_tokens", "invalid_value"),
        ({"max_tokens": 300_000}, "max_tokens", "context_length_exceeded"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "invalid_value"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens", "invalid_value"),
        ({"stop": ["a", ""]}, "stop[1]", "invalid_value"),
        ({"stop": ["a"] * 17}, "stop", "invalid_value"),
        ({"stop": [1]}, "stop[0]", "invalid_type"),
        ({"stop": {}}, "stop", "invalid_type"),
        ({"seed": 1 << 64}, "seed", "invalid_value"),
        ({"logprobs": 21}, "logprobs", "invalid_value"),
        ({"prompt": ""}, "prompt", "prompt_empty"),
        ({"prompt": []}, "prompt", "prompt_empty"),
        ({"prompt": None}, "prompt", "prompt_empty"),
        ({"prompt": 7}, "prompt", "invalid_type"),
        ({"prompt": ["a", 7]}, "prompt[1]", "invalid_type"),
        ({"prompt": ["a", None]}, "prompt[1]", "prompt_empty"),
        ({"prompt": ["a", ""]}, "prompt", "prompt_empty"),
        ({"prompt": [[5], [5, -1]]}, "prompt[1][1]", "invalid_value"),
        ({"prompt": ["a"] * 129}, "prompt", "invalid_value"),
        ({"prompt": ["a", "b"], "n": 65}, "n", "invalid_value"),
        ({"prompt": [1, "a"]}, "prompt[1]", "invalid_type"),
        ({"prompt": [1, -1]}, "prompt[1]", "invalid_value"),
        ({"prompt": [1, 99_999]}, "prompt[1]", "token_unknown"),
        ({"prompt": [5] * 200_000}, "prompt", "context_length_exceeded"),
        ({"prompt": "\ud800"}, "prompt", "invalid_value"),
        ({"model": 3}, "model", "invalid_type"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 129}, "n", "invalid_value"),
        ({"n": True}, "n", "invalid_type"),
        ({"best_of": 3}, "best_of", "unsupported_parameter"),
        ({"echo": True}, "echo", "unsupported_parameter"),
        ({"suffix": "x"}, "suffix", "unsupported_parameter"),
        ({"presence_penalty": 2.5}, "presence_penalty", "invalid_value"),
        ({"frequency_penalty": "much"}, "frequency_penalty", "invalid_type"),
        ({"logit_bias": [5]}, "logit_bias", "invalid_type"),
        ({"logit_bias": {"the": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"05": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"5": "much"}}, "logit_bias[5]", "invalid_type"),
        ({"logit_bias": {"5": 101}}, "logit_bias[5]", "invalid_value"),
        ({"logit_bias": {"99999": 1}}, "logit_bias[99999]", "token_unknown"),
        ({"logit_bias": {"9999999999": 1}}, "logit_bias[9999999999]", "invalid_value"),
        ({"logit_bias": dict.fromkeys(map(str, range(301)), 1)}, "logit_bias", "invalid_value"),
        ({"stream": 1}, "stream", "invalid_type"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown_parameter"),
        ({"messages": []}, "messages", "unknown_parameter"),
        ({"invented": 1}, "invented", "unknown_parameter"),
        ({"laps": {"invented": 1}}, "laps.invented", "unknown_parameter"),
        ({"laps": {"priority": 101}}, "laps.priority", "invalid_value"),
        ({"laps": {"timeout_s": 0}}, "laps.timeout_s", "invalid_value"),
        ({"laps": {"request_class": "a b"}}, "laps.request_class", "invalid_value"),
    ],
)
async def test_a_completion_is_refused(http: Any, change: Any, param: str, code: str) -> None:
    answered = await http.post("/v1/completions", TEXT | change)
    error = answered.error
    assert (answered.status, error["param"], error["code"]) == (400, param, code)
    assert error["type"] == "invalid_request_error"
    assert error["message"].startswith(f"{param}: ")
    assert not http.scheduler.requests


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"messages": None}, "messages", "prompt_empty"),
        ({"messages": "hi"}, "messages", "invalid_type"),
        ({"messages": ["hi"]}, "messages[0]", "invalid_type"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "invalid_type"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "bad", "content": "hi"}]}, "messages", "invalid_value"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
            "unsupported_parameter",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
            "messages[0].tool_calls",
            "unsupported_parameter",
        ),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "unsupported_parameter"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "unsupported_parameter"),
        ({"top_logprobs": 3}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"logprobs": 3}, "logprobs", "invalid_type"),
        ({"prompt": "x"}, "prompt", "unknown_parameter"),
        ({"best_of": 1}, "best_of", "unknown_parameter"),
    ],
)
async def test_a_chat_is_refused(http: Any, change: Any, param: str, code: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await http.client.chat.completions.create(**CHAT, extra_body=change)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert not http.scheduler.requests


async def test_what_asks_for_nothing_is_taken(http: Any) -> None:
    harmless = {"n": 1, "tools": [], "logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0.0}
    harmless |= {"response_format": {"type": "text"}, "modalities": ["text"], "tool_choice": "none"}
    harmless |= {"stop": None, "seed": None, "store": True, "metadata": {"a": "b"}, "service_tier": "auto"}
    assert (await http.post("/v1/chat/completions", CHAT | harmless)).status == 200


async def test_all_that_is_wrong_is_told(http: Any) -> None:
    answered = await http.post("/v1/completions", TEXT | {"temperature": -1, "top_p": 2})
    assert "temperature: " in answered.error["message"]
    assert "top_p: " in answered.error["message"]


async def test_another_model(http: Any) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await http.client.completions.create(model="gpt-4o", prompt="x")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        await http.client.models.retrieve("gpt-4o")


@pytest.mark.parametrize(
    ("refusal", "kind", "status", "retry"),
    [
        (ResourceExhausted("full", retry_after_s=2.5), openai.RateLimitError, 429, ("3", "2500")),
        (ResourceExhausted("full", reason=Reason.STORE_FULL), openai.RateLimitError, 429, (None, None)),
        (Unavailable("later", reason=Reason.NOT_LEADER), openai.InternalServerError, 503, ("1", "1000")),
        (LapsError("?", reason=Reason.INTERNAL), openai.InternalServerError, 500, (None, None)),
        (LapsError("?", reason=Reason.PERMISSION_DENIED), openai.PermissionDeniedError, 403, (None, None)),
        (LapsError("?", reason=Reason.UNAUTHENTICATED), openai.AuthenticationError, 401, (None, None)),
    ],
)
async def test_what_the_scheduler_says(
    http: Any, refusal: LapsError, kind: Any, status: int, retry: tuple[str | None, str | None]
) -> None:
    # Also the time that the one attempt may take.
    http.gateway.link._retry_s = 0.5
    http.scheduler.refuse = refusal
    with pytest.raises(kind) as caught:
        await http.client.chat.completions.create(**CHAT, stream=True)
    assert caught.value.status_code == status
    headers = caught.value.response.headers
    assert (headers.get("retry-after"), headers.get("retry-after-ms")) == retry


async def test_their_client_comes_back_by_itself(http: Any) -> None:
    http.scheduler.refuse = ResourceExhausted("full", retry_after_s=0.01)
    client = http.new_client(max_retries=5)
    asking = asyncio.create_task(client.completions.create(**TEXT))
    await eventually(lambda: http.scheduler.submits)
    http.scheduler.refuse = None
    assert (await asking).choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
async def test_ends_that_openai_has_no_word_for(http: Any, stream: bool) -> None:
    http.scheduler.auto_tokens = 0

    async def ask() -> None:
        answer = await http.client.completions.create(**TEXT, stream=stream)
        if stream:
            async for _ in answer:
                pass

    for reason, status in (("CANCELLED", 499), ("ERROR", 500)):
        http.scheduler.requests.clear()
        follows = len(http.scheduler.follows)
        asking = asyncio.create_task(ask())
        await http.scheduler.until(lambda: len(http.scheduler.follows) > follows)  # noqa: B023
        stored = http.stored()
        http.scheduler.emit(stored.spec.request_id, 3)
        http.scheduler.finish(stored, generation_pb2.FinishReason.Value(f"FINISH_REASON_{reason}"))
        with pytest.raises(openai.APIError) as caught:
            await asking
        if not stream:
            assert caught.value.status_code == status  # type: ignore[attr-defined]
        assert caught.value.code == ("cancelled" if status == 499 else "internal")


async def test_streams_are_shared_with_grpc(start_http: Any) -> None:
    http = await start_http(max_streams=2)
    over_grpc = http.grpc.inference.Generate(generate_request())
    over_http = asyncio.create_task(http.client.completions.create(**TEXT))
    await http.scheduler.until(lambda: len(http.scheduler.follows) == 2)
    with pytest.raises(openai.RateLimitError) as caught:
        await http.client.completions.create(**TEXT)
    assert caught.value.code == "streams_full"
    assert (await failure(http.grpc.inference.Generate(generate_request()))).reason is Reason.STREAMS_FULL
    http.scheduler.auto_tokens = 50
    await over_http
    over_grpc.cancel()


async def test_a_defect_is_not_shown(http: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("private")

    monkeypatch.setattr(http.gateway.inference, "_detokenizer", broken)
    answered = await http.post("/v1/completions", TEXT)
    assert (answered.status, answered.error["code"]) == (500, "internal")
    assert b"private" not in answered.body
    streamed = await http.post("/v1/completions", TEXT | {"stream": True})
    assert streamed.status == 200
    assert b'"code":"internal"' in streamed.body
    assert b"[DONE]" not in streamed.body
