"""A real cluster of three nodes: each pool lies on one of them, and is found from any."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from typing import Any

import grpc
import pytest
import redis

from laps import channels, runtime
from laps.settings import Settings
from laps.v1 import scheduler_pb2, scheduler_pb2_grpc
from scheduler_svc import main
from scheduler_svc.core.records import Commit, Request, StepCosts, Worker, emitted_of
from scheduler_svc.store import keys
from scheduler_svc.store.errors import StoreUnavailable
from scheduler_svc.store.server import LocalServer, valkey_binary
from scheduler_svc.store.store import Store

from .conftest import dump_pool

SLOTS = 16384
NODES = 3


@pytest.fixture(scope="module")
def cluster() -> Iterator[list[LocalServer]]:
    settings = {"cluster-enabled": "yes", "cluster-node-timeout": "2000", "cluster-port": "0"}
    with ExitStack() as stack:
        nodes = [
            stack.enter_context(LocalServer(binary=valkey_binary(), appendfsync=None, settings=settings))
            for _ in range(NODES)
        ]
        clients = [stack.enter_context(redis.Redis(port=node.port, protocol=2)) for node in nodes]
        for number, client in enumerate(clients):
            first, after = SLOTS * number // NODES, SLOTS * (number + 1) // NODES
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", first, after - 1)
            client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for node in nodes[1:]:
            clients[0].execute_command("CLUSTER", "MEET", "127.0.0.1", node.port)
        asyncio.run(_until_whole(clients))
        yield nodes


async def _until_whole(clients: list[redis.Redis]) -> None:
    async with asyncio.timeout(90):
        for client in clients:
            while (  # noqa: ASYNC110
                (info := client.cluster("INFO"))["cluster_state"] != "ok"
                or info["cluster_known_nodes"] != str(NODES)
                or info["cluster_slots_ok"] != str(SLOTS)
            ):
                await asyncio.sleep(0.02)


def pool_on(nodes: list[LocalServer], wanted: int, name: str = "pool") -> str:
    """A pool's name whose keys lie on that node."""
    with redis.Redis(port=nodes[0].port, protocol=2) as client:
        for number in range(1000):
            slot = client.cluster("KEYSLOT", keys.meta(f"{name}-{number}"))
            if int(slot) * NODES // SLOTS == wanted:
                return f"{name}-{number}"
    raise AssertionError("no such pool")


@pytest.mark.parametrize("node", range(NODES))
async def test_a_pool_is_led_read_and_recovered_wherever_it_lies(
    cluster: list[LocalServer], node: int, apply: Callable[..., Any], make_request: Callable[..., Request]
) -> None:
    pool = pool_on(cluster, node)
    store, other = Store(cluster[0].url, pool), Store(cluster[1].url, pool)
    try:
        await store.connect()
        await store.load_functions()
        assert await store.lead("a", "127.0.0.1:1", 60.0) is not None
        assert await apply(store, submitted=[make_request()])
        # From another node, and with a reading call as the first one.
        found = await other.read_request("req-1")
        assert found is not None
        assert found.spec == make_request().spec
        assert await other.lead("b", "127.0.0.1:2", 60.0) is None
        assert await other.lead("a", "127.0.0.1:1", 60.0) is not None
        assert [request.request_id for request in (await other.recover()).requests] == ["req-1"]
        with redis.Redis(port=cluster[node].port, protocol=2) as client:
            assert client.exists(keys.request(pool, "req-1"))
    finally:
        await store.close()
        await other.close()


async def test_two_pools_of_one_cluster_do_not_disturb_each_other(
    cluster: list[LocalServer], apply: Callable[..., Any], make_request: Callable[..., Request]
) -> None:
    stores = [Store(cluster[2].url, f"{pool_on(cluster, node)}") for node in (0, 1)]
    try:
        for number, store in enumerate(stores):
            await store.lead("a", "127.0.0.1:1", 60.0)
            assert await apply(store, submitted=[make_request(10 + number)])
        for number, store in enumerate(stores):
            names = [request.request_id for request in (await store.recover()).requests]
            assert f"req-{10 + number}" in names
            assert f"req-{11 - number}" not in names
    finally:
        for store in stores:
            await store.close()


