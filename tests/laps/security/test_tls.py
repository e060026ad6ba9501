"""Links by TLS: who gets through, and certificates that are replaced while streams run."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from laps import channels
from laps.client import AsyncClient, Client
from laps.client.retry import RetryPolicy
from laps.errors import Unavailable, from_rpc_error
from laps.ports import free_ports
from laps.security.interceptor import AccessInterceptor, by_certificate
from laps.security.tls import TlsFiles, http_context
from laps.setting import SettingsError
from laps.settings import Settings
from laps.v1 import inference_pb2, inference_pb2_grpc
from tests.certificates import GATEWAY, HERE, WORKER, Authority
from tests.servers import listening

DESCRIBE = "/laps.v1.SchedulerService/DescribePool"
DELIVER = "/laps.v1.SchedulerService/Deliver"


class Scheduler:
    """Behind mutual TLS: a unary method, and a stream that goes on as long as it is told to."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.streaming = asyncio.Event()
        self.address = ""

    async def describe(self, request: bytes, context: Any) -> bytes:
        return b"described"

    async def deliver(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        yield b"first"
        self.streaming.set()
        await self.go_on.wait()
        yield b"last"

    def new_server(self) -> grpc.aio.Server:
        server = channels.new_server(interceptors=[AccessInterceptor(by_certificate("laps"))])
        methods = {
            "DescribePool": grpc.unary_unary_rpc_method_handler(self.describe),
            "Deliver": grpc.stream_stream_rpc_method_handler(self.deliver),
        }
        handler = grpc.method_handlers_generic_handler("laps.v1.SchedulerService", methods)
        server.add_generic_rpc_handlers((handler,))
        return server


@pytest.fixture
def authority() -> Authority:
    return Authority()


@asynccontextmanager
async def serving(files: TlsFiles) -> AsyncIterator[Scheduler]:
    scheduler = Scheduler()
    async with listening(scheduler.new_server(), tls=files) as port:
        scheduler.address = f"localhost:{port}"
        yield scheduler
        scheduler.go_on.set()


async def describe(address: str, files: TlsFiles | None) -> str:
    """OK, or the status with which it failed."""
    async with channels.open_channel(address, tls=files) as channel:
        try:
            assert await channel.unary_unary(DESCRIBE)(b"", timeout=60) == b"described"
        except grpc.aio.AioRpcError as error:
            return error.code().name
    return "OK"


async def test_only_a_gateway_of_our_authority_gets_through(authority: Authority, tmp_path: Path) -> None:
    foreign = Authority()
    cases = {
        "a gateway": (authority.write(tmp_path / "g", GATEWAY), "OK"),
        "a worker": (authority.write(tmp_path / "w", WORKER), "PERMISSION_DENIED"),
        "of another domain": (
            authority.write(tmp_path / "d", "spiffe://evil/gateway"),
            "UNAUTHENTICATED",
        ),
        "a DNS name alone": (
            authority.write(tmp_path / "n", "gateway.laps"),
            "UNAUTHENTICATED",
        ),
        "expired": (authority.write(tmp_path / "e", GATEWAY, expired=True), "UNAVAILABLE"),
        "foreign": (foreign.write(tmp_path / "f", GATEWAY, trusted=authority.pem), "UNAVAILABLE"),
        "none": (TlsFiles("", "", str(tmp_path / "g/ca.pem")), "UNAVAILABLE"),
        "in the clear": (None, "UNAVAILABLE"),
    }
    async with serving(authority.write(tmp_path / "s", *HERE)) as scheduler:
        for name, (files, expected) in cases.items():
            assert await describe(scheduler.address, files) == expected, name


async def test_a_client_refuses_a_server_that_is_not_the_one(authority: Authority, tmp_path: Path) -> None:
    client = authority.write(tmp_path / "client", GATEWAY)
    servers = {
        "another name": authority.write(tmp_path / "a", "elsewhere.example"),
        "a worker's certificate": authority.write(tmp_path / "b", WORKER),
        "expired": authority.write(tmp_path / "c", *HERE, expired=True),
        "foreign": Authority().write(tmp_path / "d", *HERE, trusted=authority.pem),
    }
    for name, files in servers.items():
        async with serving(files) as scheduler:
            assert await describe(scheduler.address, client) == "UNAVAILABLE", name


async def test_certificates_are_replaced_while_a_stream_runs(authority: Authority, tmp_path: Path) -> None:
    server_files = authority.write(tmp_path / "server", *HERE)
    client_files = authority.write(tmp_path / "client", GATEWAY)
    async with (
        serving(server_files) as scheduler,
        channels.open_channel(scheduler.address, tls=client_files) as old_channel,
    ):
        stream = old_channel.stream_stream(DELIVER)(iter([b""]))
        assert await stream.read() == b"first"
        # First both authorities are trusted, then only the new one, as a careful operator does it.
        successor = Authority()
        both = authority.pem + successor.pem
        authority.write(tmp_path / "server", *HERE, trusted=both)
        left_behind = authority.write(tmp_path / "left-behind", GATEWAY, trusted=both)
        successor.write(tmp_path / "client", GATEWAY, trusted=both)
        assert await describe(scheduler.address, client_files) == "OK"
        assert await describe(scheduler.address, left_behind) == "OK"
        successor.write(tmp_path / "server", *HERE)
        assert await describe(scheduler.address, client_files) == "OK"
        assert await describe(scheduler.address, left_behind) == "UNAVAILABLE"
        scheduler.go_on.set()
        assert await stream.read() == b"last"


async def test_files_that_do_not_fit_are_not_taken(authority: Authority, tmp_path: Path) -> None:
    server_files = authority.write(tmp_path / "server", *HERE)
    client_files = authority.write(tmp_path / "client", GATEWAY)
    async with serving(server_files) as scheduler:
        # Replaced one after the other: for a moment the key is not the certificate's.
        certificate, key = authority.issue(*HERE)
        put(server_files.key, key)
        assert await describe(scheduler.address, client_files) == "OK"
        put(server_files.certificate, certificate)
        assert await describe(scheduler.address, client_files) == "OK"
        put(server_files.certificate, None)
        assert await describe(scheduler.address, client_files) == "OK"


def put(path: str, content: bytes | None) -> None:
    if content is None:
        Path(path).unlink()
    else:
        Path(path).write_bytes(content)


def talk(port: int, authority: Authority, certificate: TlsFiles | None = None) -> bytes:
    """What an HTTPS server says; empty when it refuses us."""
    import socket

    context = ssl.create_default_context(cadata=authority.pem.decode())
    if certificate is not None:
        context.load_cert_chain(certificate.certificate, certificate.key)
    with socket.create_connection(("127.0.0.1", port)) as plain:
        try:
            with context.wrap_socket(plain, server_hostname="localhost") as connection:
                return connection.recv(100)
        except OSError:
            return b""


@pytest.mark.parametrize("asks", [False, True])
async def test_the_http_port_follows_its_files(authority: Authority, tmp_path: Path, asks: bool) -> None:
    files = authority.write(tmp_path / "server", *HERE)
    context = http_context(files, ask_clients=asks)

    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello")
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0, ssl=context) as server:
        port = server.sockets[0].getsockname()[1]
        client = authority.write(tmp_path / "client", GATEWAY)
        assert await asyncio.to_thread(talk, port, authority, client) == b"hello"
        assert await asyncio.to_thread(talk, port, authority) == (b"" if asks else b"hello")
        successor = Authority()
        successor.write(tmp_path / "server", *HERE)
        assert await asyncio.to_thread(talk, port, authority, client) == b""
        assert await asyncio.to_thread(talk, port, successor, client) == (b"" if asks else b"hello")
        new_client = successor.write(tmp_path / "new-client", GATEWAY)
        assert await asyncio.to_thread(talk, port, successor, new_client) == b"hello"
        put(files.key, b"no key")
        assert await asyncio.to_thread(talk, port, successor, new_client) == b"hello"


