"""A store whose memory is used up: new requests are refused with a hint, accepted ones end well."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import redis

from laps.client import AsyncClient
from laps.client.retry import NO_RETRY
from laps.errors import Reason, ResourceExhausted
from laps.settings import Settings
from laps.stack import Stack
from scheduler_svc.store.server import LocalServer

pytestmark = [pytest.mark.stack, pytest.mark.timeout(300), pytest.mark.xdist_group("faults")]


async def test_nothing_new_is_accepted_and_what_was_accepted_goes_on(tmp_path: Path) -> None:
    with LocalServer(data_dir=tmp_path / "store") as server:
        settings = Settings(data_dir=tmp_path / "data", redis_url=server.url, workers=1, slots=2, drain_s=2.0)
        async with (
            Stack(settings, any_ports=True) as stack,
            AsyncClient(stack.gateway_address, retry=NO_RETRY) as client,
        ):
            running = client.stream("x = ", max_tokens=300, ignore_eos=True, request_id="running")
            await anext(running)
            store = redis.Redis.from_url(server.url)
            bound = int(store.info("memory")["used_memory"] / 0.9)
            store.config_set("maxmemory", bound)
            async with asyncio.timeout(30):
                while True:
                    try:
                        await client.generate("y = ", max_tokens=1)
                    except ResourceExhausted as error:
                        refused = error
                        break
            assert refused.reason is Reason.STORE_FULL
            assert refused.retry_after_s
            assert (await running.finish()).usage.completion_tokens == 300
            store.config_set("maxmemory", 0)
            async with asyncio.timeout(30):
                while True:
                    try:
                        await client.generate("z = ", max_tokens=1)
                        break
                    except ResourceExhausted:
                        continue
