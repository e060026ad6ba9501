"""kill -9 of each process in the middle of a burst: every request ends once, with the same output."""

from __future__ import annotations

import asyncio
import signal

import pytest

from laps.client import AsyncClient
from laps.client.results import Completion
from laps.client.retry import RetryPolicy
from tests.stack import reference
from tests.stack.conftest import StartStack

pytestmark = [pytest.mark.stack, pytest.mark.timeout(400), pytest.mark.xdist_group("faults")]

REQUESTS = 16
MAX_TOKENS = 48
PATIENT = RetryPolicy(connect_attempts=60, resume_attempts=60, max_backoff_s=1.0)


async def wait_for_tokens(client: AsyncClient, tokens: int) -> None:
    """Until the burst is well under way."""
    async for snapshot in client.watch(interval_s=0.05):
        if sum(request.output_tokens for request in snapshot.running) >= tokens:
            return


@pytest.mark.parametrize("victim", ["scheduler", "worker-0", "gateway", "store"])
async def test_kill_in_the_middle_of_a_burst(
    start_stack: StartStack, prompts: list[str], victim: str
) -> None:
    encoded = [reference.encode(text, 200) for text in prompts[:REQUESTS]]
    async with start_stack(workers=2, slots=3, retry=PATIENT) as (stack, client):
        burst = asyncio.gather(*(one(client, n, ids) for n, ids in enumerate(encoded)))
        await asyncio.wait_for(wait_for_tokens(client, 10), 60)
        child = stack.children[victim]
        starts = child.starts
        child.signal(signal.SIGKILL)
        served = await asyncio.wait_for(burst, 240)
        details = [await client.get(one.request_id, include_output=True) for one in served]
        assert child.starts > starts
    expected = await asyncio.to_thread(lambda: [reference.greedy(ids, MAX_TOKENS) for ids in encoded])
    assert [list(one.token_ids) for one in served] == expected
    assert {one.finish_reason for one in served} <= {"stop", "length"}
    assert [list(detail.token_ids) for detail in details] == expected


async def one(client: AsyncClient, number: int, ids: list[int]) -> Completion:
    return await client.generate(ids, max_tokens=MAX_TOKENS, request_id=f"burst-{number}")


async def test_frozen_scheduler_is_noticed_and_its_work_goes_on(
    start_stack: StartStack, prompts: list[str]
) -> None:
    """SIGSTOP for longer than its claim lasts, then SIGCONT: nothing is told twice."""
    settings = {"workers": 1, "slots": 2, "leader_ttl_s": 1.0, "session_timeout_s": 2.0}
    async with start_stack(**settings, retry=PATIENT) as (stack, client):
        ids = reference.encode(prompts[0], 200)
        running = asyncio.ensure_future(client.generate(ids, max_tokens=MAX_TOKENS))
        await asyncio.wait_for(wait_for_tokens(client, 1), 60)
        scheduler = stack.children["scheduler"]
        scheduler.signal(signal.SIGSTOP)
        # Longer than its claim on the leadership and than the worker's patience.
        await asyncio.sleep(3.0)
        scheduler.signal(signal.SIGCONT)
        completion = await asyncio.wait_for(running, 120)
    assert list(completion.token_ids) == await asyncio.to_thread(reference.greedy, ids, MAX_TOKENS)
