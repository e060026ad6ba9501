"""kill -9 of each process in the middle of a burst: every request ends once, with the same output."""

from __future__ import annotations

import asyncio
import signal

import pytest

from laps.client import AsyncClient
from laps.client.results import Completion
from tests.stack import reference
from tests.stack.conftest import PATIENT, StartStack

pytestmark = [pytest.mark.stack, pytest.mark.timeout(400), pytest.mark.xdist_group("faults")]

REQUESTS = 16
MAX_TOKENS = 48


@pytest.mark.parametrize("victim", ["scheduler", "worker-0", "gateway", "store"])
async def test_kill_in_the_middle_of_a_burst(
    start_stack: StartStack, prompts: list[str], victim: str
) -> None:
    """One worker is frozen until then: the burst cannot be over before, however slow this process is."""
    encoded = [reference.encode(text, 200) for text in prompts[:REQUESTS]]
    async with start_stack(workers=2, slots=3, retry=PATIENT, patient=True) as (stack, client):
        stack.children["worker-1"].signal(signal.SIGSTOP)
        under_way = asyncio.Event()
        burst = asyncio.gather(*(one(client, n, ids, under_way) for n, ids in enumerate(encoded)))
        await asyncio.wait_for(under_way.wait(), 60)
        child = stack.children[victim]
        starts = child.starts
        child.signal(signal.SIGKILL)
        stack.children["worker-1"].signal(signal.SIGCONT)
        served = await asyncio.wait_for(burst, 240)
        details = [await client.get(one.request_id, include_output=True) for one in served]
        async with asyncio.timeout(60):
            while child.starts == starts:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
    expected = await asyncio.to_thread(lambda: [reference.greedy(ids, MAX_TOKENS) for ids in encoded])
    assert [list(one.token_ids) for one in served] == expected
    assert {one.finish_reason for one in served} <= {"stop", "length"}
    assert [list(detail.token_ids) for detail in details] == expected


async def one(client: AsyncClient, number: int, ids: list[int], begun: asyncio.Event) -> Completion:
    stream = client.stream(ids, max_tokens=MAX_TOKENS, request_id=f"burst-{number}")
    async for _ in stream:
        begun.set()
    return stream.result


async def test_frozen_scheduler_is_noticed_and_its_work_goes_on(
    start_stack: StartStack, prompts: list[str]
) -> None:
    """SIGSTOP for longer than its claim lasts, then SIGCONT: nothing is told twice."""
    settings = {"workers": 1, "slots": 2, "leader_ttl_s": 1.0, "session_timeout_s": 2.0}
    async with start_stack(**settings, retry=PATIENT) as (stack, client):
        ids = reference.encode(prompts[0], 200)
        begun = asyncio.Event()
        running = asyncio.ensure_future(one(client, 0, ids, begun))
        await asyncio.wait_for(begun.wait(), 60)
        scheduler = stack.children["scheduler"]
        scheduler.signal(signal.SIGSTOP)
        # The worker's patience is longer than a claim on the leadership lasts.
        log = stack.children["worker-0"].log_path
        async with asyncio.timeout(60):
            while "no session, trying again" not in log.read_text():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        scheduler.signal(signal.SIGCONT)
        completion = await asyncio.wait_for(running, 120)
    assert list(completion.token_ids) == await asyncio.to_thread(reference.greedy, ids, MAX_TOKENS)
