"""Calls that change something. Where a server refuses one as a whole, it is made again in the right place."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import hiredis
import pytest

from scheduler_svc.store.connection import Caller, make_pool
from scheduler_svc.store.errors import StoreError


class Server:
    """Answers each call of a function with the next of `replies`, and everything else with OK."""

    def __init__(self) -> None:
        self.replies: list[bytes] = []
        self.calls: list[bytes] = []
        self.connections = 0
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        commands = hiredis.Reader()
        while data := await reader.read(1 << 16):
            commands.feed(data)
            while command := commands.gets():
                if command[0] == b"FCALL":
                    self.calls.append(command[4])
                    writer.write(self.replies.pop(0))
                else:
                    writer.write(b"+OK\r\n")
        writer.close()


@pytest.fixture
async def servers() -> AsyncIterator[tuple[Server, Server]]:
    both = Server(), Server()
    listening = [await asyncio.start_server(server.serve, "127.0.0.1", 0) for server in both]
    for server, one in zip(both, listening, strict=True):
        server.port = one.sockets[0].getsockname()[1]
    yield both
    for one in listening:
        one.close()


@pytest.fixture
async def caller(servers: tuple[Server, Server]) -> AsyncIterator[Caller]:
    url = f"redis://127.0.0.1:{servers[0].port}/0"
    caller = Caller(make_pool(url, 60.0), url, "p", 60.0)
    yield caller
    caller.drop()


async def sent(caller: Caller, argument: str) -> tuple[Any, StoreError | None]:
    told: asyncio.Future[tuple[Any, StoreError | None]] = asyncio.get_running_loop().create_future()
    caller.send("f", argument, on_reply=lambda reply, error: told.set_result((reply, error)))
    return await asyncio.wait_for(told, 60)


async def called(caller: Caller, argument: str) -> tuple[Any, StoreError | None]:
    try:
        return await asyncio.wait_for(caller.call("f", argument), 60), None
    except StoreError as error:
        return None, error


@pytest.mark.parametrize("make", [sent, called])
@pytest.mark.parametrize("connected", [False, True])
async def test_it_follows_the_pool_to_another_node(
    servers: tuple[Server, Server], caller: Caller, make: Callable[[Caller, str], Any], connected: bool
) -> None:
    old, new = servers
    if connected:
        old.replies.append(b":0\r\n")
        assert await make(caller, "before") == (0, None)
    old.replies.append(b"-MOVED 7 127.0.0.1:%d\r\n" % new.port)
    new.replies += [b":1\r\n", b":2\r\n"]
    assert await make(caller, "moved") == (1, None)
    assert await make(caller, "after") == (2, None)
    assert (old.calls[-1], new.calls) == (b"moved", [b"moved", b"after"])


@pytest.mark.parametrize("make", [sent, called])
async def test_refused_credentials_cost_the_connection(
    servers: tuple[Server, Server], caller: Caller, make: Callable[[Caller, str], Any]
) -> None:
    """They may have been changed since it was opened: the next one reads them anew."""
    server, _ = servers
    server.replies += [b":0\r\n", b"-NOAUTH Authentication required.\r\n", b":1\r\n"]
    assert await make(caller, "a") == (0, None)
    reply, error = await make(caller, "b")
    assert reply is None
    assert "refuses the credentials" in str(error)
    assert await make(caller, "c") == (1, None)
    assert server.connections == 2
