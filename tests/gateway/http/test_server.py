"""HTTP itself, byte for byte: events, statuses, connections that break, stall or are too many."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from typing import Any

import openai
import pytest
from gateway_calls import eventually

from gateway.http import answers, server
from laps.runtime import Lifetime
from laps.v1 import generation_pb2

from .conftest import read_head, read_response

TEXT: dict[str, Any] = {"model": "tiny", "prompt": "the end"}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(("path", "body"), [("completions", TEXT), ("chat/completions", CHAT)])
@pytest.mark.parametrize("usage", [False, True])
async def test_events(http: Any, path: str, body: Any, usage: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if usage else {}
    answered = await http.post(f"/v1/{path}", body | {"stream": True} | options)
    assert answered.status == 200
    assert answered.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answered.headers["cache-control"] == "no-cache"
    assert answered.headers["x-request-id"] == http.stored().spec.request_id
    assert answered.body.isascii()
    *events, nothing = answered.body.split(b"\n\n")
    assert nothing == b""
    assert all(event.startswith(b"data: ") and event.count(b"\n") == 0 for event in events)
    assert events[-1] == b"data: [DONE]"
    pieces = [json.loads(event.removeprefix(b"data: ")) for event in events[:-1]]
    assert all(("usage" in piece) == usage for piece in pieces)
    assert (pieces[-1]["choices"] == []) == usage
    finishes = [piece["choices"][0]["finish_reason"] for piece in pieces if piece["choices"]]
    assert finishes == [None] * (len(finishes) - 1) + ["length"]


async def test_events_come_as_tokens_are_stored(http: Any) -> None:
    http.scheduler.auto_tokens = 0
    reader, writer = await http.send(
        "POST", "/v1/chat/completions", json.dumps(CHAT | {"stream": True}).encode()
    )
    status, _ = await read_head(reader)
    assert status == 200
    await reader.readuntil(b'"role":"assistant"')
    await http.scheduler.until(lambda: http.scheduler.follows)
    http.scheduler.emit(http.stored().spec.request_id, 20)
    await asyncio.wait_for(reader.readuntil(b'"content":"'), 60)
    assert not http.stored().finished
    writer.close()


async def test_a_stream_that_waits_says_that_it_is_alive(http: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between events, never inside one, and OpenAI's own client skips it."""
    monkeypatch.setattr(answers, "ALIVE_S", 0.02)
    http.scheduler.auto_tokens = 0
    stream = await http.client.completions.create(**TEXT, stream=True)
    reading = asyncio.create_task(_texts(stream))
    # No event yet: all that has come are comments.
    await eventually(lambda: stream.response.num_bytes_downloaded >= 3 * len(answers.ALIVE))
    request_id = http.stored().spec.request_id
    http.scheduler.emit(request_id, 1 << 20)
    assert len("".join(await asyncio.wait_for(reading, 60))) > 0

    reader, writer = await http.send("POST", "/v1/completions", json.dumps(TEXT | {"stream": True}).encode())
    await read_head(reader)
    await reader.readuntil(answers.ALIVE)
    await reader.readuntil(answers.ALIVE)
    http.scheduler.auto_tokens = 5
    rest = (await asyncio.wait_for(reader.read(), 60)).decode()
    events = [line for line in rest.split("\r\n") if line.startswith(("data: ", ": "))]
    assert events[-1] == "data: [DONE]\n\n"
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("alive ")]
    writer.close()


async def _texts(stream: Any) -> list[str]:
    return [choice.text async for chunk in stream for choice in chunk.choices]


@pytest.mark.parametrize("stream", [False, True])
async def test_leaving_cancels(http: Any, stream: bool) -> None:
    """At once, as nobody could come back to an id that the gateway made."""
    http.scheduler.auto_tokens = 0
    body = json.dumps(TEXT | {"stream": stream}).encode()
    _, writer = await http.send("POST", "/v1/completions", body)
    await http.scheduler.until(lambda: http.scheduler.follows)
    writer.transport.abort()
    await http.scheduler.until(lambda: http.scheduler.unfollows)
    await eventually(lambda: http.stored().finished)
    assert http.stored().complete.finish_reason == generation_pb2.FINISH_REASON_CANCELLED
    await eventually(lambda: http.gateway.inference.streams.count == 0)


async def test_leaving_their_stream_cancels(http: Any) -> None:
    http.scheduler.auto_tokens = 0
    stream = await http.client.completions.create(**TEXT, stream=True)
    await http.scheduler.until(lambda: http.scheduler.follows)
    await stream.close()
    await eventually(lambda: http.stored().finished)


