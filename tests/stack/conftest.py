"""Whole stacks for the tests: real processes, a real store, the built-in models."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from laps.client import AsyncClient
from laps.client.retry import RetryPolicy
from laps.settings import BUILT_IN_TARGET, Settings
from laps.stack import Stack

ROOT = Path(__file__).resolve().parents[2]
SharedStack = tuple[Stack, AsyncClient]
StartStack = Callable[..., AbstractAsyncContextManager[tuple[Stack, AsyncClient]]]


@pytest.fixture
def start_stack(tmp_path: Path) -> StartStack:
    """`async with start_stack(slots=2) as (stack, client)`: settings as keywords."""
    number = 0

    @asynccontextmanager
    async def start(
        retry: RetryPolicy | None = None, **settings: Any
    ) -> AsyncIterator[tuple[Stack, AsyncClient]]:
        nonlocal number
        number += 1
        chosen = Settings(data_dir=tmp_path / f"stack-{number}", drain_s=2.0, **settings)
        stack = Stack(chosen, any_ports=True)
        async with stack, AsyncClient(stack.gateway_address, retry=retry) as client:
            yield stack, client

    return start


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