@asynccontextmanager
async def scheduler(url: str, pool: str, name: str) -> AsyncIterator[main.SchedulerServer]:
    settings = Settings(redis_url=url, pool=pool, scheduler_id=name, scheduler_port=0, leader_ttl_s=6.0)
    running = await main.serve(settings, runtime.Lifetime())
    try:
        await until(lambda: running.terms.ready)
        yield running
    finally:
        await running.stop(0.1)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(90):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def submit(running: main.SchedulerServer, pool: str, request_id: str) -> None:
    spec = scheduler_pb2.RequestSpec(request_id=request_id, pool=pool, prompt_token_ids=bytes(4))
    spec.stopping.max_tokens = 4
    async with channels.open_channel(f"127.0.0.1:{running.port}") as channel:
        stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
        await stub.Submit(
            scheduler_pb2.SubmitRequest(spec=spec, gateway_id="g"), timeout=60, wait_for_ready=True
        )


async def test_two_pools_on_two_schedulers_lead_fail_and_are_succeeded_each_by_itself(
    cluster: list[LocalServer],
) -> None:
    here, there = pool_on(cluster, 0, "here"), pool_on(cluster, 2, "there")
    url = cluster[1].url
    async with scheduler(url, there, "other") as other, AsyncExitStack() as life:
        first = await life.enter_async_context(scheduler(url, here, "first"))
        await until(lambda: first.terms.leader is not None and other.terms.leader is not None)
        await submit(first, here, "here-1")
        await submit(other, there, "there-1")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await submit(other, here, "here-2")
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert first.terms.leader is not None
        assert other.terms.leader is not None
        epochs = first.terms.leader.epoch, other.terms.leader.epoch
        async with scheduler(url, here, "standby") as standby:
            assert standby.terms.leader is None
            await life.aclose()
            await until(lambda: standby.terms.leader is not None)
            await submit(standby, here, "here-3")
            assert standby.terms.leader is not None
            assert standby.terms.leader.epoch > epochs[0]
            assert {"here-1", "here-3"} <= set(standby.terms.leader.core.requests)
        # The other pool has noticed nothing.
        assert other.terms.leader is not None
        assert other.terms.leader.epoch == epochs[1]
        assert set(other.terms.leader.core.requests) == {"there-1"}


async def test_while_its_keys_are_moved_one_by_one_nothing_is_half_written(
    cluster: list[LocalServer], make_request: Callable[..., Request]
) -> None:
    pool = pool_on(cluster, 0, "moving")
    store = Store(cluster[0].url, pool)
    text: dict[str, Any] = {"decode_responses": True, "encoding_errors": "surrogateescape", "protocol": 2}
    with (
        redis.Redis(port=cluster[0].port, **text) as here,
        redis.Redis(port=cluster[1].port, **text) as there,
    ):
        slot = here.cluster("KEYSLOT", keys.meta(pool))
        ids = [client.execute_command("CLUSTER", "MYID") for client in (here, there)]
        try:
            await store.connect()
            assert await store.lead("a", "127.0.0.1:1", 60.0) is not None
            output = [emitted_of([("req-1", 0, bytes(4))])]
            first = Commit(submitted=[make_request()], tick=1, logged_tick=0, emitted=output)
            assert await store.commit(store.encode(first, 1.0))
            there.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[0])
            here.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[1])
            before = dump_pool(here, pool)
            # The journal is here, and is written to before the workers, which are not.
            output = [emitted_of([("req-1", 1, bytes(4))])]
            joined = [(Worker("w", 1, StepCosts(0.001, 0.01)), 9.0)]
            second = store.encode(Commit(tick=2, logged_tick=0, emitted=output, workers=joined), 2.0)
            for _ in range(2):
                with pytest.raises(StoreUnavailable, match="moving"):
                    await store.commit(second)
            assert dump_pool(here, pool) == before
        finally:
            for client in (here, there):
                client.execute_command("CLUSTER", "SETSLOT", slot, "STABLE")
        assert await store.commit(second)
        [found] = (await store.recover()).requests
        assert found.output_tokens == 2
        await store.close()