async def test_who_named_the_request_can_come_back(http: Any) -> None:
    http.scheduler.auto_tokens = 0
    body = json.dumps(TEXT).encode()
    _, writer = await http.send("POST", "/v1/completions", body, x_request_id="kept")
    await http.scheduler.until(lambda: http.scheduler.follows)
    writer.transport.abort()
    await http.scheduler.until(lambda: http.scheduler.unfollows)
    assert not http.stored().finished
    http.scheduler.auto_tokens = 10
    assert (await http.post("/v1/completions", TEXT, x_request_id="kept")).status == 200
    assert set(http.scheduler.requests) == {"kept"}


@pytest.mark.parametrize("named", [False, True])
async def test_a_client_that_does_not_read_loses_its_stream(start_http: Any, named: bool) -> None:
    """It loses that and no more: a request that goes on is there for who asks again."""
    http = await start_http(stream_buffer_tokens=1000)
    given = CHAT | {"max_tokens": 150_000, "stream": True, "logprobs": True}
    headers = {"x_request_id": "slow"} if named else {}
    _, writer = await http.send("POST", "/v1/chat/completions", json.dumps(given).encode(), **headers)
    writer.transport.pause_reading()
    await http.scheduler.until(lambda: http.scheduler.follows)
    small_buffers(http)
    stored, gateway = http.stored(), http.gateway
    feed = gateway.link._feeds._feeds[stored.spec.request_id]
    while gateway.inference.streams.count:
        http.scheduler.emit(stored.spec.request_id, 500)
        await eventually(lambda: len(feed.tokens) == stored.emitted or not gateway.inference.streams.count)
    assert not stored.finished
    assert stored.emitted < 50_000
    assert gateway.inference._metrics.streams_lost._value.get() == 1
    writer.transport.abort()


def small_buffers(http: Any) -> None:
    """The system would take in megabytes that the clients do not read."""
    for connection in http.gateway._http._runner.server.connections:
        # By its number, as uvloop's own socket object cannot do it.
        with socket.socket(fileno=os.dup(connection.transport.get_extra_info("socket").fileno())) as copy:
            copy.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16_384)


