"""Two of everything: leaders that die, freeze and are stopped in order, and a store that comes back older."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from bench._fleet import GATEWAYS, SCHEDULERS, Fleet
from laps import channels, runtime
from laps.client import AsyncClient
from laps.client.results import Completion
from laps.client.retry import NO_RETRY
from laps.errors import LapsError, Reason
from tests.stack import reference
from tests.stack.conftest import PATIENT

pytestmark = [
    pytest.mark.stack,
    pytest.mark.timeout(600),
    pytest.mark.asyncio(loop_scope="session"),
]

LONG = 1200
"""Tokens: far more than are made between the first one's coming and the fault after it."""
GONE_S = 90.0
"""Far more than the fleet's processes are given, as this machine may be busy."""
LED_S = 90.0
"""The same. What is promised, and what was measured, is in docs/reliability.md."""


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def one_fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    # With so much credit the worker ends the request while its leader is away, which must cost no KV either.
    fleet = Fleet(tmp_path_factory.mktemp("fleet") / "fleet", workers=1, slots=2, step_credit=256)
    try:
        await fleet.start()
        yield fleet
    finally:
        await fleet.close()


@pytest_asyncio.fixture(loop_scope="session")
async def fleet(one_fleet: Fleet) -> Fleet:
    """Whole again, whatever was done to it before."""
    for name in one_fleet.names:
        if not one_fleet.runs(name):
            one_fleet.start_again(name)
        one_fleet.thaw(name)
    async with AsyncClient(one_fleet.gateway_addresses[0], retry=PATIENT) as client:
        await asyncio.wait_for(client.generate("x", max_tokens=1), 240)
    return one_fleet


class Stream:
    """A request of which some has come."""

    def __init__(self, client: AsyncClient, request_id: str) -> None:
        self._stream = client.stream(PROMPT, max_tokens=LONG, ignore_eos=True, request_id=request_id)

    async def begin(self) -> Stream:
        async for chunk in self._stream:
            if chunk.token_ids:
                return self
        raise AssertionError("ended at once")

    async def more(self) -> None:
        """Until the next token; nothing where all have come, as to one who was slow to read."""
        await anext(self._stream, None)

    async def finish(self) -> Completion:
        return await asyncio.wait_for(self._stream.finish(), 240)


PROMPT = reference.encode("def fibonacci(n):\n", 60)


async def expected() -> list[int]:
    def generate() -> list[int]:
        import torch

        model, tokenizer = reference.target()
        with torch.inference_mode():
            made = model.generate(
                torch.tensor([PROMPT]),
                do_sample=False,
                min_new_tokens=8,
                max_new_tokens=8,
                pad_token_id=tokenizer.eos_token_id,
            )
        return made[0, len(PROMPT) :].tolist()

    return await asyncio.to_thread(generate)


async def test_a_standby_takes_over_and_no_kv_cache_is_lost(fleet: Fleet) -> None:
    """First the leader is frozen and wakes up when it has been succeeded, then the next one dies."""
    async with AsyncClient(fleet.gateway_addresses[0], retry=PATIENT) as client:
        epoch, first = await fleet.leader()
        stream = await Stream(client, "long").begin()
        fleet.freeze(first)
        frozen_s = await fleet.until_led_anew(epoch, LED_S)
        await stream.more()
        fleet.thaw(first)
        epoch, second = await fleet.leader()
        assert second != first
        fleet.kill(second)
        dead_s = await fleet.until_led_anew(epoch, LED_S)
        made = await stream.finish()
        again = await client.generate(PROMPT, max_tokens=8, ignore_eos=True)
    assert len(made.token_ids) == LONG
    assert list(again.token_ids) == list(made.token_ids[:8]) == await expected()
    assert frozen_s is not None
    assert dead_s is not None
    begun = [one for one in fleet.processes["worker-0"].logged("lease begins") if one["request_id"] == "long"]
    assert len(begun) >= 2
    assert [one["kv_kept"] for one in begun] == [False, *[True] * (len(begun) - 1)]
    # The one that was frozen has not written since: the log has no alarm, and it lost its leadership.
    assert fleet.processes[first].logged("leadership lost")
    assert not any(fleet.processes[name].logged("pool stopped") for name in SCHEDULERS)