class Models(inference_pb2_grpc.InferenceServiceServicer):
    async def ListModels(self, request: Any, context: Any) -> inference_pb2.ListModelsResponse:
        return inference_pb2.ListModelsResponse(models=[inference_pb2.Model(name="tiny")])


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_a_client_that_lives_long_takes_new_certificates(
    authority: Authority, tmp_path: Path, kind: str
) -> None:
    server_files = authority.write(tmp_path / "server", *HERE)
    client_files = TlsFiles("", "", str(tmp_path / "client/ca.pem"))
    authority.write(tmp_path / "client", GATEWAY)
    (port,) = free_ports(1)

    @asynccontextmanager
    async def served() -> AsyncIterator[None]:
        server = channels.new_server()
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(Models(), server)
        async with listening(server, port=port, tls=server_files, ask_clients=False):
            yield

    make = AsyncClient if kind == "async" else Client
    client = make(f"localhost:{port}", tls=client_files, retry=RetryPolicy(first_backoff_s=0.05))

    async def models() -> Any:
        return await (client.models() if kind == "async" else asyncio.to_thread(client.models))

    async with served():
        assert [model.name for model in await models()] == ["tiny"]
    successor = Authority()
    successor.write(tmp_path / "server", *HERE)
    async with served():
        with pytest.raises(Unavailable):
            await models()
        successor.write(tmp_path / "client", GATEWAY)
        assert [model.name for model in await models()] == ["tiny"]
        closing = client.close()
        if closing is not None:
            await closing


def test_settings_that_are_half_a_certificate_are_refused(authority: Authority, tmp_path: Path) -> None:
    files = authority.write(tmp_path, *HERE)
    given = {"tls_cert": files.certificate, "tls_key": files.key, "tls_ca": files.authorities}
    assert TlsFiles.of_service(Settings(**given)) == files
    assert TlsFiles.of_service(Settings()) is None
    for name in given:
        if name != "tls_ca":
            with pytest.raises(SettingsError, match=name):
                TlsFiles.of_service(Settings(**{**given, name: ""}))
    with pytest.raises(SettingsError, match="tls_ca"):
        TlsFiles.of_service(Settings(**{**given, "tls_ca": ""}))
    with pytest.raises(SettingsError, match="cannot be used"):
        TlsFiles.of_service(Settings(**{**given, "tls_key": files.certificate}))
    with pytest.raises(SettingsError, match=r"No such file.*nowhere\.pem"):
        TlsFiles.of_service(Settings(**{**given, "tls_ca": "nowhere.pem"}))
    with pytest.raises(SettingsError, match="edge_tls_key"):
        TlsFiles.of_edge(Settings(edge_tls_cert=files.certificate))
    edge = TlsFiles.of_edge(Settings(**given))
    assert edge is not None
    assert edge.authorities == "", "who trusts itself with tls_ca does not ask clients for certificates"


async def test_unreadable_files_say_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        channels.open_channel("localhost:1", tls=TlsFiles("", "", str(tmp_path / "nothing")))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with channels.open_channel("localhost:1") as channel:
            await channel.unary_unary(DESCRIBE)(b"")
    assert from_rpc_error(caught.value).from_transport