async def test_a_client_that_takes_nothing_is_let_go(http: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when nothing more comes that it could lag behind."""
    monkeypatch.setattr(answers, "STALLED_S", 0.05)
    monkeypatch.setattr(answers, "LAST_WORDS_S", 0.05)
    http.scheduler.auto_tokens = 0
    given = TEXT | {"max_tokens": 50_000, "stream": True, "logprobs": 5}
    _, writer = await http.send("POST", "/v1/completions", json.dumps(given).encode())
    writer.transport.pause_reading()
    await http.scheduler.until(lambda: http.scheduler.follows)
    small_buffers(http)
    http.scheduler.emit(http.stored().spec.request_id, 50_000)
    await eventually(lambda: not http.gateway.inference.streams.count)
    server_ = http.gateway._http._runner.server
    await eventually(lambda: not server_.connections)


async def test_health_and_readiness(start_http: Any) -> None:
    http = await start_http()
    await eventually(lambda: http.gateway.is_ready)
    assert (await http.raw("GET", "/health")).json == {"status": "ok"}
    assert (await http.raw("GET", "/ready")).json == {"status": "ready"}
    await http.scheduler.kill()
    await eventually(lambda: not http.gateway.is_ready)
    assert (await http.raw("GET", "/health")).status == 200
    unready = await http.raw("GET", "/ready")
    assert (unready.status, unready.error["code"]) == (503, "not_ready")
    assert unready.headers["retry-after"] == "1"


async def test_other_ways_in(http: Any) -> None:
    missing = await http.raw("GET", "/v1/embeddings")
    assert (missing.status, missing.error["code"]) == (404, "not_found")
    wrong = await http.raw("GET", "/v1/completions")
    assert (wrong.status, wrong.error["code"], wrong.headers["allow"]) == (405, "method_not_allowed", "POST")
    body = json.dumps(TEXT).encode()
    for headers in (
        {"content_type": "text/plain"},
        {"content_type": ""},
        {"content_encoding": "gzip"},
    ):
        answered = await http.raw("POST", "/v1/completions", body, **headers)
        assert (answered.status, answered.error["code"]) == (415, "unsupported_media_type")
    assert not http.scheduler.requests


async def test_a_body_is_bounded(start_http: Any) -> None:
    http = await start_http(max_message_bytes=1 << 16)
    large = json.dumps(TEXT | {"prompt": "a" * (1 << 16)}).encode()
    told = await http.raw("POST", "/v1/completions", large)
    assert (told.status, told.error["code"]) == (413, "message_too_large")
    chunks = b"".join(b"%x\r\n%s\r\n" % (4096, large[:4096]) for _ in range(17)) + b"0\r\n\r\n"
    untold = await http.raw("POST", "/v1/completions", chunks, content_length="", transfer_encoding="chunked")
    assert untold.status == 413


async def test_a_body_must_come(start_http: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "BODY_S", 0.05)
    monkeypatch.setattr(server, "LINGER_S", 0.05)
    http = await start_http()
    late = await http.raw("POST", "/v1/completions", b"{", content_length="100")
    assert (late.status, late.error["code"]) == (408, "timeout")


async def test_a_head_must_come(start_http: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "IDLE_S", 0.05)
    http = await start_http()
    for begun in (b"", b"POST /v1/comp", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"):
        reader, writer = await asyncio.open_connection("127.0.0.1", http.port)
        writer.write(begun)
        assert await asyncio.wait_for(reader.read(), 60) == b""
        writer.close()


async def test_connections_are_bounded(start_http: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "SPARE_CONNECTIONS", 1)
    http = await start_http(max_streams=2)
    opened = [await asyncio.open_connection("127.0.0.1", http.port) for _ in range(3)]
    await eventually(lambda: len(http.gateway._http._runner.server.connections) == 3)
    reader, _ = await asyncio.open_connection("127.0.0.1", http.port)
    full = await read_response(reader)
    assert (full.status, full.error["code"]) == (429, "streams_full")
    assert full.headers["connection"] == "close"
    opened[0][1].close()
    await eventually(lambda: len(http.gateway._http._runner.server.connections) == 2)
    assert (await http.raw("GET", "/health")).status == 200


async def test_drain(http: Any) -> None:
    """New work is refused at once; what runs may end; what does not is told."""
    http.scheduler.auto_tokens = 0
    ending = asyncio.create_task(http.client.completions.create(**TEXT, extra_headers={"x-request-id": "a"}))
    lasting = await http.client.completions.create(**TEXT, stream=True, extra_headers={"x-request-id": "b"})
    await http.scheduler.until(lambda: len(http.scheduler.follows) == 2)
    stopping = asyncio.create_task(http.gateway.stop(4.0))
    await eventually(lambda: http.gateway.inference.draining)
    with pytest.raises(openai.InternalServerError) as caught:
        await http.client.completions.create(**TEXT)
    assert (caught.value.status_code, caught.value.code) == (503, "shutting_down")
    assert (await http.raw("GET", "/ready")).status == 503
    http.scheduler.emit("a", 1000)
    assert (await ending).choices[0].finish_reason == "length"
    with pytest.raises(openai.APIError) as lost:
        async for _ in lasting:
            pass
    assert lost.value.code == "shutting_down"
    await stopping
    assert not http.scheduler.requests["b"].finished
    with pytest.raises(OSError, match=r".*"):
        await asyncio.open_connection("127.0.0.1", http.port)


async def test_a_taken_port_is_one_line(start_http: Any, settings: Any) -> None:
    from gateway.main import serve

    http = await start_http()
    with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{http.port}: the port is in use"):
        await serve(settings(http_port=http.port), Lifetime())


async def test_nothing_is_left_behind(http: Any) -> None:
    # The first request opens the stream over which all are submitted.
    reader, writer = await http.send("POST", "/v1/completions", json.dumps(TEXT).encode())
    await read_response(reader)
    writer.transport.abort()
    await eventually(lambda: not http.gateway._http._runner.server.connections)
    tasks = len(asyncio.all_tasks())
    for index in range(20):
        body = json.dumps(TEXT | {"stream": index % 2 == 0}).encode()
        _, writer = await http.send("POST", "/v1/completions", body)
        if index % 3:
            await read_response(_)
        writer.transport.abort()
    gateway = http.gateway
    await eventually(lambda: gateway.link.live_requests == 0 and gateway.inference.streams.count == 0)
    await eventually(lambda: len(asyncio.all_tasks()) <= tasks)
    await eventually(lambda: not gateway._http._runner.server.connections)
    assert not gateway.inference._readers
