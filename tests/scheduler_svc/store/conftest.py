"""Real servers for the store's tests: one of each kind per test process, a fresh pool per test."""

from __future__ import annotations

import struct
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import redis
from redis.asyncio import Redis

from scheduler_svc.core.records import Commit, Request, RequestSpec
from scheduler_svc.store import keys
from scheduler_svc.store.inspector import Inspector
from scheduler_svc.store.server import LocalServer, redis_binary, valkey_binary
from scheduler_svc.store.store import Store

NOW_S = 1_700_000_000.25


def binary_of(kind: str) -> str:
    binary = valkey_binary() if kind == "valkey" else redis_binary()
    if binary is None:
        pytest.skip("no redis-server on PATH")
    return binary


@pytest.fixture(scope="session", params=["valkey", "redis"])
def binary(request: pytest.FixtureRequest) -> str:
    return binary_of(request.param)


@pytest.fixture(scope="session")
def server(binary: str) -> Iterator[LocalServer]:
    with LocalServer(binary=binary, appendfsync=None) as running:
        yield running


@pytest.fixture
def pool() -> str:
    return f"t-{uuid.uuid4().hex[:12]}"


@pytest.fixture
async def store(server: LocalServer, pool: str) -> AsyncIterator[Store]:
    """Connected, not leading."""
    store = Store(server.url, pool)
    await store.connect()
    await store.load_functions()
    yield store
    await store.close()


@pytest.fixture
async def leading(store: Store) -> Store:
    assert await store.lead("holder-1", "127.0.0.1:1", 60.0) is not None
    return store


@pytest.fixture
async def other(server: LocalServer, pool: str) -> AsyncIterator[Store]:
    """Another scheduler of the same pool."""
    store = Store(server.url, pool)
    yield store
    await store.close()


@pytest.fixture
def inspector(store: Store) -> Inspector:
    return Inspector(store.reader, store.pool)


@pytest.fixture
async def raw(server: LocalServer) -> AsyncIterator[Redis]:
    """What an operator's redis-cli would see."""
    client = Redis.from_url(server.url, decode_responses=True, encoding_errors="surrogateescape", protocol=2)
    yield client
    await client.aclose()


@pytest.fixture
def apply() -> Callable[..., Any]:
    """Packs and commits."""

    async def apply(store: Store, now_s: float = NOW_S, **parts: Any) -> bool:
        return await store.commit(store.encode(Commit(**parts), now_s))

    return apply


@pytest.fixture
def tokens() -> Callable[..., bytes]:
    """Packs token ids."""

    def tokens(*ids: int) -> bytes:
        return struct.pack(f"<{len(ids)}I", *ids)

    return tokens


@pytest.fixture
def make_request() -> Callable[..., Request]:
    def make_request(number: int = 1, **changes: Any) -> Request:
        spec = {
            "request_id": f"req-{number}",
            "prompt": struct.pack("<3I", 1, 2, 70000 + number),
            "max_tokens": 64,
            "params_json": '{"sampling":{"temperature":0.5}}',
            "digest": f"{number:064x}",
        }
        for name in [name for name in changes if name in RequestSpec.__dataclass_fields__]:
            if name != "predicted_output_tokens":
                spec[name] = changes.pop(name)
        return Request(RequestSpec(**spec), arrival_s=NOW_S + number, arrival_seq=number, **changes)

    return make_request


@pytest.fixture
def dump(server: LocalServer) -> Callable[[str], dict[str, Any]]:
    """Everything that a pool has in the store, for comparing."""

    def dump(pool: str) -> dict[str, Any]:
        with redis.Redis.from_url(
            server.url, decode_responses=True, encoding_errors="surrogateescape", protocol=2
        ) as client:
            return dump_pool(client, pool)

    return dump


def dump_pool(client: redis.Redis, pool: str) -> dict[str, Any]:
    read = {
        "string": client.get,
        "hash": client.hgetall,
        "zset": lambda key: client.zrange(key, 0, -1, withscores=True),
        "stream": client.xrange,
    }
    prefix = keys.prefix(pool)
    found: dict[str, Any] = {}
    for key in client.scan_iter(match=prefix.replace("[", "\\[") + "*", count=1000):
        found[key.removeprefix(prefix)] = read[client.type(key)](key)
    return found
