"""What a worker's health says: one whose engine hangs is not alive, one without a scheduler is."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace

import pytest

from laps import channels, runtime
from laps.settings import Settings
from tests.servers import listening
from worker_svc import main


class BrokenDriver:
    def __init__(self, *_: object) -> None: ...
    def start(self) -> None: ...
    def stop(self, timeout_s: float) -> None: ...
    def wait_idle(self, timeout_s: float) -> None: ...

    @property
    def last_progress_s(self) -> float:
        raise ValueError("broken")


class NoLink:
    def __init__(self, *_: object, **__: object) -> None: ...
    def drain(self) -> None: ...

    async def run(self) -> None:
        await asyncio.Event().wait()


async def test_a_worker_that_cannot_say_how_it_is_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "EngineDriver", BrokenDriver)
    monkeypatch.setattr(main, "WorkerLink", NoLink)
    lifetime = runtime.Lifetime()
    running = await main.serve(Settings(), SimpleNamespace(), lifetime)  # type: ignore[arg-type]
    async with asyncio.timeout(60):
        await lifetime.wait()
    await running.stop(0.0)
    assert (lifetime.exit_code, lifetime.because) == (1, "task health failed")


async def test_an_engine_that_hangs_is_not_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "HEALTH_INTERVAL_S", 0.001)
    driver = SimpleNamespace(last_progress_s=time.monotonic())
    link = SimpleNamespace(connected=False)
    server = channels.new_server()
    readiness = await runtime.add_readiness(server)
    watching = asyncio.create_task(main._watch_health(driver, link, readiness))  # type: ignore[arg-type]
    async with listening(server) as port, channels.open_channel(f"127.0.0.1:{port}") as channel:

        async def says(alive: bool, ready: bool) -> None:
            async with asyncio.timeout(60):
                while (  # noqa: ASYNC110
                    await runtime.is_ready(channel, runtime.ALIVE),
                    await runtime.is_ready(channel, runtime.READY),
                ) != (alive, ready):
                    await asyncio.sleep(0.005)

        await says(alive=True, ready=False)
        link.connected = True
        await says(alive=True, ready=True)
        driver.last_progress_s -= main.STALLED_S + 1
        await says(alive=False, ready=False)
        driver.last_progress_s = time.monotonic()
        await says(alive=True, ready=True)
    watching.cancel()
