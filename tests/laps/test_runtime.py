from __future__ import annotations

import asyncio
import fcntl
import gc
import os
import signal
import socket
import subprocess
import sys
import termios
import weakref
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from gateway.metrics import Metrics as GatewayMetrics
from laps import channels, runtime
from scheduler_svc import metrics as scheduler_metrics
from tests.servers import listening


def service(
    log: list[str], then: Callable[[runtime.Lifetime], None]
) -> Callable[[runtime.Lifetime], Awaitable[runtime.Stop]]:
    async def start(lifetime: runtime.Lifetime) -> runtime.Stop:
        log.append("started")
        then(lifetime)

        async def stop(drain_s: float) -> None:
            log.append(f"stopped within {drain_s:g}")

        return stop

    return start


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_stops_the_service_in_good_order(number: signal.Signals) -> None:
    log: list[str] = []
    start = service(log, lambda _: os.kill(os.getpid(), number))
    assert await runtime.run_until_signalled(start, 3) == 0
    assert log == ["started", "stopped within 3"]


async def test_a_service_may_end_itself() -> None:
    log: list[str] = []
    start = service(log, lambda lifetime: lifetime.end(4, "enough"))
    assert await runtime.run_until_signalled(start, 1) == 4


async def test_a_failed_task_ends_the_service() -> None:
    async def fail() -> None:
        raise ValueError("broken")

    log: list[str] = []
    start = service(log, lambda lifetime: lifetime.watch(asyncio.create_task(fail())))
    assert await runtime.run_until_signalled(start, 1) == runtime.EXIT_FAILED
    assert log == ["started", "stopped within 1"]


async def test_a_failed_task_ends_the_service_although_that_cannot_be_logged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class NoLog:
        def info(self, *_: object, **__: object) -> None: ...
        def error(self, *_: object, **__: object) -> None:
            raise OSError("no space left on device")

    async def fail() -> None:
        raise ValueError("broken")

    monkeypatch.setattr(runtime, "get_logger", NoLog)
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    start = service([], lambda lifetime: lifetime.watch(asyncio.create_task(fail())))
    async with asyncio.timeout(5):
        assert await runtime.run_until_signalled(start, 1) == runtime.EXIT_FAILED


async def test_a_signal_cancels_the_start() -> None:
    async def start(lifetime: runtime.Lifetime) -> runtime.Stop:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.Event().wait()
        raise AssertionError

    assert await runtime.run_until_signalled(start, 1) == 0


async def test_a_failed_start_is_the_callers() -> None:
    async def start(lifetime: runtime.Lifetime) -> runtime.Stop:
        raise OSError("port in use")

    with pytest.raises(OSError, match="port in use"):
        await runtime.run_until_signalled(start, 1)


async def test_a_stop_that_hangs_is_abandoned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_STOP_MARGIN_S", 0.01)

    async def start(lifetime: runtime.Lifetime) -> runtime.Stop:
        lifetime.end()

        async def stop(drain_s: float) -> None:
            await asyncio.Event().wait()

        return stop

    assert await runtime.run_until_signalled(start, 0) == 0


async def test_a_second_signal_ends_the_process_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    ended = asyncio.Event()

    def end(code: int) -> None:
        codes.append(code)
        ended.set()

    monkeypatch.setattr(os, "_exit", end)

    async def start(lifetime: runtime.Lifetime) -> runtime.Stop:
        os.kill(os.getpid(), signal.SIGTERM)

        async def stop(drain_s: float) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            await ended.wait()

        return stop

    async with asyncio.timeout(60):
        await runtime.run_until_signalled(start, 50)
    assert codes == [128 + signal.SIGINT]


ENDS_WITH_ITS_TERMINAL = """
import asyncio, pathlib, sys
from laps import logs, runtime

async def start(lifetime):
    print("started", flush=True)
    async def stop(drain_s):
        while not pathlib.Path(sys.argv[1] + ".twice").exists():
            await asyncio.sleep(0.01)
        print("stopping")
        pathlib.Path(sys.argv[1]).write_text("in good order")
    return stop

logs.configure_logging("gateway", pool="default", level="info")
sys.exit(runtime.run(runtime.run_until_signalled(start, 5)))
"""


