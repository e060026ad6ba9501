"""Calls to a gateway and what came back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from laps.errors import LapsError, from_rpc_error
from laps.v1 import generation_pb2, inference_pb2


@dataclass
class Result:
    """What a stream brought. Offsets are checked on the way: no gap, no repeat."""

    request_id: str = ""
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[float] = field(default_factory=list)
    texts_at: list[tuple[int, str]] = field(default_factory=list)
    """After each message: output tokens, and the text up to there."""
    complete: generation_pb2.Complete | None = None
    messages: int = 0

    def add(self, response: Any, first_offset: int = 0) -> None:
        assert response.offset == first_offset + len(self.tokens)
        assert self.complete is None
        self.request_id = response.request_id
        self.messages += 1
        if response.WhichOneof("event") == "complete":
            self.complete = response.complete
            return
        self.tokens += response.chunk.token_ids
        self.text += response.chunk.text
        self.logprobs += [entry.logprob for entry in response.chunk.logprobs]
        self.texts_at.append((first_offset + len(self.tokens), self.text))


def generate_request(text: str = "the end", **fields: Any) -> inference_pb2.GenerateRequest:
    stopping = {name: fields.pop(name) for name in ("max_tokens", "min_tokens", "stop") if name in fields}
    request = inference_pb2.GenerateRequest(text=text, **fields)
    if stopping:
        request.stopping.CopyFrom(generation_pb2.StoppingParams(**stopping))
    return request


async def collect(call: Any, first_offset: int = 0, result: Result | None = None) -> Result:
    """Reads a stream to its end."""
    result = result or Result()
    while (response := await call.read()) is not grpc.aio.EOF:
        result.add(response, first_offset)
    return result


async def read_tokens(call: Any, tokens: int, first_offset: int = 0) -> Result:
    """Reads a stream until so many tokens have come."""
    result = Result()
    while len(result.tokens) < tokens:
        result.add(await call.read(), first_offset)
    return result


async def read_until_error(call: Any) -> tuple[list[Any], LapsError]:
    """The messages of a stream, and the error by which it ends."""
    messages = []
    try:
        while True:
            messages.append(await call.read())
            assert messages[-1] is not grpc.aio.EOF
    except grpc.aio.AioRpcError as error:
        return messages, from_rpc_error(error)


async def eventually(condition: Callable[[], Any], timeout_s: float = 60.0) -> None:
    """Waits for something that shows only in the gateway's own state."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def failure(call: Any) -> LapsError:
    """The error by which a call ends, with its details."""
    try:
        if hasattr(call, "read"):
            await collect(call)
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error)
    raise AssertionError("the call did not fail")
