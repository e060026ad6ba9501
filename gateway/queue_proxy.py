"""QueueService: questions about the queue go to the scheduler, which answers from the store."""

from __future__ import annotations

import asyncio
from typing import Any

from gateway.calls import Call, Handler, shutting_down
from gateway.scheduler_link import SchedulerLink
from gateway.streams import Limit
from gateway.validation import check_request_id
from laps.errors import InvalidArgument, Reason, Unavailable
from laps.v1 import queue_pb2

MAX_HEAD_LIMIT = 1000
MAX_PAGE_SIZE = 1000
MIN_WATCH_INTERVAL_MS = 50


class QueueProxy:
    """Watch streams count as client streams."""

    def __init__(self, link: SchedulerLink, streams: Limit) -> None:
        self._link = link
        self._streams = streams
        self._watching: set[Any] = set()
        self._draining = False

    def methods(self) -> dict[str, Handler]:
        return {
            "ListQueues": self.list_queues,
            "ListRequests": self.list_requests,
            "ListWorkers": self.list_workers,
            "GetTimeline": self.get_timeline,
            "Watch": self.watch,
        }

    async def list_queues(self, request: queue_pb2.ListQueuesRequest, call: Call) -> Any:
        _check_most("head_limit", request.head_limit, MAX_HEAD_LIMIT)
        return await self._link.query("ListQueues", request, call.deadline_s())

    async def list_requests(self, request: queue_pb2.ListRequestsRequest, call: Call) -> Any:
        _check_most("page_size", request.page_size, MAX_PAGE_SIZE)
        return await self._link.query("ListRequests", request, call.deadline_s())

    async def list_workers(self, request: queue_pb2.ListWorkersRequest, call: Call) -> Any:
        return await self._link.query("ListWorkers", request, call.deadline_s())

    async def get_timeline(self, request: queue_pb2.GetTimelineRequest, call: Call) -> Any:
        check_request_id(request.request_id, in_pool=True)
        call.fields["request_id"] = request.request_id
        return await self._link.query("GetTimeline", request, call.deadline_s())

    async def watch(self, request: queue_pb2.WatchRequest, call: Call) -> None:
        _check_most("head_limit", request.head_limit, MAX_HEAD_LIMIT)
        if (
            request.HasField("interval")
            and request.interval.ToNanoseconds() < MIN_WATCH_INTERVAL_MS * 1_000_000
        ):
            raise InvalidArgument("interval", f"must be at least {MIN_WATCH_INTERVAL_MS} ms")
        if self._draining:
            # Who comes back at once would be waited for until the time to drain is up.
            raise shutting_down()
        with self._streams:
            upstream = self._link.watch(request)
            self._watching.add(upstream)
            try:
                # One picture at a time: while this client does not take one, none is fetched for it.
                async for response in upstream:
                    await call.write(response)
            except asyncio.CancelledError:
                if (task := asyncio.current_task()) is not None and task.cancelling():
                    raise
                raise _lost() from None
            finally:
                self._watching.discard(upstream)
                upstream.cancel()
            raise _lost()

    def drop_streams(self) -> None:
        """Ends every watch, and lets none begin."""
        self._draining = True
        for upstream in tuple(self._watching):
            upstream.cancel()


def _lost() -> Unavailable:
    return Unavailable(
        "the view of the queue was lost; ask again", reason=Reason.STREAM_LOST, retry_after_s=0.1
    )


def _check_most(field: str, value: int, most: int) -> None:
    if value > most:
        raise InvalidArgument(field, f"must be at most {most}, not {value}")
