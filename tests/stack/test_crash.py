"""kill -9 of each process in the middle of a burst: every request ends once, with the same output."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from laps.client import AsyncClient
from laps.client.results import Completion
from tests.stack import reference
from tests.stack.conftest import PATIENT, SharedStack, StartStack, patient_stack

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]

REQUESTS = 16
MAX_TOKENS = 48


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def stack_and_client(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[SharedStack]:
    """One for all victims: each of them is started again."""
    async with patient_stack(tmp_path_factory.mktemp("crash"), workers=2, slots=3) as both:
        yield both


@pytest.fixture(scope="module")
def encoded(prompts: list[str]) -> list[list[int]]:
    return [reference.encode(text, 200) for text in prompts[:REQUESTS]]


@pytest.fixture(scope="module")
def expected(encoded: list[list[int]]) -> list[list[int]]:
    return [reference.greedy(ids, MAX_TOKENS) for ids in encoded]


@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.parametrize("victim", ["scheduler", "worker-0", "gateway", "store"])
async def test_kill_in_the_middle_of_a_burst(
    stack_and_client: SharedStack, encoded: list[list[int]], expected: list[list[int]], victim: str
) -> None:
    """One worker is frozen until then: the burst cannot be over before, however slow this process is."""
    stack, client = stack_and_client
    await stack.wait_ready()
    stack.children["worker-1"].signal(signal.SIGSTOP)
    under_way = asyncio.Event()
    burst = asyncio.gather(
        *(one(client, f"{victim}-{number}", ids, under_way) for number, ids in enumerate(encoded))
    )
    await asyncio.wait_for(under_way.wait(), 120)
    child = stack.children[victim]
    starts = child.starts
    child.signal(signal.SIGKILL)
    stack.children["worker-1"].signal(signal.SIGCONT)
    served = await asyncio.wait_for(burst, 240)
    async with asyncio.timeout(120):
        while child.starts == starts:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    details = [await client.get(one.request_id, include_output=True) for one in served]
    assert [list(one.token_ids) for one in served] == expected
    assert {one.finish_reason for one in served} <= {"stop", "length"}
    assert [list(detail.token_ids) for detail in details] == expected


async def one(client: AsyncClient, request_id: str, ids: list[int], begun: asyncio.Event) -> Completion:
    stream = client.stream(ids, max_tokens=MAX_TOKENS, request_id=request_id)
    async for _ in stream:
        begun.set()
    return stream.result


async def test_frozen_scheduler_is_noticed_and_its_work_goes_on(
    start_stack: StartStack, encoded: list[list[int]], expected: list[list[int]]
) -> None:
    """SIGSTOP for longer than its claim lasts, then SIGCONT: nothing is told twice."""
    settings = {"workers": 1, "slots": 2, "leader_ttl_s": 1.0, "session_timeout_s": 2.0}
    async with start_stack(**settings, retry=PATIENT) as (stack, client):
        begun = asyncio.Event()
        running = asyncio.ensure_future(one(client, "frozen", encoded[0], begun))
        await asyncio.wait_for(begun.wait(), 120)
        scheduler = stack.children["scheduler"]
        scheduler.signal(signal.SIGSTOP)
        # The worker's patience is longer than a claim on the leadership lasts.
        log = stack.children["worker-0"].log_path
        async with asyncio.timeout(120):
            while "no session, trying again" not in log.read_text():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        scheduler.signal(signal.SIGCONT)
        completion = await asyncio.wait_for(running, 120)
    assert list(completion.token_ids) == expected[0]
