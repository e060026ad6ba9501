"""The console's view of the pool: one watch, however many look."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine
from typing import Any

import grpc.aio

from gateway.http.console import pictures
from gateway.http.console.figures import WINDOW_S, Figures
from gateway.http.errors import to_json
from gateway.scheduler_link import Backoff, SchedulerLink
from laps.errors import LapsError, Reason, ResourceExhausted, from_rpc_error
from laps.logs import get_logger
from laps.v1 import queue_pb2

INTERVAL_S = 0.5
"""Between two pictures."""
LINGER_S = 300.0
"""The watch goes on for so long after the last viewer has left, so that the curves have a past."""
QUIET_S = 2.0
"""So long after the last change the figures are made anew."""
FINISHED_PAGE = 1000
FINISHED_SHOWN = 50
OVERLAP_S = 2.0
"""Finished requests are asked for again this far back: clocks of two leaders may differ."""
WINDOW_ROWS = 50
"""Windows of a level begin at multiples of it, so that viewers share them."""
FRESH_S = 0.5
"""What was read is shown for so long, to all who look at it."""
MAX_ANSWERS = 256
MAX_VIEWERS = 100

_Key = tuple[int, int] | str
"""A level and an offset, or a request's id."""

log = get_logger()


class Viewer:
    """One who looks. He gets the newest picture: one that he did not take in time is replaced."""

    def __init__(self) -> None:
        self._picture: bytes | None = None
        self._there = asyncio.Event()

    def show(self, picture: bytes) -> None:
        self._picture = picture
        self._there.set()

    async def take(self) -> bytes:
        await self._there.wait()
        self._there.clear()
        assert self._picture is not None
        return self._picture


