"""QueueService: the queue as the store has it, each answer one consistent reading.

It asks the store and not the core, so that what it shows is what redis-cli shows. It needs
no leadership: a scheduler that stands by answers as well.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from laps import errors
from laps.v1 import queue_pb2, queue_pb2_grpc
from scheduler_svc.core.records import RequestState
from scheduler_svc.store import inspector_proto
from scheduler_svc.store.errors import StoreUnavailable
from scheduler_svc.store.inspector import HEAD_LIMIT, PAGE_LIMIT, BadPageToken, Inspector, Snapshot

WATCH_INTERVAL_S = 0.5
WATCH_INTERVAL_LEAST_S = 0.05

Context = grpc.aio.ServicerContext[Any, Any]

STATES = {number: state for state, number in inspector_proto.STATES.items()}


class QueueService(queue_pb2_grpc.QueueServiceServicer):
    def __init__(self, inspector: Inspector) -> None:
        self._inspector = inspector

    async def ListQueues(
        self, request: queue_pb2.ListQueuesRequest, context: Context
    ) -> queue_pb2.ListQueuesResponse:
        await self._check_pool(request.pool, context)
        await self._check_limit("head_limit", request.head_limit, HEAD_LIMIT, context)
        snapshot = await self._snapshot(
            request.head_limit,
            context,
            head_offset=request.head_offset,
            level=request.level if request.HasField("level") else None,
        )
        return queue_pb2.ListQueuesResponse(pools=[inspector_proto.pool_queues_to_proto(snapshot.queues)])

    async def ListRequests(
        self, request: queue_pb2.ListRequestsRequest, context: Context
    ) -> queue_pb2.ListRequestsResponse:
        await self._check_pool(request.pool, context)
        await self._check_limit("page_size", request.page_size, PAGE_LIMIT, context)
        states: list[RequestState] = []
        for number in request.states:
            if number not in STATES:
                await errors.abort(context, errors.InvalidArgument("states", f"there is no state {number}"))
            states.append(STATES[number])
        try:
            page = await self._inspector.list_requests(
                states, request.page_size, request.page_token, request.finished_after_s
            )
        except BadPageToken as error:
            await errors.abort(context, errors.InvalidArgument("page_token", str(error)))
        except StoreUnavailable as error:
            await errors.abort(context, errors.store_unreachable(str(error)))
        return inspector_proto.page_to_proto(page, self._inspector.pool)

    async def ListWorkers(
        self, request: queue_pb2.ListWorkersRequest, context: Context
    ) -> queue_pb2.ListWorkersResponse:
        await self._check_pool(request.pool, context)
        snapshot = await self._snapshot(0, context)
        return queue_pb2.ListWorkersResponse(
            workers=[inspector_proto.worker_info_to_proto(w, self._inspector.pool) for w in snapshot.workers]
        )

    async def GetTimeline(
        self, request: queue_pb2.GetTimelineRequest, context: Context
    ) -> queue_pb2.GetTimelineResponse:
        await self._check_pool(request.pool, context)
        try:
            timeline = await self._inspector.timeline(request.request_id)
        except StoreUnavailable as error:
            await errors.abort(context, errors.store_unreachable(str(error)))
        if timeline is None:
            await errors.abort(context, errors.request_unknown(request.request_id))
        return inspector_proto.timeline_to_proto(timeline, self._inspector.pool)

    async def Watch(
        self, request: queue_pb2.WatchRequest, context: Context
    ) -> AsyncIterator[queue_pb2.WatchResponse]:
        await self._check_pool(request.pool, context)
        await self._check_limit("head_limit", request.head_limit, HEAD_LIMIT, context)
        interval_s = WATCH_INTERVAL_S
        if request.HasField("interval"):
            interval_s = max(WATCH_INTERVAL_LEAST_S, request.interval.ToNanoseconds() / 1e9)
        shown: tuple[int, int] | None = None
        while True:
            snapshot = await self._snapshot(request.head_limit, context)
            # Every change of the queue is a commit of some epoch.
            version = (snapshot.queues.epoch, snapshot.queues.commit_seq)
            if version != shown:
                shown = version
                yield inspector_proto.snapshot_to_proto(snapshot)
            await asyncio.sleep(interval_s)

    async def _snapshot(
        self, head_limit: int, context: Context, *, head_offset: int = 0, level: int | None = None
    ) -> Snapshot:
        try:
            return await self._inspector.snapshot(head_limit, head_offset=head_offset, level=level)
        except StoreUnavailable as error:
            await errors.abort(context, errors.store_unreachable(str(error)))

    async def _check_pool(self, pool: str, context: Context) -> None:
        if pool not in ("", self._inspector.pool):
            await errors.abort(
                context,
                errors.NotFound(
                    f"there is no pool {pool!r} here, only {self._inspector.pool!r}",
                    reason=errors.Reason.POOL_UNKNOWN,
                    resource_type="pool",
                    resource_name=pool,
                ),
            )

    @staticmethod
    async def _check_limit(field: str, value: int, most: int, context: Context) -> None:
        if value > most:
            await errors.abort(context, errors.InvalidArgument(field, f"must be at most {most}, not {value}"))
