"""A store whose memory is used up, and one that is away: new requests are refused with a hint, accepted ones
end well."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import redis

from laps.client import AsyncClient
from laps.client.retry import NO_RETRY
from laps.errors import LapsError, Reason, ResourceExhausted, Unavailable
from laps.settings import Settings
from laps.stack import Stack
from scheduler_svc.store.server import LocalServer

pytestmark = [pytest.mark.stack, pytest.mark.timeout(400)]


async def test_nothing_new_is_accepted_and_what_was_accepted_goes_on(tmp_path: Path) -> None:
    with LocalServer(data_dir=tmp_path / "store") as server:
        settings = Settings(data_dir=tmp_path / "data", redis_url=server.url, workers=1, slots=2, drain_s=2.0)
        async with (
            Stack(settings, any_ports=True) as stack,
            AsyncClient(stack.gateway_address, retry=NO_RETRY) as client,
            AsyncClient(stack.gateway_address) as patient,
        ):
            await a_full_store(server, client)
            await a_store_that_is_away(server, client, patient)


async def a_full_store(server: LocalServer, client: AsyncClient) -> None:
    running = client.stream("x = ", max_tokens=300, ignore_eos=True, request_id="running")
    await anext(running)
    store = redis.Redis.from_url(server.url)
    store.config_set("maxmemory", int(store.info("memory")["used_memory"] / 0.9))
    refused = await refusal(client)
    assert isinstance(refused, ResourceExhausted)
    assert refused.reason is Reason.STORE_FULL
    assert refused.retry_after_s
    assert (await running.finish()).usage.completion_tokens == 300
    store.config_set("maxmemory", 0)
    await accepted(client)


async def a_store_that_is_away(server: LocalServer, client: AsyncClient, patient: AsyncClient) -> None:
    running = patient.stream("x = ", max_tokens=600, ignore_eos=True, request_id="waits")
    await anext(running)
    server.kill()
    refused = await refusal(client)
    assert isinstance(refused, Unavailable)
    assert refused.retry_after_s
    server.start()
    assert (await running.finish()).usage.completion_tokens == 600
    await accepted(client)


async def refusal(client: AsyncClient) -> LapsError:
    async with asyncio.timeout(120):
        while True:
            try:
                await client.generate("y = ", max_tokens=1)
                # At full speed they use up the room that is left before the scheduler looks at it again.
                await asyncio.sleep(0.05)
            except LapsError as error:
                return error


async def accepted(client: AsyncClient) -> None:
    async with asyncio.timeout(120):
        while True:
            try:
                await client.generate("z = ", max_tokens=1)
                break
            except (ResourceExhausted, Unavailable):
                # As often as it is told, it may come again.
                await asyncio.sleep(0.05)
