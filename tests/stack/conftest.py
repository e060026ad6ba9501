"""Whole stacks for the tests: real processes, a real store, the built-in models."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from laps.client import AsyncClient
from laps.client.retry import RetryPolicy
from laps.errors import NotFound
from laps.settings import BUILT_IN_TARGET, Settings
from laps.stack import Stack, service_command

ROOT = Path(__file__).resolve().parents[2]
PATIENT = RetryPolicy(connect_attempts=80, resume_attempts=80, max_backoff_s=1.0)
MAY_BE_FROZEN: dict[str, Any] = {"session_timeout_s": 200.0, "lease_duration_s": 400.0}
"""Settings of a stack whose workers are frozen for as long as a test takes to look."""
_PATIENT_PROCESS = """
import sys
from laps import channels
channels.PING_TIMEOUT_MS = 200_000
from laps.cli import main
sys.exit(main(sys.argv[1:]))
"""
SharedStack = tuple[Stack, AsyncClient]
StartStack = Callable[..., AbstractAsyncContextManager[tuple[Stack, AsyncClient]]]


def patient_command(role: str) -> list[str]:
    """A service to which a peer is not gone that answers no ping, because it is frozen."""
    return [sys.executable, "-c", _PATIENT_PROCESS, role]


async def until_held(client: AsyncClient, requests: int, running: int = 0) -> None:
    """Until there are so many requests, at least so many of them in slots. Frozen workers keep it so."""
    while True:
        states = [request.state for request in await client.requests()]
        if len(states) == requests and states.count("running") >= running:
            return
        await asyncio.sleep(0.02)


async def until_running(client: AsyncClient, request_id: str) -> None:
    async with asyncio.timeout(120):
        while True:
            with suppress(NotFound):
                if (await client.get(request_id)).request.state == "running":
                    return
            await asyncio.sleep(0.02)


@pytest.fixture
def start_stack(tmp_path: Path) -> StartStack:
    """`async with start_stack(slots=2) as (stack, client)`: settings as keywords. `patient`: nobody is taken
    for lost who is frozen."""
    number = 0

    @asynccontextmanager
    async def start(
        retry: RetryPolicy | None = None, patient: bool = False, **settings: Any
    ) -> AsyncIterator[tuple[Stack, AsyncClient]]:
        nonlocal number
        number += 1
        settings |= MAY_BE_FROZEN if patient else {}
        chosen = Settings(data_dir=tmp_path / f"stack-{number}", **{"drain_s": 2.0} | settings)
        stack = Stack(chosen, any_ports=True, command=patient_command if patient else service_command)
        async with stack, AsyncClient(stack.gateway_address, retry=retry) as client:
            yield stack, client

    return start


@asynccontextmanager
async def patient_stack(folder: Path, **settings: Any) -> AsyncIterator[SharedStack]:
    """Nobody in it is taken for lost who is frozen, and the client bears with everything."""
    chosen = Settings(data_dir=folder, drain_s=2.0, **settings, **MAY_BE_FROZEN)
    stack = Stack(chosen, any_ports=True, command=patient_command)
    async with stack, AsyncClient(stack.gateway_address, retry=PATIENT) as client:
        yield stack, client


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def shared_stack(
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[tuple[Stack, AsyncClient]]:
    """One stack for all tests that leave it as they found it: a worker with four slots."""
    settings = Settings(data_dir=tmp_path_factory.mktemp("shared"), workers=1, slots=4, drain_s=2.0)
    async with Stack(settings, any_ports=True) as stack, AsyncClient(stack.gateway_address) as client:
        yield stack, client


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    """The texts among the built-in prompts."""
    lines = (Path(BUILT_IN_TARGET).parent / "prompts.jsonl").read_text().splitlines()
    return [record["text"] for record in map(json.loads, lines) if "text" in record]


@pytest.fixture(scope="session")
def specbench_prompts() -> list[str]:
    """The first 40 questions of Spec-Bench, which are data and not part of the project."""
    import gzip

    folder = Path(os.environ.get("LAPS_TEST_DATA", ROOT.parent / "shared" / "data"))
    path = folder / "prompts_specbench_question.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"no Spec-Bench questions at {path}; set LAPS_TEST_DATA to a folder that has them")
    with gzip.open(path, "rt") as lines:
        return [json.loads(line)["turns"][0] for line, _ in zip(lines, range(40), strict=False)]
