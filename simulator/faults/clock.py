"""A virtual clock with an event queue, and processes on it that can freeze and crash.

The loop is asyncio's contract in its smallest form, so that the services' own coroutines run on it unchanged.
Every callback belongs to the process in whose context it was scheduled: those of a frozen process wait
until it wakes, those of a crashed one are dropped, wherever in its code it was.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

EPOCH_S = 1_700_000_000.0
"""The virtual clock's zero on everybody's calendar."""

_process: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)


class Process:
    """Something that can freeze and crash as a whole."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.frozen = False
        self.frozen_s = 0.0
        """Since when."""
        self.wall_offset_s = 0.0
        """What its calendar is ahead of everybody else's."""
        self.parked: deque[asyncio.Handle] = deque()
        self.context = contextvars.copy_context()
        self.context.run(_process.set, self)


def current_process() -> Process | None:
    return _process.get()


class VirtualLoop(asyncio.AbstractEventLoop):
    """Runs what is due in order of time, and what is due at one time in order of scheduling."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.events = 0
        self.errors: list[str] = []
        """Exceptions that nobody caught."""
        self._ready: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, int, asyncio.Handle]] = []
        self._scheduled = 0
        self._tasks: dict[asyncio.Task[Any], None] = {}
        self._graves: dict[Process, None] = {}
        """Crashed processes with callbacks that never ran."""

    # --- What asyncio asks of a loop ----------------------------------------------------------

    def time(self) -> float:
        return self.now_s

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> asyncio.Handle:  # type: ignore[override]
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_soon_threadsafe(self, callback: Any, *args: Any, context: Any = None) -> asyncio.Handle:  # type: ignore[override]
        return self.call_soon(callback, *args, context=context)

    def call_later(self, delay: float, callback: Any, *args: Any, context: Any = None) -> asyncio.TimerHandle:  # type: ignore[override]
        return self.call_at(self.now_s + delay, callback, *args, context=context)

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> asyncio.TimerHandle:  # type: ignore[override]
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self._scheduled += 1
        heapq.heappush(self._timers, (when, self._scheduled, handle))
        return handle

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, *, name: str | None = None, context: Any = None) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=self, name=name, context=context)
        self._tasks[task] = None
        task.add_done_callback(self._tasks.pop)
        return task

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        """Calls at once; a function that would block in its thread returns a future instead."""
        result = func(*args)
        if isinstance(result, asyncio.Future):
            return result
        done = self.create_future()
        done.set_result(result)
        return done

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        error = context.get("exception")
        self.errors.append(f"{context.get('message')}: {error!r}")

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Cancelled timers are skipped when their time comes."""

    # --- Processes ----------------------------------------------------------------------------

    def spawn(self, process: Process, coro: Coroutine[Any, Any, Any], name: str = "") -> asyncio.Task[Any]:
        """A task of a process."""
        return self.create_task(coro, name=name or process.name, context=process.context.copy())

    def at(self, process: Process | None, when_s: float, callback: Callable[..., Any], *args: Any) -> None:
        """Calls `callback` in a process, or (None) outside of all of them."""
        context = contextvars.Context() if process is None else process.context.copy()
        self.call_at(max(when_s, self.now_s), callback, *args, context=context)

    def freeze(self, process: Process) -> None:
        process.frozen = True
        process.frozen_s = self.now_s

    def thaw(self, process: Process) -> None:
        process.frozen = False
        self._ready.extend(process.parked)
        process.parked.clear()

    def crash(self, process: Process) -> None:
        """Nothing of it runs from here on: no cleaning up, no last message."""
        process.alive = False
        process.frozen = False

    # --- Running ------------------------------------------------------------------------------

    def run_one(self) -> bool:
        """Runs the next callback; False: nothing is left."""
        while True:
            if self._ready:
                handle = self._ready.popleft()
            elif self._timers:
                when, _, handle = heapq.heappop(self._timers)
                if handle.cancelled():
                    continue
                self.now_s = max(self.now_s, when)
            else:
                return False
            if handle.cancelled():
                continue
            process: Process | None = handle._context.get(_process)  # type: ignore[attr-defined]
            if process is not None and (process.frozen or not process.alive):
                process.parked.append(handle)
                if not process.alive:
                    self._graves[process] = None
                continue
            self.events += 1
            handle._run()
            return True

    def next_s(self) -> float | None:
        """When the next callback is due."""
        if self._ready:
            return self.now_s
        return self._timers[0][0] if self._timers else None

    def bury(self) -> None:
        """Ends every task, those of crashed processes too, so that nothing is left for the garbage
        collector to end at some later time. What they still do is seen by nobody."""
        self._timers.clear()
        for process in self._graves:
            self._ready.extend(process.parked)
        for task in list(self._tasks):
            task.cancel()
        for _ in range(100_000):
            if not self._ready:
                break
            handle = self._ready.popleft()
            if not handle.cancelled():
                handle._run()
        for task in list(self._tasks):
            task._log_destroy_pending = False  # type: ignore[attr-defined]


class VirtualTime:
    """Stands in for the `time` module; every process has a calendar of its own."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def time(self) -> float:
        process = _process.get()
        return EPOCH_S + self._loop.now_s + (0.0 if process is None else process.wall_offset_s)

    def monotonic(self) -> float:
        return 1000.0 + self._loop.now_s

    def perf_counter(self) -> float:
        return self._loop.now_s


# The rest of asyncio's contract is about sockets, files and signals, which nothing here may touch.
VirtualLoop.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]
