"""`laps up --gateways N`: several processes behind one port."""

from __future__ import annotations

import asyncio
import signal

import pytest

from laps.child import Child
from laps.client import AsyncClient
from tests.stack.conftest import StartStack

pytestmark = [pytest.mark.stack, pytest.mark.timeout(400)]

CONNECTIONS = 24
"""The kernel spreads them by a hash: that all come to one of two has a chance of 2 ** -23."""


async def test_connections_are_spread_over_all_gateways(start_stack: StartStack) -> None:
    async with start_stack(workers=0, gateways=2) as (stack, _):
        logs = [stack.settings.data_dir / "logs" / f"{name}.log" for name in ("gateway", "gateway-1")]

        async def until_both_say(words: str) -> None:
            async with asyncio.timeout(90):
                while not all(words in log.read_text() for log in logs):  # noqa: ASYNC110
                    await asyncio.sleep(0.02)

        assert all("scheduler connected" in log.read_text() for log in logs), "both are ready, not one twice"

        async def ask() -> str:
            async with AsyncClient(stack.gateway_address) as client:
                return (await client.models())[0].name

        names = await asyncio.gather(*(ask() for _ in range(CONNECTIONS)))
        assert set(names) == {stack.settings.model_name}
        await until_both_say("InferenceService.ListModels")


async def test_each_gateway_is_asked_for_its_own_health(start_stack: StartStack) -> None:
    async with start_stack(workers=0, gateways=2) as (stack, _):
        frozen, other = stack.children["gateway"], stack.children["gateway-1"]
        assert isinstance(frozen, Child)
        assert isinstance(other, Child)
        frozen.signal(signal.SIGSTOP)
        for _ in range(3):
            assert not await frozen.spec.is_ready()
            async with asyncio.timeout(90):
                while not await other.spec.is_ready():
                    pass
        frozen.signal(signal.SIGCONT)
