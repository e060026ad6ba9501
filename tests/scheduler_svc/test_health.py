"""Two schedulers of one pool: what their health says, and how a caller finds the one that leads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from laps import channels, runtime
from laps.settings import Settings
from laps.v1 import scheduler_pb2, scheduler_pb2_grpc
from scheduler_svc import main, metrics
from scheduler_svc.core.records import Recovered
from scheduler_svc.store.server import LocalServer
from scheduler_svc.store.store import Store

TERM_S = 6.0
"""Long enough that nobody is late on a busy machine; one who resigns is succeeded within a sixth of it."""


@pytest.fixture
def store() -> LocalServer:
    return LocalServer(appendfsync=None)


@asynccontextmanager
async def scheduler(
    url: str, name: str, term_s: float = TERM_S, lifetime: runtime.Lifetime | None = None
) -> AsyncIterator[main.SchedulerServer]:
    settings = Settings(redis_url=url, scheduler_port=0, scheduler_id=name, leader_ttl_s=term_s)
    running = await main.serve(settings, lifetime or runtime.Lifetime())
    try:
        yield running
    finally:
        await running.stop(0.1)


async def until(condition: Callable[[], Awaitable[bool]], timeout_s: float = 60.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not await condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def health(running: main.SchedulerServer) -> tuple[bool, bool, bool]:
    """(alive, ready, serving)"""
    async with channels.open_channel(f"127.0.0.1:{running.port}") as channel:
        names = (runtime.ALIVE, runtime.READY, main.SERVICES[0])
        alive, ready, serving = [await runtime.is_ready(channel, each) for each in names]
        return alive, ready, serving


async def says(running: main.SchedulerServer, *expected: bool) -> None:
    async def same() -> bool:
        return await health(running) == expected

    await until(same)


async def test_a_standby_is_ready_and_does_not_serve(store: LocalServer) -> None:
    with store:
        async with scheduler(store.url, "one") as leader:
            await says(leader, True, True, True)
            async with scheduler(store.url, "two") as standby:
                await says(standby, True, True, False)
        async with scheduler(store.url, "three") as alone:
            await says(alone, True, True, True)
            store.stop()
            # It leads still, for whoever waits for the store with it.
            await says(alone, True, False, True)


async def test_a_dead_store_is_told_to_prometheus_without_any_traffic() -> None:
    def gauges(running: main.SchedulerServer) -> tuple[float, float]:
        """(leads, store down)"""
        terms = running.terms
        collector = metrics.SchedulerCollector(
            "default", lambda: terms.leader, lambda: terms.store_answers, metrics.Refusals("default")
        )
        values = {family.name: family.samples[0].value for family in collector.collect() if family.samples}
        return values["laps_scheduler_leads"], values["laps_store_down"]

    async def tells(running: main.SchedulerServer, *expected: float) -> None:
        async def same() -> bool:
            return gauges(running) == expected

        await until(same)

    async def led(*running: main.SchedulerServer) -> bool:
        return any(each.terms.leader is not None for each in running)

    with LocalServer() as store:
        async with (
            scheduler(store.url, "one") as leader,
            scheduler(store.url, "two") as standby,
        ):
            await until(lambda: led(leader, standby))
            if standby.terms.leader is not None:
                leader, standby = standby, leader
            await tells(leader, 1.0, 0.0)
            await tells(standby, 0.0, 0.0)
            store.kill()
            await tells(leader, 1.0, 1.0)
            await tells(standby, 0.0, 1.0)
            async with scheduler(store.url, "three") as started_meanwhile:
                assert gauges(started_meanwhile) == (0.0, 1.0)
                store.start()
                for running in (leader, standby, started_meanwhile):

                    async def answered(running: main.SchedulerServer = running) -> bool:
                        return gauges(running)[1] == 0.0

                    await until(answered)


@pytest.mark.parametrize(
    ("task", "name"), [("_watch_readiness", "readiness"), ("_watch_memory", "store memory")]
)
async def test_a_scheduler_without_one_of_its_tasks_ends(
    store: LocalServer, monkeypatch: pytest.MonkeyPatch, task: str, name: str
) -> None:
    async def broken(*_: object) -> None:
        raise ValueError("broken")

    monkeypatch.setattr(main, task, broken)
    lifetime = runtime.Lifetime()
    with store:
        async with scheduler(store.url, "one", lifetime=lifetime), asyncio.timeout(60):
            await lifetime.wait()
    assert (lifetime.exit_code, lifetime.because) == (1, f"task {name} failed")


async def test_calls_find_the_one_that_leads(store: LocalServer) -> None:
    with store:
        async with scheduler(store.url, "one") as first, scheduler(store.url, "two") as second:

            async def one_leads() -> bool:
                return (first.terms.leader is None) != (second.terms.leader is None)

            await until(one_leads)
            address = f"ipv4:127.0.0.1:{first.port},127.0.0.1:{second.port}"
            async with channels.open_channel(address, serving=main.SERVICES[0]) as channel:
                stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
                request = scheduler_pb2.DescribePoolRequest()
                epochs = {(await stub.DescribePool(request, timeout=60)).epoch for _ in range(20)}
                assert len(epochs) == 1
                await (first if first.terms.leader else second).stop(0.1)

                async def answered() -> bool:
                    try:
                        epochs.add((await stub.DescribePool(request, timeout=60)).epoch)
                    except main.grpc.RpcError:
                        return False
                    return True

                await until(answered)
                assert len(epochs) == 2, "the standby, by the same channel"


async def test_a_recovery_may_take_longer_than_a_leadership_lasts(
    store: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    term_s, recover = 2.0, Store.recover

    async def long_queue(self: Store) -> Recovered:
        await asyncio.sleep(2 * term_s)
        return await recover(self)

    async def led() -> bool:
        return first.terms.leader is not None or second.terms.leader is not None

    monkeypatch.setattr(Store, "recover", long_queue)
    with store:
        async with (
            scheduler(store.url, "one", term_s) as first,
            scheduler(store.url, "two", term_s) as second,
        ):
            await until(led)
            leader = first.terms.leader or second.terms.leader
            # The other one has waited all the time.
            assert leader is not None
            assert leader.epoch == 1