async def test_whoever_is_stopped_in_order_hands_over_and_is_gone_in_time(fleet: Fleet) -> None:
    async with AsyncClient(fleet.gateway_addresses[0], retry=PATIENT) as client:
        epoch, leader = await fleet.leader()
        stream = await Stream(client, "handed-over").begin()
        # Resigning is quicker than any expiry.
        assert await stopped(fleet, leader) == 0
        assert await fleet.until_led_anew(epoch, LED_S) is not None
        await stream.more()
        assert await stopped(fleet, GATEWAYS[0]) == 0
        await stream.more()
        assert await stopped(fleet, "worker-0") == 0
        fleet.start_again("worker-0")
        made = await stream.finish()
    assert len(made.token_ids) == LONG
    assert list(made.token_ids[:8]) == await expected()


async def stopped(fleet: Fleet, name: str) -> int:
    """SIGTERM; its health says so before it is gone. Returns the exit code."""
    process = fleet.processes[name]
    port = next(int(value) for key, value in process._env.items() if key.endswith("_PORT") and value != "0")
    not_serving = asyncio.create_task(until_not_serving(port))
    code = await asyncio.to_thread(process.terminate, GONE_S)
    await asyncio.wait_for(not_serving, GONE_S)
    return code


async def until_not_serving(port: int) -> None:
    async with channels.open_channel(f"127.0.0.1:{port}") as channel:
        while await runtime.is_ready(channel):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_a_store_that_comes_back_older_stops_the_pool_until_an_operator_resumes_it(
    fleet: Fleet, tmp_path: Path
) -> None:
    """Every scheduler dies in the same moment: what is missing only gateways and the worker know."""
    older = tmp_path / "older"
    async with AsyncClient(fleet.gateway_addresses[0], retry=PATIENT) as client:
        await client.generate("x = ", max_tokens=4, request_id="kept")
        fleet.store.freeze()
        shutil.copytree(fleet.store.data_dir, older)
        fleet.store.thaw()
        await client.generate("y = ", max_tokens=4, request_id="lost")
        for name in SCHEDULERS:
            fleet.kill(name)
        fleet.store.kill()
        shutil.rmtree(fleet.store.data_dir)
        shutil.copytree(older, fleet.store.data_dir)
        fleet.store.start()
        for name in SCHEDULERS:
            fleet.start_again(name)
        await until(lambda: pool(fleet, "status", "--json")["stopped"])
        state = pool(fleet, "status", "--json")
        assert state["stopped"]["reason"].startswith("HISTORY_WENT_BACK")
        assert state["stopped"]["seen"]["commit_seq"] > 0
        commits = state["stored"]["commit_seq"]
        # Started anew it stays stopped, and says so.
        fleet.kill(SCHEDULERS[0])
        fleet.start_again(SCHEDULERS[0])
        await until(
            lambda: fleet.processes[SCHEDULERS[0]].logged("pool is stopped until an operator resumes it")
        )
        with pytest.raises(LapsError) as refused:
            async with AsyncClient(fleet.gateway_addresses[0], retry=NO_RETRY) as impatient:
                await impatient.generate("z = ", max_tokens=4)
        assert refused.value.status == "UNAVAILABLE"
        assert refused.value.reason in (Reason.POOL_STOPPED, Reason.SCHEDULER_UNREACHABLE)
        assert pool(fleet, "status", "--json")["stored"]["commit_seq"] == commits
        pool(fleet, "resume", "--yes")
        made = await asyncio.wait_for(client.generate("z = ", max_tokens=4), 150)
        assert made.finish_reason in ("length", "stop")
        assert (await client.get("kept")).request.state == "finished"
    assert pool(fleet, "status", "--json")["stored"]["timeline"] == 2


def pool(fleet: Fleet, *arguments: str) -> Any:
    """`laps pool ...`"""
    command = [sys.executable, "-m", "laps.cli", "pool", *arguments, "--redis-url", fleet.store.url]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout) if "--json" in arguments else done.stdout


async def until(condition: Any, timeout_s: float = 120.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not await asyncio.to_thread(condition):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
