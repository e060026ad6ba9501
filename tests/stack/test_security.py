"""The whole stack with everything on: TLS on every link, a store with TLS and ACL users, keys and tenants."""

from __future__ import annotations

import asyncio
import signal
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest
import redis
import redis.exceptions

from laps.client import AsyncClient
from laps.client.retry import NO_RETRY
from laps.errors import LapsError, NotFound, PermissionDenied, Reason, ResourceExhausted
from laps.ports import free_ports
from laps.security.keys import NewKey, new_key
from laps.security.tls import TlsFiles
from laps.settings import Settings
from laps.stack import Stack
from scheduler_svc.store.server import LocalServer, redis_binary
from tests.certificates import GATEWAY, HERE, WORKER, Authority
from tests.stack.conftest import MAY_BE_FROZEN, patient_command, until_running

pytestmark = [pytest.mark.stack, pytest.mark.timeout(400)]

ROOT = Path(__file__).resolve().parents[2]
PASSWORD = "development-only"
MARKER = "marzipan_zeppelin"
"""In every prompt: no log may have it."""


@dataclass
class SecureStore:
    server: LocalServer
    tls_port: int
    files: TlsFiles

    def url(self, user: str) -> str:
        return f"rediss://{user}:{PASSWORD}@localhost:{self.tls_port}/0"

    def connect(self, user: str, files: TlsFiles | None = None) -> redis.Redis:
        files = files or self.files
        return redis.Redis.from_url(
            self.url(user),
            decode_responses=True,
            ssl_ca_certs=files.authorities,
            ssl_certfile=files.certificate or None,
            ssl_keyfile=files.key or None,
        )


@pytest.fixture
def authority() -> Authority:
    return Authority()


@pytest.fixture
def store(tmp_path: Path, authority: Authority) -> Iterator[SecureStore]:
    """A Redis that only speaks TLS to who has a certificate, with the users that deploy/ gives it."""
    binary = redis_binary()
    if binary is None:
        pytest.skip("no redis-server on PATH; the built-in Valkey has no TLS")
    files = authority.write(tmp_path / "store-tls", *HERE)
    (tls_port,) = free_ports(1)
    settings = {
        "tls-port": str(tls_port),
        "tls-cert-file": files.certificate,
        "tls-key-file": files.key,
        "tls-ca-cert-file": files.authorities,
        "tls-auth-clients": "yes",
        "aclfile": str(ROOT / "deploy/docker/users.acl"),
    }
    with LocalServer(binary=binary, data_dir=tmp_path / "store", settings=settings) as server:
        yield SecureStore(server, tls_port, files)


@dataclass
class Keys:
    acme: NewKey
    other: NewKey
    operator: NewKey
    path: Path


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    acme, other, operator = new_key("acme"), new_key("other"), new_key(role="operator")
    path = tmp_path / "keys.toml"
    quota = "tenants.other = { max_queued_requests = 1 }"
    path.write_text("\n".join([quota, acme.line, other.line, operator.line]))
    return Keys(acme, other, operator, path)


@pytest.fixture
def settings(tmp_path: Path, authority: Authority, store: SecureStore, keys: Keys) -> Settings:
    # One certificate for all: in a cluster each service has its own.
    files = authority.write(tmp_path / "tls", *HERE, GATEWAY, WORKER)
    return Settings(
        data_dir=tmp_path / "data",
        redis_url=store.url("laps"),
        workers=1,
        slots=2,
        drain_s=2.0,
        tls_cert=files.certificate,
        tls_key=files.key,
        tls_ca=files.authorities,
        api_keys_file=str(keys.path),
        log_level="debug",
        **MAY_BE_FROZEN,
    )


def read(path: str) -> str:
    return Path(path).read_text()


def trusting(settings: Settings) -> TlsFiles:
    return TlsFiles("", "", settings.tls_ca)