class Feed:
    """Watches while somebody looks. `close` it."""

    def __init__(self, link: SchedulerLink, *, linger_s: float = LINGER_S) -> None:
        self.watches = 0
        """Watch streams opened so far."""
        self.reads = 0
        """Windows and timelines read from the store so far."""
        self._link = link
        self._linger_s = linger_s
        self._viewers: set[Viewer] = set()
        self._task: asyncio.Task[None] | None = None
        self._stopping: asyncio.TimerHandle | None = None
        self._latest: bytes | None = None
        self._problem = ""
        self._figures = Figures()
        self._finished: deque[pictures.Json] = deque(maxlen=FINISHED_SHOWN)
        self._told: OrderedDict[str, float] = OrderedDict()
        """Finished requests that are counted already, with the instant of their end."""
        self._picture_s = 0.0
        """When the newest picture came."""
        self._answers: OrderedDict[_Key, tuple[float, asyncio.Task[bytes]]] = OrderedDict()
        """What was read last, with the instant of asking."""

    def join(self) -> Viewer:
        """Raises ResourceExhausted when there are as many viewers as there may be."""
        if len(self._viewers) >= MAX_VIEWERS:
            raise ResourceExhausted(
                f"the console has {MAX_VIEWERS} viewers, as many as it may; come back later",
                reason=Reason.STREAMS_FULL,
                retry_after_s=5.0,
                quota_subject="viewers",
            )
        viewer = Viewer()
        self._viewers.add(viewer)
        if self._stopping is not None:
            self._stopping.cancel()
            self._stopping = None
        if self._problem:
            viewer.show(to_json({"problem": self._problem}))
        elif self._latest is not None:
            viewer.show(self._latest)
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="console feed")
        return viewer

    def leave(self, viewer: Viewer) -> None:
        self._viewers.discard(viewer)
        if not self._viewers and self._task is not None and self._stopping is None:
            self._stopping = asyncio.get_running_loop().call_later(self._linger_s, self._rest)

    async def close(self) -> None:
        if self._stopping is not None:
            self._stopping.cancel()
        tasks = [task for _, task in self._answers.values()] + ([self._task] if self._task else [])
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def window(self, level: int, offset: int) -> bytes:
        """`WINDOW_ROWS` waiting requests of a level in running order, as JSON, from `offset` on (a multiple).
        Read once for all who ask within `FRESH_S`. Raises a LapsError."""
        return await self._shared((level, offset), lambda: self._read_window(level, offset))

    async def timeline(self, request_id: str) -> bytes:
        """A request's life as JSON, read once for all who ask within `FRESH_S`. Raises a LapsError."""
        return await self._shared(request_id, lambda: self._read_timeline(request_id))

    def forget(self, request_id: str) -> None:
        """What was read of a request no longer holds: somebody has just changed it."""
        self._answers.pop(request_id, None)

    async def _shared(self, key: _Key, read: Callable[[], Coroutine[Any, Any, bytes]]) -> bytes:
        now_s = time.monotonic()
        known = self._answers.get(key)
        # A page asks because it was shown a new picture. What was begun to be read before that picture came
        # may be older than it, and where nothing more happens the page would never ask again.
        older = known is not None and known[0] < self._picture_s
        if known is None or older or (known[1].done() and now_s - known[0] > FRESH_S):
            self.reads += 1
            reading = asyncio.create_task(read())
            # Those who asked may all have left when it fails.
            reading.add_done_callback(lambda task: task.cancelled() or task.exception())
            known = (now_s, reading)
            self._answers[key] = known
            self._answers.move_to_end(key)
            while len(self._answers) > MAX_ANSWERS:
                self._answers.popitem(last=False)
        # Shielded: one who leaves takes nothing from the others.
        return await asyncio.shield(known[1])

    async def _read_timeline(self, request_id: str) -> bytes:
        request = queue_pb2.GetTimelineRequest(request_id=request_id)
        return to_json(pictures.timeline(await self._link.query("GetTimeline", request)))

    async def _read_window(self, level: int, offset: int) -> bytes:
        request = queue_pb2.ListQueuesRequest(head_limit=WINDOW_ROWS, head_offset=offset, level=level)
        answer: queue_pb2.ListQueuesResponse = await self._link.query("ListQueues", request)
        queues = answer.pools[0]
        head = next((each.head for each in queues.levels if each.level == level), ())
        levels = [[each.level, each.waiting] for each in queues.levels]
        rows = [pictures.request(info) for info in head]
        return to_json({"commit_seq": queues.commit_seq, "level": level, "offset": offset,
                        "levels": levels, "rows": rows})  # fmt: skip

    def _rest(self) -> None:
        self._stopping = None
        if self._task is not None:
            self._task.cancel()
            self._task = None
            # What was known is old by the time that somebody looks again.
            self._latest, self._figures = None, Figures()
            self._finished.clear()
            self._told.clear()

    async def _run(self) -> None:
        backoff = Backoff()
        while True:
            try:
                await self._watch(backoff)
                self._problem = "the view of the queue was lost"
            except grpc.aio.AioRpcError as error:
                self._problem = from_rpc_error(error).message
            except LapsError as error:
                self._problem = error.message
            except (asyncio.CancelledError, grpc.aio.UsageError):
                if (task := asyncio.current_task()) is not None and task.cancelling():
                    raise
                self._problem = "the connection to the scheduler was replaced"
            except Exception as error:
                log.error("console feed failed", exc_info=error)
                self._problem = "the gateway has a defect; its log has the details"
            self._show(to_json({"problem": self._problem}))
            await asyncio.sleep(backoff.next_s())

    async def _watch(self, backoff: Backoff) -> None:
        request = queue_pb2.WatchRequest()
        request.interval.FromMilliseconds(int(INTERVAL_S * 1e3))
        self.watches += 1
        stream = self._link.watch(request)
        reading = asyncio.ensure_future(stream.read())
        picture: queue_pb2.WatchResponse | None = None
        came_s = 0.0
        try:
            while True:
                done, _ = await asyncio.wait({reading}, timeout=QUIET_S)
                if done:
                    picture, came_s = reading.result(), time.monotonic()
                    self._picture_s = came_s
                    if picture is grpc.aio.EOF:  # type: ignore[attr-defined]
                        return
                    reading = asyncio.ensure_future(stream.read())
                    backoff.reset()
                if picture is not None:
                    # Without a change there is no new picture, but the curves go on.
                    await self._look(picture, picture.time_s + time.monotonic() - came_s)
        finally:
            stream.cancel()
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _look(self, picture: queue_pb2.WatchResponse, now_s: float) -> None:
        self._figures.observe(now_s, sum(pool.waiting for pool in picture.pools), picture.running)
        await self._read_finished(now_s)
        self._problem = ""
        self._latest = to_json(
            {
                "time_s": now_s,
                "pools": [pictures.pool(pool) for pool in picture.pools],
                "workers": [pictures.worker(worker) for worker in picture.workers],
                "running": [pictures.request(info) for info in picture.running],
                "finished": list(self._finished),
                "figures": self._figures.summary(now_s),
            }
        )
        self._show(self._latest)

    async def _read_finished(self, now_s: float) -> None:
        after_s = max(self._told.values(), default=now_s - WINDOW_S) - OVERLAP_S
        request = queue_pb2.ListRequestsRequest(
            states=[queue_pb2.REQUEST_STATE_FINISHED], page_size=FINISHED_PAGE, finished_after_s=after_s
        )
        while True:
            page: queue_pb2.ListRequestsResponse = await self._link.query("ListRequests", request)
            new = [info for info in page.requests if info.request_id not in self._told]
            self._figures.ended(now_s, new)
            for info in new:
                self._told[info.request_id] = info.finished_s
                self._finished.appendleft(pictures.request(info))
            if not page.next_page_token:
                break
            request.page_token = page.next_page_token
        newest_s = max(self._told.values(), default=0.0)
        while self._told and next(iter(self._told.values())) < newest_s - 2 * OVERLAP_S:
            self._told.popitem(last=False)

    def _show(self, picture: bytes) -> None:
        for viewer in self._viewers:
            viewer.show(picture)
