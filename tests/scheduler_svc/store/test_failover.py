"""A name that leads to the primary of two servers, and an orderly change of roles: what was the primary lives
on as a replica, and ends no connection that it has."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
import redis

from bench._proxy import Link
from laps.ports import free_ports
from scheduler_svc.core.records import Commit, Request
from scheduler_svc.store import keys
from scheduler_svc.store.errors import StaleLeader, StoreBehind, StoreUnavailable
from scheduler_svc.store.server import LocalServer
from scheduler_svc.store.store import Store


@pytest.fixture
def servers(binary: str) -> Iterator[tuple[LocalServer, LocalServer]]:
    with (
        LocalServer(binary=binary, appendfsync=None) as first,
        LocalServer(binary=binary, appendfsync=None) as second,
    ):
        yield first, second


@pytest.fixture
async def name(servers: tuple[LocalServer, LocalServer]) -> AsyncIterator[Link]:
    (port,) = free_ports(1)
    name = Link(port, servers[0].port, ("stores", "primary"))
    await name.start()
    yield name
    await name.close()


async def role(client: redis.Redis, wanted: list[bytes]) -> None:
    """Waits for it: what it is, and whether its link to a primary is there."""
    async with asyncio.timeout(60):
        while [part for part in client.execute_command("ROLE") if part in wanted] != wanted:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_leader_and_its_successor_go_on_with_the_new_primary(
    servers: tuple[LocalServer, LocalServer], name: Link, make_request: Callable[..., Request]
) -> None:
    url = f"redis://127.0.0.1:{name.port}/0"
    store, standby = Store(url, "p"), Store(url, "p")
    with (
        redis.Redis(port=servers[0].port, protocol=2) as first,
        redis.Redis(port=servers[1].port, protocol=2) as second,
    ):
        second.execute_command("REPLICAOF", "127.0.0.1", servers[0].port)
        await role(second, [b"slave", b"connected"])
        await store.connect()
        await standby.connect()
        assert await store.lead("a", "a:1", 60.0)
        assert await standby.lead("b", "b:1", 60.0) is None
        assert await store.commit(store.encode(Commit(submitted=[make_request(1)]), 1.0))
        first.execute_command("FAILOVER")
        await role(first, [b"slave"])
        await role(second, [b"master"])
        # What was the primary hears no more of what is stored.
        first.execute_command("REPLICAOF", "127.0.0.1", 1)
        name.target_port = servers[1].port
        for number in (2, 3):
            encoded = store.encode(Commit(submitted=[make_request(number)]), 2.0)
            if number == 2:
                with pytest.raises(StoreUnavailable, match="replica"):
                    await store.commit(encoded)
            assert await store.commit(encoded)
        with pytest.raises(StoreUnavailable, match="replica"):
            await store.renew()
        await store.resign()
        with pytest.raises(StoreUnavailable, match="replica"):
            await standby.lead("b", "b:1", 60.0)
        assert await standby.lead("b", "b:1", 60.0)
        recovered = await standby.recover()
        assert [request.request_id for request in recovered.requests] == ["req-1", "req-2", "req-3"]
    await store.close()
    await standby.close()


async def test_only_a_server_that_knows_of_the_leadership_is_recovered_from(
    servers: tuple[LocalServer, LocalServer], make_request: Callable[..., Request]
) -> None:
    store = Store(servers[0].url, "p")
    await store.connect()
    with redis.Redis(port=servers[0].port) as client:
        leadership = await store.lead("a", "a:1", 60.0)
        assert leadership is not None
        assert await store.commit(store.encode(Commit(submitted=[make_request()]), 1.0))
        client.hset(keys.leader("p"), "epoch", leadership.epoch - 1)
        with pytest.raises(StoreBehind):
            await store.recover()
        client.hset(keys.leader("p"), "epoch", leadership.epoch + 1)
        with pytest.raises(StaleLeader):
            await store.recover()
        client.hset(keys.leader("p"), "epoch", leadership.epoch)
        opened = client.info("stats")["total_connections_received"]
        assert len((await store.recover()).requests) == 1
        assert client.info("stats")["total_connections_received"] > opened, "it asked a name anew"
    await store.close()