def client_of(stack: Stack, key: NewKey | None) -> AsyncClient:
    files = trusting(stack.settings)
    return AsyncClient(stack.gateway_address, tls=files, api_key=key.key if key else "")


async def test_everything_on(
    settings: Settings, keys: Keys, authority: Authority, store: SecureStore, tmp_path: Path
) -> None:
    async with Stack(settings, any_ports=True, command=patient_command) as stack:
        async with client_of(stack, keys.acme) as acme, client_of(stack, keys.other) as other:
            await rotation_during_a_stream(stack, acme, authority, tmp_path)
            await tenants_keep_to_themselves(acme, other)
            await a_quota_is_the_whole_pools(stack, other)
            await operators_alone_see_the_queue(stack, keys, acme)
            await by_http(stack, keys)
            async with AsyncClient(stack.gateway_address, api_key=keys.acme.key, retry=NO_RETRY) as clear:
                with pytest.raises(LapsError) as caught:
                    await clear.models()
                assert caught.value.reason is not Reason.UNAUTHENTICATED, "the key was not even sent"
        logs = "".join(path.read_text() for path in stack.log_dir.iterdir())
    store_is_for_the_scheduler_alone(store)
    assert "certificate replaced" in logs
    assert "call refused" in logs
    assert "acme:" in logs, "requests are in the logs, by their ids"
    secrets = [part for key in (keys.acme, keys.other, keys.operator) for part in (key.key, key.key[-43:])]
    private = read(settings.tls_key).splitlines()[1]
    for what in (MARKER, PASSWORD, private, *secrets):
        assert what not in logs


async def rotation_during_a_stream(
    stack: Stack, acme: AsyncClient, authority: Authority, tmp_path: Path
) -> None:
    """A new authority and new certificates for all, while a request runs; then the links are opened anew."""
    worker = stack.children["worker-0"]
    worker.signal(signal.SIGSTOP)
    stream = acme.stream(f"{MARKER} = ", max_tokens=600, ignore_eos=True, request_id="long")
    reading = asyncio.create_task(stream.finish())
    await until_running(acme, "long")
    successor = Authority()
    both = authority.pem + successor.pem
    successor.write(tmp_path / "tls", *HERE, GATEWAY, WORKER, trusted=both)
    shown = await asyncio.to_thread(shown_certificate, stack.port, both)
    assert shown == read(stack.settings.tls_cert)
    pid = worker.pid
    worker.signal(signal.SIGKILL)
    completion = await reading
    assert completion.usage.completion_tokens == 600
    assert worker.pid != pid
    async with client_of(stack, None) as nobody:
        with pytest.raises(LapsError) as caught:
            await nobody.models()
    assert caught.value.reason is Reason.UNAUTHENTICATED


def shown_certificate(port: int, trusted: bytes) -> str:
    """What the gateway shows a client that comes now."""
    import socket

    context = ssl.create_default_context(cadata=trusted.decode())
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", port)) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        shown = connection.getpeercert(binary_form=True)
    assert shown is not None
    return ssl.DER_cert_to_PEM_cert(shown)


async def tenants_keep_to_themselves(acme: AsyncClient, other: AsyncClient) -> None:
    assert (await acme.get("long")).request.state == "finished"
    for attempt in (other.get, other.cancel, lambda request_id: other.resume(request_id).finish()):
        with pytest.raises(NotFound, match="there is no request 'long'"):
            await attempt("long")
    mine = await other.generate(f"{MARKER}", max_tokens=2, request_id="long")
    assert mine.usage.completion_tokens <= 2


async def a_quota_is_the_whole_pools(stack: Stack, other: AsyncClient) -> None:
    stack.children["worker-0"].signal(signal.SIGSTOP)
    first = other.stream(MARKER, max_tokens=1000, ignore_eos=True, request_id="first")
    reading = asyncio.create_task(first.finish())
    await until_running(other, "first")
    with pytest.raises(ResourceExhausted) as caught:
        await other.generate(MARKER, max_tokens=2)
    assert caught.value.reason is Reason.TENANT_QUEUE_FULL
    assert caught.value.retry_after_s
    await other.cancel("first")
    stack.children["worker-0"].signal(signal.SIGCONT)
    await reading
    await other.generate(MARKER, max_tokens=2)


