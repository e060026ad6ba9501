"""Proxies that the environment names: on a client's way to a gateway, and nowhere else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest

from laps import channels
from laps.client import AsyncClient, Client
from laps.client.retry import NO_RETRY
from laps.errors import LapsError

GATEWAY = "gateway.laps.invalid:50051"


@pytest.fixture
async def asked(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[list[str]]:
    """What a proxy that the environment names is asked for. It refuses everything."""
    lines: list[str] = []

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lines.append((await reader.readline()).decode().strip())
        writer.write(b"HTTP/1.1 403 Forbidden\r\n\r\n")
        await writer.drain()
        writer.close()

    proxy = await asyncio.start_server(refuse, "127.0.0.1", 0)
    port = proxy.sockets[0].getsockname()[1]
    for name in ("grpc_proxy", "https_proxy", "http_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
    for name in ("no_grpc_proxy", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    async with proxy:
        yield lines


async def test_own_machine_is_reached_without(serve: Any, script: Any, asked: list[str]) -> None:
    def blocking(address: str) -> str:
        with Client(address) as client:
            return client.generate("hi", max_tokens=4).text

    async with serve(script()) as gateway:
        port = gateway.address.rpartition(":")[2]
        for address in (f"127.0.0.1:{port}", f"localhost:{port}"):
            async with AsyncClient(address) as client:
                assert (await client.generate("hi", max_tokens=4)).text == "one two three four"
            assert await asyncio.to_thread(blocking, address) == "one two three four"
    assert asked == []


async def test_parts_call_each_other_without(asked: list[str]) -> None:
    async with channels.open_channel(GATEWAY) as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await channel.unary_unary("/laps.v1.Nothing/Nothing")(b"", timeout=5)
    assert asked == []


@pytest.mark.parametrize("kind", ["asynchronous", "in a thread"])
async def test_a_client_reaches_its_gateway_by_it(kind: str, asked: list[str]) -> None:
    def blocking() -> None:
        with Client(GATEWAY, retry=NO_RETRY) as client:
            client.generate("hi", timeout_s=5)

    async def asynchronous() -> None:
        async with AsyncClient(GATEWAY, retry=NO_RETRY) as client:
            await client.generate("hi", timeout_s=5)

    call: Callable[[], Any] = asynchronous if kind == "asynchronous" else lambda: asyncio.to_thread(blocking)
    with pytest.raises(LapsError):
        await call()
    assert set(asked) == {f"CONNECT {GATEWAY} HTTP/1.1"} or set(asked) == {f"CONNECT {GATEWAY} HTTP/1.0"}
