"""A gateway with its HTTP port, over the fake scheduler; OpenAI's own client and bare sockets to call it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import openai
import pytest
import pytest_asyncio
from hypothesis import settings as hypothesis_settings

from laps.ports import free_ports

hypothesis_settings.register_profile("http", deadline=None, max_examples=200)


class HttpHarness:
    """A gateway, the fake scheduler behind it, and ways to call it."""

    def __init__(self, harness: Any, port: int) -> None:
        self.gateway = harness.gateway
        self.grpc = harness
        self.scheduler = harness.scheduler
        self.port = port
        self.clients: list[openai.AsyncOpenAI] = []

    @cached_property
    def client(self) -> openai.AsyncOpenAI:
        return self.new_client()

    def new_client(self, **options: Any) -> openai.AsyncOpenAI:
        given: dict[str, Any] = {"api_key": "unused", "max_retries": 0, "timeout": 90.0}
        self.clients.append(
            openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", **(given | options))
        )
        return self.clients[-1]

    def stored(self) -> Any:
        """The only request that the scheduler has."""
        (stored,) = self.scheduler.requests.values()
        return stored

    async def post(self, path: str, body: Any, **headers: str) -> Response:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.raw("POST", path, data, **headers)

    async def raw(self, method: str, path: str, data: bytes = b"", **headers: str) -> Response:
        """One exchange on a connection of its own, byte for byte."""
        reader, writer = await self.send(method, path, data, **headers)
        response = await read_response(reader)
        writer.close()
        return response

    async def send(
        self, method: str, path: str, data: bytes = b"", **headers: str
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        given = {"Host": "localhost", "Content-Type": "application/json", "Connection": "close"}
        given |= {"Content-Length": str(len(data))}
        given |= {name.replace("_", "-").title(): value for name, value in headers.items()}
        head = "".join(f"{name}: {value}\r\n" for name, value in given.items() if value)
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + data)
        return reader, writer


@dataclass
class Response:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        body = self.json
        assert set(body) == {"error"}
        assert set(body["error"]) == {"message", "type", "param", "code"}
        return body["error"]


async def read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)).decode()
    first, *lines = head.split("\r\n")[:-2]
    pairs = (line.split(": ", 1) for line in lines)
    return int(first.split()[1]), {name.lower(): value for name, value in pairs}


async def read_response(reader: asyncio.StreamReader) -> Response:
    status, headers = await read_head(reader)
    rest = await asyncio.wait_for(reader.read(), 60)
    if headers.get("transfer-encoding") == "chunked":
        rest = unchunked(rest)
    return Response(status, headers, rest)


def unchunked(data: bytes) -> bytes:
    body = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        length = int(size, 16)
        assert data[length : length + 2] == b"\r\n"
        body, data = body + data[:length], data[length + 2 :]
        if length == 0:
            assert not data
    return body


@pytest_asyncio.fixture
async def start_http(start_gateway: Callable[..., Any]) -> AsyncIterator[Callable[..., Any]]:
    """Starts a gateway with an HTTP port."""
    running: list[HttpHarness] = []

    async def start(**changes: Any) -> HttpHarness:
        (port,) = free_ports(1)
        harness = HttpHarness(await start_gateway(http_port=port, **changes), port)
        running.append(harness)
        return harness

    yield start
    for harness in running:
        for client in harness.clients:
            await client.close()


@pytest_asyncio.fixture
async def http(start_http: Callable[..., Any]) -> HttpHarness:
    harness: HttpHarness = await start_http()
    harness.scheduler.auto_tokens = 7
    return harness


@pytest.fixture(autouse=True)
def examples() -> Iterator[None]:
    before = hypothesis_settings.get_current_profile_name()
    hypothesis_settings.load_profile("http")
    yield
    hypothesis_settings.load_profile(before)