async def operators_alone_see_the_queue(stack: Stack, keys: Keys, acme: AsyncClient) -> None:
    with pytest.raises(PermissionDenied):
        await acme.queues()
    async with client_of(stack, keys.operator) as operator:
        assert (await operator.workers())[0].worker_id == "worker-0"
        assert (await operator.get("acme:long")).request.state == "finished"


async def by_http(stack: Stack, keys: Keys) -> None:
    context = await asyncio.to_thread(ssl.create_default_context, cafile=stack.settings.tls_ca)
    assert stack.http_url.startswith("https://")
    body = {"model": "tiny", "prompt": MARKER, "max_tokens": 2}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as session:
        for key, status in ((keys.acme.key, 200), ("laps_wrong", 401), ("", 401)):
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            async with session.post(f"{stack.http_url}/completions", json=body, headers=headers) as answer:
                assert answer.status == status
                assert ("choices" if status == 200 else "error") in await answer.json()


def store_is_for_the_scheduler_alone(store: SecureStore) -> None:
    """All of the above was done by the user `laps`; what it did not need it may not do."""
    laps = store.connect("laps")
    assert laps.hget("laps:{default}:meta", "commit_seq")
    for command in (
        ["FLUSHALL"],
        ["FLUSHDB"],
        ["KEYS", "*"],
        ["CONFIG", "SET", "appendonly", "no"],
        ["FUNCTION", "FLUSH"],
        ["FUNCTION", "DELETE", "laps"],
        ["EVAL", "return 1", "0"],
        ["SHUTDOWN"],
        ["ACL", "LIST"],
        ["SET", "another", "x"],
        ["GET", "another"],
        ["REPLICAOF", "elsewhere", "6379"],
        ["MONITOR"],
    ):
        with pytest.raises(redis.exceptions.NoPermissionError):
            laps.execute_command(*command)
    operator = store.connect("operator")
    assert operator.hget("laps:{default}:meta", "commit_seq")
    for command in (
        ["DEL", "laps:{default}:meta"],
        ["HSET", "laps:{default}:meta", "policy", "x"],
        ["FLUSHALL"],
    ):
        with pytest.raises(redis.exceptions.NoPermissionError):
            operator.execute_command(*command)
    # Without a certificate, and without a password, nobody gets in.
    with pytest.raises((redis.exceptions.ConnectionError, OSError)):
        store.connect("laps", TlsFiles("", "", store.files.authorities)).ping()
    with pytest.raises(redis.exceptions.AuthenticationError):
        store.connect("default").ping()
    with redis.Redis(port=store.server.port) as clear, pytest.raises(redis.exceptions.AuthenticationError):
        clear.ping()


async def test_a_store_by_tls_that_is_not_the_one_is_refused(
    settings: Settings, store: SecureStore, tmp_path: Path
) -> None:
    from scheduler_svc.main import store_tls
    from scheduler_svc.store.errors import StoreUnavailable
    from scheduler_svc.store.store import Store

    foreign = Authority().write(tmp_path / "foreign", *HERE)
    options = store_tls(settings, TlsFiles.of_service(settings))
    wrong = options | {"ssl_ca_certs": foreign.authorities}
    connection = Store(settings.redis_url, "p", **wrong)
    with pytest.raises(StoreUnavailable) as caught:
        await connection.connect()
    assert PASSWORD not in str(caught.value)
    await connection.close()
    # The same one goes on when its files are replaced by good ones.
    good = Store(settings.redis_url, "p", **options)
    await good.connect()
    await good.close()
