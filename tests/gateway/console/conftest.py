"""A gateway with its console over a pool that the test moves, and a real browser to look at it."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

from browser import find_chromium, open_browser
from fake_pool import FakePool
from small_model import make_model_folder

from gateway.main import Gateway, serve
from laps.ports import free_ports
from laps.runtime import Lifetime
from laps.settings import Settings


class Console:
    """`url` is where the page is; `pool` is what it shows."""

    def __init__(self, gateway: Gateway, pool: FakePool, port: int) -> None:
        self.gateway = gateway
        self.pool = pool
        self.port = port
        self.url = f"http://127.0.0.1:{port}/console"
        self._stopped = False

    async def stop(self) -> None:
        if not self._stopped:
            self._stopped = True
            await self.gateway.stop(0.0)
            await self.pool.stop()

    @property
    def feed(self) -> Any:
        return self.gateway._http._console.feed  # type: ignore[union-attr]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model"))


@pytest_asyncio.fixture(loop_scope="session")
async def start_console(model_folder: Path) -> AsyncIterator[Callable[..., Any]]:
    """`await start_console(waiting=400, console_allow_cancel=True)`."""
    running: list[Console] = []

    async def start(waiting: int = 40, **changes: Any) -> Console:
        pool = FakePool()
        pool.fill(waiting)
        await pool.start()
        (port,) = free_ports(1)
        given: dict[str, Any] = {
            "target": str(model_folder),
            "port": 0,
            "http_port": port,
            "scheduler_address": f"127.0.0.1:{pool.port}",
            "drain_s": 0.5,
        }
        gateway = await serve(Settings(**(given | changes)), Lifetime())
        running.append(Console(gateway, pool, port))
        return running[-1]

    yield start
    for console in running:
        await console.stop()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser() -> AsyncIterator[Any]:
    path = find_chromium()
    if path is None:
        pytest.skip("no chromium on PATH: install Debian's chromium, or set LAPS_CHROMIUM to one")
    async with open_browser(path) as browser:
        yield browser


@pytest.fixture(scope="session")
def axe() -> str:
    """axe-core's script."""
    import axe_playwright_python

    return (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Where screenshots go: a folder of the test's own, or LAPS_SCREENSHOTS."""
    folder = Path(os.environ.get("LAPS_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