@pytest.mark.parametrize("ignored", [False, True], ids=["", "nohup"])
def test_a_closed_terminal_stops_the_service_in_good_order(ignored: bool, tmp_path: Path) -> None:
    told = tmp_path / "told"
    terminal, its_end = os.openpty()

    def take_terminal() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        # The tests themselves may run under nohup.
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)

    process = subprocess.Popen(
        [sys.executable, "-c", ENDS_WITH_ITS_TERMINAL, str(told)],
        stdin=its_end,
        stdout=its_end,
        stderr=its_end,
        preexec_fn=take_terminal,
    )
    os.close(its_end)
    printed = b""
    while b"started\r\n" not in printed:
        printed += os.read(terminal, 1000)
    os.close(terminal)
    if ignored:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.kill()
        process.wait()
        return
    # The kernel and a shell tell it one after the other.
    process.send_signal(signal.SIGHUP)
    told.with_name("told.twice").touch()
    assert process.wait(60) == 0
    assert told.read_text() == "in good order"


async def test_health_is_not_serving_until_said() -> None:
    server = channels.new_server()
    readiness = await runtime.add_readiness(server, "laps.v1.InferenceService")
    async with listening(server) as port, channels.open_channel(f"127.0.0.1:{port}") as channel:
        assert not await runtime.is_ready(channel)
        await readiness.set(True)
        assert await runtime.is_ready(channel)
        assert await runtime.is_ready(channel, "laps.v1.InferenceService")
        assert not await runtime.is_ready(channel, "another")
        await readiness.set(False)
        assert not await runtime.is_ready(channel)


async def test_a_taken_port_is_one_clear_error() -> None:
    first, second = channels.new_server(), channels.new_server()
    async with listening(first) as port:
        with pytest.raises(OSError, match=rf"cannot listen on 127\.0\.0\.1:{port}: the port is in use"):
            channels.bind(second, "127.0.0.1", port)


def test_a_taken_metrics_port_is_one_clear_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        where = rf"metrics_port: cannot listen on 127\.0\.0\.1:{port}: the port is in use"
        with pytest.raises(OSError, match=where):
            GatewayMetrics().listen("127.0.0.1", port)
        with pytest.raises(OSError, match=where):
            scheduler_metrics.listen(
                "127.0.0.1",
                port,
                "default",
                lambda: None,
                lambda: True,
                scheduler_metrics.Refusals("default"),
            )


class Knot:
    """In a cycle with itself."""

    def __init__(self) -> None:
        self.itself = self


def test_the_collector_leaves_many_loaded_objects_alone_until_they_are_dropped(monkeypatch):
    monkeypatch.setattr(runtime, "_MANY_OBJECTS", 1000)
    loaded = runtime.LoadedObjects()
    with loaded.loading():
        assert not gc.isenabled()
        knots = [Knot() for _ in range(2000)]
    assert gc.isenabled()
    left = weakref.ref(knots[0])
    del knots
    gc.collect()
    assert left() is not None
    loaded.dropped()
    assert left() is None


def test_of_few_loaded_objects_the_collector_goes_on_to_take_care():
    frozen = gc.get_freeze_count()
    with runtime.LoadedObjects().loading():
        Knot()
    assert gc.get_freeze_count() == frozen


def test_however_many_objects_stay_the_collector_looks_at_few_at_once():
    thresholds, enabled = gc.get_threshold(), gc.isenabled()
    looked_at = []

    def seen(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            young = range(info["generation"] + 1)
            looked_at.append(sum(len(gc.get_objects(generation)) for generation in young))

    runtime.spare_collector()
    gc.enable()
    gc.callbacks.append(seen)
    try:
        stay = [[] for _ in range(200_000)]
    finally:
        gc.callbacks.remove(seen)
        gc.set_threshold(*thresholds)
        gc.unfreeze()
        if not enabled:
            gc.disable()
    assert len(stay) == 200_000
    assert len(looked_at) > 10
    assert max(looked_at) < 30_000
