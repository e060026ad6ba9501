"""Calls that change something. Where a server refuses one as a whole, it is made again in the right place."""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import hiredis
import pytest
from redis import exceptions
from redis.asyncio.connection import AbstractConnection

from scheduler_svc.store.connection import Caller, NodePool, Reader, make_pool
from scheduler_svc.store.errors import StoreError, StoreUnavailable
from tests.certificates import Authority


class Server:
    """Answers each call of a function with the next of `replies`, and everything else with OK."""

    def __init__(self) -> None:
        self.writers: list[asyncio.StreamWriter] = []
        self.certificates: list[Any] = []
        """Shown by each connection; None: it had no TLS."""
        self.listening: asyncio.Server | None = None
        self.replies: list[bytes] = []
        self.calls: list[bytes] = []
        self.connections = 0
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writers.append(writer)
        self.certificates.append(writer.get_extra_info("peercert"))
        commands = hiredis.Reader()
        while data := await reader.read(1 << 16):
            commands.feed(data)
            while command := commands.gets():
                if command[0] in (b"FCALL", b"FCALL_RO"):
                    self.calls.append(command[4])
                    writer.write(self.replies.pop(0))
                else:
                    writer.write(b"+OK\r\n")
        writer.close()

    async def start(self, tls: ssl.SSLContext | None = None) -> None:
        self.listening = await asyncio.start_server(self.serve, "127.0.0.1", 0, ssl=tls)
        self.port = self.listening.sockets[0].getsockname()[1]

    def reset(self) -> None:
        """Every connection, as a proxy does that finds no server behind it."""
        for writer in self.writers:
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()
        self.writers.clear()

    def stop(self) -> None:
        assert self.listening is not None
        self.listening.close()
        for writer in self.writers:
            writer.transport.abort()


@pytest.fixture
async def servers() -> AsyncIterator[tuple[Server, Server]]:
    both = Server(), Server()
    for server in both:
        await server.start()
    yield both
    for server in both:
        server.stop()


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


@pytest.mark.parametrize("make", [sent, called])
async def test_it_goes_back_to_where_the_url_leads_when_the_node_that_it_followed_is_gone(
    servers: tuple[Server, Server], caller: Caller, make: Callable[[Caller, str], Any]
) -> None:
    """The nodes that the URL names know who has taken its place."""
    given, followed = servers
    given.replies += [b"-MOVED 7 127.0.0.1:%d\r\n" % followed.port, b":2\r\n"]
    followed.replies.append(b":1\r\n")
    assert await make(caller, "a") == (1, None)
    followed.stop()
    answers = [await make(caller, "b") for _ in range(3)]
    assert (2, None) in answers
    assert all(isinstance(error, StoreUnavailable) for reply, error in answers[: answers.index((2, None))])


async def test_a_reader_goes_back_as_well(servers: tuple[Server, Server]) -> None:
    given, followed = servers
    url = f"redis://127.0.0.1:{given.port}/0"
    reader = Reader(make_pool(url, 60.0), url, "p")
    given.replies += [b"-MOVED 7 127.0.0.1:%d\r\n" % followed.port, b"$1\r\n\x02\r\n"]
    followed.replies.append(b"$1\r\n\x01\r\n")
    assert await reader.ask("f", "a") == 1
    followed.stop()
    for _ in range(2):  # redis-py connects once more by itself
        with pytest.raises(StoreUnavailable):
            await reader.ask("f", "b")
    assert await reader.ask("f", "c") == 2
    await reader.redis.connection_pool.aclose()


