"""The life of a service process: start, be ready, be told to stop, finish what is begun, end."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import stat
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from laps.logs import get_logger

Stop = Callable[[float], Awaitable[None]]
"""Ends a service; the argument is the time in seconds that it may take."""

_STOP_MARGIN_S = 1.0
"""A stop that outlasts its time by this much is abandoned."""

EXIT_FAILED = 1
_GC_THRESHOLDS = (1_000, 19, 600)
"""New objects, and collections of the younger generation, after which each generation is looked at. A look
at few is short: at 5,000 new ones up to 8 ms beside other work, which has taken the caches, and at the 20,000
objects of the middle one some 25 ms. There is none at the oldest before 12 million objects more came than
went."""
_MANY_OBJECTS = 100_000
"""A look at them takes some 10 ms."""


class Lifetime:
    """What a running service uses to end itself."""

    def __init__(self) -> None:
        self._ended = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self.exit_code = 0
        self.because = ""

    def end(self, exit_code: int = 0, because: str = "") -> None:
        """Stops the service as a signal would. The first call counts."""
        if not self._ended.is_set():
            self.exit_code, self.because = exit_code, because
            self._ended.set()

    def watch(self, task: asyncio.Task[Any]) -> None:
        """A task that the service cannot be without: its failure ends the service with exit code 1."""
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # First of all: whatever becomes of the line in the log, the service ends.
            self.end(EXIT_FAILED, f"task {task.get_name()} failed")
            get_logger().error("task failed", task=task.get_name(), exc_info=error)

    async def wait(self) -> None:
        await self._ended.wait()


def run(main: Coroutine[Any, Any, int]) -> int:
    """Runs a coroutine on uvloop where it is installed."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    return uvloop.run(main)


async def run_until_signalled(start: Callable[[Lifetime], Awaitable[Stop]], drain_s: float) -> int:
    """Starts a service, waits for a signal to stop or for `Lifetime.end`, stops it; returns the exit code.

    A signal while it starts cancels the start. A second signal ends the process at once. What `start`
    raises goes to the caller.
    """
    loop = asyncio.get_running_loop()
    lifetime = Lifetime()
    starting: asyncio.Future[Stop] = asyncio.ensure_future(start(lifetime))

    def on_signal(number: signal.Signals) -> None:
        if not lifetime._ended.is_set():
            lifetime.end(0, number.name)
            starting.cancel()
        elif number != signal.SIGHUP:  # That comes twice when a terminal is closed.
            os._exit(128 + number)

    forget = on_stop_signals(loop, on_signal)
    try:
        try:
            stop = await starting
        except asyncio.CancelledError:
            if lifetime._ended.is_set():
                return lifetime.exit_code
            raise
        spare_collector()
        await lifetime.wait()
        get_logger().info("stopping", because=lifetime.because, drain_s=drain_s)
        try:
            await asyncio.wait_for(stop(drain_s), drain_s + _STOP_MARGIN_S)
        except TimeoutError:
            get_logger().warning("stop took too long, ending anyway", drain_s=drain_s)
        return lifetime.exit_code
    finally:
        forget()


def on_stop_signals(
    loop: asyncio.AbstractEventLoop, call: Callable[[signal.Signals], object]
) -> Callable[[], None]:
    """Calls for SIGTERM and SIGINT, and for SIGHUP where it is not ignored (as under nohup): the terminal is
    closed. Returns what ends that.
    """
    signals = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signals.append(signal.SIGHUP)

    def handle(number: signal.Signals) -> None:
        if number == signal.SIGHUP:
            _leave_terminal()
        call(number)

    def forget() -> None:
        for number in signals:
            loop.remove_signal_handler(number)

    for number in signals:
        loop.add_signal_handler(number, handle, number)
    return forget


def _leave_terminal() -> None:
    """What is still printed goes nowhere; to a terminal that is closed it would be an error."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        if stat.S_ISCHR(os.fstat(number).st_mode):
            os.dup2(nowhere, number)
    os.close(nowhere)


ALIVE = "laps.alive"
"""Health name: the process has started and does its work. Not serving: only a restart will help."""
READY = "laps.ready"
"""Health name: it can be counted on, as what serves or as what stands by to."""


@contextmanager
def resting_collector() -> Iterator[None]:
    """For what makes very many objects of which most stay, as imports do: to look through them again and
    again while they come takes a worker half a second to one."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def spare_collector() -> None:
    """Lets the garbage collector leave alone what exists now, and look at the rest less often: the services
    make few cycles, and with many thousands of live objects a look at all of them is a pause."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)


class LoadedObjects:
    """Objects that are made at one time, stay for long, and may be very many: the garbage collector would
    look at them all, again and again, and find nothing."""

    def __init__(self) -> None:
        self._spared = False

    @contextmanager
    def loading(self) -> Iterator[None]:
        """The collector rests. If very many were made it leaves alone what exists now, until `dropped`."""
        with resting_collector():
            try:
                yield
            finally:
                if gc.get_count()[0] >= _MANY_OBJECTS:
                    gc.freeze()
                    self._spared = True

    def dropped(self) -> None:
        """They are not used any more. If the collector left them alone it looks at all objects now, which can
        stop the process for a good part of a second."""
        if self._spared:
            self._spared = False
            gc.unfreeze()
            gc.collect()


class Readiness:
    """grpc.health.v1 of a server, under three meanings. Made by `add_readiness`.

    "" and the services' names: it serves calls now. `READY`, `ALIVE`: see there.
    """

    def __init__(self, servicer: HealthServicer, services: tuple[str, ...]) -> None:
        self._servicer = servicer
        self._services = services
        self._told: dict[str, bool] = {}

    @property
    def ready(self) -> bool:
        return self._told.get(READY, False)

    async def set(self, serving: bool) -> None:
        """Whether it serves. Where nothing stands by, that is what ready means too."""
        await self.set_serving(serving)
        await self.set_ready(serving)

    async def set_serving(self, serving: bool) -> None:
        for service in self._services:
            await self._tell(service, serving)

    async def set_ready(self, ready: bool) -> None:
        await self._tell(READY, ready)

    async def set_alive(self, alive: bool) -> None:
        await self._tell(ALIVE, alive)

    async def _tell(self, name: str, well: bool) -> None:
        if self._told.get(name) != well:
            self._told[name] = well
            response = health_pb2.HealthCheckResponse
            await self._servicer.set(name, response.SERVING if well else response.NOT_SERVING)


async def add_readiness(server: grpc.aio.Server, *services: str) -> Readiness:
    """Adds grpc.health.v1 to a server that has not started: alive as soon as it answers, and not serving
    until `set(True)`.

    `services` are full names such as "laps.v1.InferenceService".
    """
    servicer = HealthServicer()
    readiness = Readiness(servicer, ("", *services))
    # The library's servicer begins as serving.
    await readiness.set(False)
    await readiness.set_alive(True)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    return readiness


async def is_ready(channel: grpc.aio.Channel, service: str = "", timeout_s: float = 1.0) -> bool:
    """Whether the server at the other end says that it serves."""
    stub = health_pb2_grpc.HealthStub(channel)
    try:
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=timeout_s)
    except grpc.RpcError:
        return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
