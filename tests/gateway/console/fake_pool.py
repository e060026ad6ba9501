"""A pool as its scheduler tells it, for the console's tests: any number of requests, moved by the test alone.

Everything that people could have sent is hostile in it: ids, reasons and texts carry markup.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from array import array
from collections.abc import Iterator
from typing import Any

import grpc.aio

from gateway.admission import pack
from laps import channels, errors
from laps.v1 import generation_pb2, queue_pb2, queue_pb2_grpc, scheduler_pb2, scheduler_pb2_grpc

THRESHOLDS_S = (0.5, 1.0, 2.0, 4.0, 8.0)
MARKUP = '<img src=x onerror="globalThis.hacked=1">'
SLOTS = 4
STEP_S = 0.1


class FakePool:
    """`waiting`, `running` and `finished` are RequestInfos; call `commit` after a change."""

    def __init__(self, seed: int = 7) -> None:
        self.chance = random.Random(seed)
        self.waiting: list[queue_pb2.RequestInfo] = []
        self.running: dict[tuple[str, int], queue_pb2.RequestInfo] = {}
        self.finished: list[queue_pb2.RequestInfo] = []
        self.events: dict[str, list[queue_pb2.RequestEvent]] = {}
        self.entries: dict[str, list[int]] = {}
        self.workers = [f"worker-{n}" for n in range(2)]
        self.draining: set[str] = set()
        self.calls: dict[str, int] = {}
        self.cancelled: list[str] = []
        self.commit_seq = 1
        self.port = 0
        self.policy = "laps-sd"
        self.prompt = [1, 2, 3]
        """Token ids of every prompt."""
        self._server: grpc.aio.Server | None = None
        self._made = 0
        self._shift_s = 0.0
        self._lengths: dict[str, int] = {}
        """Output tokens at which each request will stop by itself."""
        self._told: tuple[list[list[queue_pb2.RequestInfo]], float] | None = None
        """The waiting by level, and the backlog, since the last commit."""

    async def start(self) -> None:
        self._server = channels.new_server()
        queue_pb2_grpc.add_QueueServiceServicer_to_server(_Queue(self), self._server)
        scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(_Scheduler(self), self._server)
        self.port = channels.bind(self._server, "127.0.0.1", self.port)
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)

    # --- What happens ------------------------------------------------------------------

    def now_s(self) -> float:
        return time.time() + self._shift_s

    def play(self, seconds: float, waiting: int) -> Iterator[float]:
        """Lives through the last `seconds`, with about so many waiting. Yields the instant of each commit."""
        steps = int(seconds / STEP_S)
        for n in range(steps):
            self._shift_s = (n - steps) * STEP_S
            goal = waiting * (1 + 0.4 * math.sin(11 * n / steps))
            while len(self.waiting) < goal and self.chance.random() < 0.7:
                self.submit()
            self.advance()
            yield self.now_s()
        self._shift_s = 0.0

    def commit(self) -> None:
        self.waiting.sort(key=lambda info: (-info.priority, info.level, info.rank, info.arrival_s))
        self.commit_seq += 1
        self._told = None

    def submit(self, request_id: str = "", age_s: float = 0.0) -> queue_pb2.RequestInfo:
        self._made += 1
        chance, arrival_s = self.chance, self.now_s() - age_s
        kind = chance.choice(("chat", "code", "summary"))
        most = chance.choice((64, 128, 256, 512))
        info = queue_pb2.RequestInfo(
            request_id=request_id or f"{kind}-{chance.randrange(16**8):08x}",
            pool="default",
            state=queue_pb2.REQUEST_STATE_QUEUED,
            request_class=kind,
            arrival_s=arrival_s,
            prompt_tokens=chance.randrange(8, 900),
            max_tokens=most,
            acceptance_estimate=chance.uniform(0.3, 0.9),
            perceptible=chance.random() < 0.7,
        )
        info.predicted_output_tokens = chance.uniform(0.1, 1.0) * most
        self._lengths[info.request_id] = int(info.predicted_output_tokens * chance.uniform(0.6, 1.8))
        self._believe(info)
        self.waiting.append(info)
        self._event(info, "submitted", arrival_s)
        return info

    def fill(self, waiting: int) -> None:
        """A pool in full work, with a past of five minutes."""
        for n in range(60):
            info = self.submit(age_s=280 - 4.4 * n)
            self.run(info, at_s=info.arrival_s + self.chance.uniform(0.05, 2.0))
            for _ in range(self.chance.randrange(10, 40)):
                self.step(info)
            info.first_token_s = info.first_scheduled_s + 0.05
            took_s = self.chance.uniform(0.5, 3.0)
            reason = generation_pb2.FINISH_REASON_STOP if n % 3 else generation_pb2.FINISH_REASON_LENGTH
            self.finish(info, reason, info.first_scheduled_s + took_s)
        for n in range(waiting):
            info = self.submit(age_s=self.chance.uniform(0.1, 60.0) * (1 if n % 9 else 3))
            if n % 6 == 0:
                self.run(info, at_s=info.arrival_s + 0.4 * (self.now_s() - info.arrival_s))
                for _ in range(self.chance.randrange(2, 30)):
                    self.step(info)
                because = "chat-4c1e88a2 needs 1.6 s less and would have waited 2.1 s for a slot"
                self.preempt(info, because, info.leased_s + 0.3 * (self.now_s() - info.leased_s))
        for _ in range(SLOTS * len(self.workers) - 1):
            info = self.submit(age_s=self.chance.uniform(1.0, 9.0))
            self.run(info, at_s=info.arrival_s + 0.2)
            for _ in range(self.chance.randrange(5, 60)):
                self.step(info)
        self.commit()

    def run(self, info: queue_pb2.RequestInfo, at_s: float = 0.0) -> None:
        at_s = at_s or self.now_s()
        free = next(
            (worker, slot)
            for slot in range(SLOTS)
            for worker in self.workers
            if (worker, slot) not in self.running
        )
        self.waiting.remove(info)
        self.running[free] = info
        info.state, (info.worker_id, info.slot), info.leased_s = queue_pb2.REQUEST_STATE_RUNNING, free, at_s
        info.first_scheduled_s = info.first_scheduled_s or at_s
        self._event(info, "leased", at_s, f"slot {info.slot}")

    def step(self, info: queue_pb2.RequestInfo) -> None:
        accepted = sum(self.chance.random() < info.acceptance_estimate for _ in range(4))
        info.num_steps += 1
        info.num_draft_tokens += 4
        info.num_accepted_tokens += accepted
        info.output_tokens += accepted + 1
        info.attained_service_s += STEP_S
        info.first_token_s = info.first_token_s or self.now_s()
        info.max_tokens = max(info.max_tokens, info.output_tokens)
        info.predicted_output_tokens = max(info.predicted_output_tokens, info.output_tokens + 1.0)
        counts = list(info.acceptance_histogram) or [0] * 5
        counts[accepted] += 1
        info.acceptance_histogram[:] = counts
        self.entries.setdefault(info.request_id, []).append(accepted + 1)
        self._believe(info)

    def preempt(self, info: queue_pb2.RequestInfo, because: str, at_s: float = 0.0) -> None:
        del self.running[info.worker_id, info.slot]
        info.state = queue_pb2.REQUEST_STATE_PREEMPTED
        info.preemptions += 1
        info.preempted_because = because
        self.waiting.append(info)
        self._event(info, "preempted", at_s or self.now_s(), because)

    def finish(self, info: queue_pb2.RequestInfo, reason: Any, at_s: float = 0.0, error: str = "") -> None:
        if info in self.waiting:
            self.waiting.remove(info)
        self.running.pop((info.worker_id, info.slot), None)
        info.state, info.finish_reason = queue_pb2.REQUEST_STATE_FINISHED, reason
        info.finished_s, info.error = at_s or self.now_s(), error
        self.finished.append(info)
        self._event(info, "finished", info.finished_s, error)

    def advance(self) -> None:
        """One tick: every running request does a step; those that are through make room."""
        for info in list(self.running.values()):
            self.step(info)
            if info.output_tokens >= self._lengths[info.request_id]:
                self.finish(info, generation_pb2.FINISH_REASON_STOP)
            elif info.output_tokens >= info.max_tokens:
                self.finish(info, generation_pb2.FINISH_REASON_LENGTH)
        while self.waiting and len(self.running) < SLOTS * len(self.workers):
            self.run(self.waiting[0])
        if self.waiting:
            victim = max(self.running.values(), key=lambda info: info.rank)
            newcomer = self.waiting[0]
            if (gain_s := victim.rank - newcomer.rank) > 1.0:
                self.preempt(victim, f"{newcomer.request_id} needs {gain_s:.3g} s less and would have waited "
                                     "0.41 s for a slot; switching costs all together 0.12 s")  # fmt: skip
                self.run(newcomer)
        self.commit()

    def find(self, request_id: str) -> queue_pb2.RequestInfo | None:
        known = [*self.running.values(), *self.waiting, *self.finished]
        return next((info for info in known if info.request_id == request_id), None)

    def _believe(self, info: queue_pb2.RequestInfo) -> None:
        left = max(info.predicted_output_tokens - info.output_tokens, 1.0)
        info.perceived_service_s = left / (1 + 4 * info.acceptance_estimate) * STEP_S
        info.rank = info.perceived_service_s
        info.level = sum(info.rank >= threshold_s for threshold_s in THRESHOLDS_S)

    def _event(self, info: queue_pb2.RequestInfo, kind: str, at_s: float, detail: str = "") -> None:
        event = queue_pb2.RequestEvent(time_s=at_s, kind=kind, worker_id=info.worker_id, detail=detail)
        self.events.setdefault(info.request_id, []).append(event)

    # --- What is told ------------------------------------------------------------------

    def queues(self, limit: int = 0, offset: int = 0, level: int | None = None) -> queue_pb2.PoolQueues:
        if self._told is None:
            by_level: list[list[queue_pb2.RequestInfo]] = [[] for _ in range(len(THRESHOLDS_S) + 1)]
            for info in self.waiting:
                by_level[info.level].append(info)
            self._told = by_level, math.fsum(info.perceived_service_s for info in self.waiting)
        by_level, backlog_s = self._told
        told = queue_pb2.PoolQueues(
            pool="default",
            policy=self.policy,
            epoch=3,
            commit_seq=self.commit_seq,
            leader="127.0.0.1:50052",
            waiting=len(self.waiting),
            running=len(self.running),
            backlog_s=backlog_s,
        )
        for number, infos in enumerate(by_level):
            head = infos[offset : offset + limit] if level in (None, number) else []
            threshold_s = THRESHOLDS_S[number] if number < len(THRESHOLDS_S) else 0.0
            told.levels.add(level=number, threshold_s=threshold_s, waiting=len(infos), head=head)
        return told

    def worker_infos(self) -> list[queue_pb2.WorkerInfo]:
        told = []
        for worker in self.workers:
            slots = [
                queue_pb2.SlotInfo(slot=slot, request_id=info.request_id if info else "")
                for slot in range(SLOTS)
                for info in [self.running.get((worker, slot))]
            ]
            told.append(
                queue_pb2.WorkerInfo(
                    worker_id=worker, pool="default", device="cuda:0", slots=slots, last_seen_s=self.now_s(),
                    draining=worker in self.draining, draft_ms=1.42, verify_ms=23.8, switch_ms=0.61,
                    num_steps=18_233, kv_used_tokens=5_210, kv_capacity_tokens=16_384,
                )
            )  # fmt: skip
        return told

    def count(self, method: str) -> None:
        self.calls[method] = self.calls.get(method, 0) + 1


class _Queue(queue_pb2_grpc.QueueServiceServicer):
    def __init__(self, pool: FakePool) -> None:
        self._pool = pool

    async def ListQueues(self, request: queue_pb2.ListQueuesRequest, context: Any) -> Any:
        self._pool.count("ListQueues")
        level = request.level if request.HasField("level") else None
        queues = self._pool.queues(request.head_limit, request.head_offset, level)
        return queue_pb2.ListQueuesResponse(pools=[queues])

    async def ListRequests(self, request: queue_pb2.ListRequestsRequest, context: Any) -> Any:
        self._pool.count("ListRequests")
        assert list(request.states) == [queue_pb2.REQUEST_STATE_FINISHED]
        found = [info for info in self._pool.finished if info.finished_s > request.finished_after_s]
        return queue_pb2.ListRequestsResponse(requests=sorted(found, key=lambda info: info.finished_s))

    async def GetTimeline(self, request: queue_pb2.GetTimelineRequest, context: Any) -> Any:
        pool = self._pool
        pool.count("GetTimeline")
        info = pool.find(request.request_id)
        if info is None:
            await errors.abort(context, errors.request_unknown(request.request_id))
        response = queue_pb2.GetTimelineResponse(
            time_s=time.time(),
            request=info,
            events=pool.events.get(info.request_id, ()),
            tokens_per_entry=pool.entries.get(info.request_id, ()),
        )
        if info in pool.waiting:
            same = [each for each in pool.waiting if each.level == info.level]
            response.position = same.index(info)
        return response

    async def Watch(self, request: queue_pb2.WatchRequest, context: Any) -> Any:
        pool, shown = self._pool, 0
        pool.count("Watch")
        while True:
            if pool.commit_seq != shown:
                shown = pool.commit_seq
                yield queue_pb2.WatchResponse(
                    time_s=time.time(),
                    pools=[pool.queues(request.head_limit)],
                    workers=pool.worker_infos(),
                    running=list(pool.running.values()),
                )
            await asyncio.sleep(max(request.interval.ToSeconds(), 0.1))


class _Scheduler(scheduler_pb2_grpc.SchedulerServiceServicer):
    def __init__(self, pool: FakePool) -> None:
        self._pool = pool

    async def DescribePool(self, request: Any, context: Any) -> Any:
        return scheduler_pb2.DescribePoolResponse(pool="default", policy=self._pool.policy, epoch=3)

    async def Deliver(self, request_iterator: Any, context: Any) -> Any:
        await asyncio.Event().wait()
        yield

    async def CancelRequest(self, request: scheduler_pb2.CancelRequestRequest, context: Any) -> Any:
        info = self._pool.find(request.request_id)
        if info is None:
            await errors.abort(context, errors.request_unknown(request.request_id))
        self._pool.cancelled.append(request.request_id)
        self._pool.finish(info, generation_pb2.FINISH_REASON_CANCELLED)
        self._pool.commit()
        return scheduler_pb2.CancelRequestResponse(state=queue_pb2.REQUEST_STATE_FINISHED)

    async def ReadRequest(self, request: scheduler_pb2.ReadRequestRequest, context: Any) -> Any:
        self._pool.count("ReadRequest")
        info = self._pool.find(request.request_id)
        if info is None:
            await errors.abort(context, errors.request_unknown(request.request_id))
        return scheduler_pb2.ReadRequestResponse(
            request=info,
            prompt_token_ids=pack(array("I", self._pool.prompt)) if request.include_prompt else b"",
            output_token_ids=pack(array("I", [1, 2, 3])),
        )