@pytest.mark.parametrize("make", [sent, called])
@pytest.mark.parametrize(
    "reply",
    [
        b"-CLUSTERDOWN The cluster is down",
        b"-TRYAGAIN Multiple keys request during rehashing of slot",
        b"-ERR Script attempted to access a non local key in a cluster node script: f, on @user_function:1.",
    ],
)
async def test_a_cluster_that_cannot_serve_now_is_asked_again_later(
    servers: tuple[Server, Server], caller: Caller, make: Callable[[Caller, str], Any], reply: bytes
) -> None:
    servers[0].replies += [reply + b"\r\n", b":1\r\n"]
    _, error = await make(caller, "a")
    assert isinstance(error, StoreUnavailable)
    assert await make(caller, "a") == (1, None)


@pytest.mark.parametrize("make", [sent, called])
@pytest.mark.parametrize(
    "reply",
    [
        b"-READONLY You can't write against a read only replica.",
        b"-MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
    ],
)
async def test_a_replica_costs_the_connection(
    servers: tuple[Server, Server], caller: Caller, make: Callable[[Caller, str], Any], reply: bytes
) -> None:
    """A name that leads to the primary may lead elsewhere by now. Who was the primary ends no connection."""
    server, _ = servers
    server.replies += [b":0\r\n", reply + b"\r\n", b":1\r\n"]
    assert await make(caller, "a") == (0, None)
    _, error = await make(caller, "b")
    assert isinstance(error, StoreUnavailable)
    assert await make(caller, "c") == (1, None)
    assert server.connections == 2


async def until_ended(connection: AbstractConnection) -> None:
    assert connection._reader is not None
    with suppress(ConnectionResetError):
        await asyncio.wait_for(connection._reader.read(), 60)


@pytest.fixture
async def pool(servers: tuple[Server, Server]) -> AsyncIterator[NodePool]:
    pool = make_pool(f"redis://127.0.0.1:{servers[0].port}/0", 60.0)
    yield pool
    await pool.aclose()


async def test_a_reader_connects_anew_where_it_was_broken_off(
    servers: tuple[Server, Server], pool: NodePool
) -> None:
    server, _ = servers
    reader = Reader(pool, "redis://there/0", "p")
    server.replies += [b"$1\r\n\x01\r\n", b"$1\r\n\x02\r\n"]
    assert await reader.ask("f", "a") == 1
    (connection,) = pool._available_connections
    server.reset()
    await until_ended(connection)
    assert await reader.ask("f", "b") == 2
    assert server.connections == 2


async def test_broken_off_in_the_midst_of_a_handshake_is_not_reached(
    servers: tuple[Server, Server], pool: NodePool
) -> None:
    connection = await pool.connected()
    servers[0].reset()
    await until_ended(connection)

    async def next_step() -> None:
        # asyncio's own transports take what cannot be sent.
        await connection.send_command("CLIENT", "SETINFO")  # type: ignore[no-untyped-call]
        await connection.read_response()  # type: ignore[no-untyped-call]

    with pytest.raises(exceptions.ConnectionError):
        await next_step()


async def test_a_new_certificate_is_shown_to_the_store(tmp_path: Path) -> None:
    """Also by a connection that is kept and opened anew."""
    authority, server = Authority(), Server()
    own = authority.write(tmp_path / "store", "localhost")
    accepts = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=own.authorities)
    accepts.load_cert_chain(own.certificate, own.key)
    accepts.verify_mode = ssl.CERT_REQUIRED
    await server.start(accepts)
    shown = authority.write(tmp_path / "scheduler", "scheduler")
    pool = make_pool(
        f"rediss://localhost:{server.port}/0",
        60.0,
        ssl_ca_certs=shown.authorities,
        ssl_certfile=shown.certificate,
        ssl_keyfile=shown.key,
    )
    reader = Reader(pool, "rediss://localhost/0", "p")
    for _ in range(2):
        server.replies.append(b"$1\r\n\x01\r\n")
        await reader.ask("f", "a")
        (connection,) = pool._available_connections
        server.reset()
        await until_ended(connection)
        authority.write(tmp_path / "scheduler", "scheduler")
    first, second = (certificate["serialNumber"] for certificate in server.certificates)
    assert first != second
    await pool.aclose()
    server.stop()
