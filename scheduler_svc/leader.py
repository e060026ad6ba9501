"""One term of leadership: the loop that joins the core with the store.

Events reach the core at once (it is a plain object in this process); what it decides is
taken once a tick, stored in one call, and only then seen by clients and workers, in the order
of the ticks. While commits are on their way the next tick's events gather, so the store's
latency bounds the rate of ticks and not the number of requests.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import Any

import structlog
from prometheus_client import Histogram

from laps import telemetry
from scheduler_svc.core.records import Request, Resident, StepReport, Tick, Worker
from scheduler_svc.core.scheduler import Scheduler
from scheduler_svc.deliveries import DeliveryHub
from scheduler_svc.renewal import while_leading
from scheduler_svc.sessions import WorkerSession, updates
from scheduler_svc.store.errors import StoreError, StoreUnavailable
from scheduler_svc.store.store import Store
from scheduler_svc.tracing import RequestTraces

log = structlog.get_logger()

RETRY_FIRST_S = 0.02
RETRY_LAST_S = 1.0
COMMITS_UNDER_WAY = 2
"""Ticks that have been decided and not been told. With one, whatever arrives during a commit waits for its
end before it is decided; the store knows a repetition of its last two commits, and of no more."""
COMMIT_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class Clock:
    """Wall-clock seconds that never jump: read once, then carried on by the monotonic clock."""

    def __init__(self) -> None:
        self._offset_s = time.time() - time.monotonic()

    def __call__(self) -> float:
        return time.monotonic() + self._offset_s


@dataclass(eq=False, slots=True)
class Decided:
    """A tick on its way through the store, and what is to be told when it is there."""

    tick: Tick
    now_s: float
    began_s: float
    sessions: dict[str, WorkerSession]
    """It was decided for these: one that opens during the commit knows none of it."""
    steps: dict[str, int]
    """The last step of each that is part of it: reports that come during the commit are not."""
    reported: list[str]
    waiters: list[asyncio.Future[None]]
    encoded: bytes = b""
    """Empty: there is nothing to be stored."""
    stored: bool = False
    error: StoreUnavailable | None = None
    """Why it is not known to be stored."""


class Leader:
    """Everything that exists only while this process leads the pool."""

    def __init__(
        self,
        core: Scheduler,
        store: Store,
        *,
        epoch: int,
        tick_interval_s: float,
        gateway_grace_s: float,
        leader_ttl_s: float,
    ) -> None:
        self.core = core
        self.epoch = epoch
        self.hub = DeliveryHub(gateway_grace_s)
        self.now_s = Clock()
        self.ticks = 0
        self.commit_times = Histogram(
            "laps_commit_seconds",
            "Time from a tick's decision to its being stored, retries included",
            ["pool"],
            buckets=COMMIT_BUCKETS_S,
            registry=None,
        )
        self._observe_commit_s = self.commit_times.labels(core.pool).observe
        self.ended = asyncio.Event()
        self._store = store
        self._tick_interval_s = tick_interval_s
        self._leader_ttl_s = leader_ttl_s
        self._sessions: dict[str, WorkerSession] = {}
        self._wake = asyncio.Event()
        self._waiters: list[asyncio.Future[None]] = []
        self._store_down = False
        self._renewed = True
        self._decided_s = float("-inf")
        """When the last tick was decided."""
        self._under_way: deque[Decided] = deque()
        """In their order."""
        self._room = asyncio.Semaphore(COMMITS_UNDER_WAY)
        self._trouble = asyncio.Event()
        """The first of them has to be sent again."""
        self._failed: asyncio.Future[None] | None = None
        """While this term runs: gets what went wrong where nobody waits."""
        tracing = telemetry.tracing()
        self._traces = None if tracing is None else RequestTraces(tracing, core, self.now_s())
        self.hub.restored(core.requests.values(), self.now_s())

    # --- What the services use ---------------------------------------------------------------

    @property
    def store_down(self) -> bool:
        """The store does not answer: nothing new may be accepted."""
        return self._store_down

    @property
    def store_answers(self) -> bool:
        """As far as is known: where nothing is to be stored, it is asked by the renewals alone."""
        return self._renewed and not self._store_down

    def wake(self) -> None:
        self._wake.set()

    async def settled(self) -> None:
        """Returns when everything that the core has decided until now is stored.

        Raises:
            asyncio.CancelledError: the term ended first.
        """
        if self.ended.is_set():
            raise asyncio.CancelledError
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        self._wake.set()
        await waiter

    def stored_tokens(self, request: Request) -> int:
        """Of a live request's output: how much the hub was told. The core is ahead of the store by the ticks
        that are under way and the one that it collects."""
        if not request.output:
            return 0
        ticks = [self.core.emitted, *(decided.tick.commit.emitted for decided in self._under_way)]
        ahead = [emitted.count_of(request.request_id) for tick in ticks for emitted in tick]
        return request.output_tokens - sum(ahead)

    def open_session(self, session: WorkerSession, worker: Worker, residents: list[Resident]) -> None:
        previous = self._sessions.get(session.worker_id)
        if previous is not None:
            previous.close()
        self._sessions[session.worker_id] = session
        self.core.worker_joined(worker, residents, self.now_s())
        self._wake.set()

    def close_session(self, session: WorkerSession) -> None:
        """Of a stream that broke. A newer session of the same worker is left alone."""
        if self._sessions.get(session.worker_id) is session:
            del self._sessions[session.worker_id]
            self.core.worker_left(session.worker_id, self.now_s())
            self._wake.set()

    def report(self, session: WorkerSession, step: int, report: StepReport) -> None:
        if self._sessions.get(session.worker_id) is not session:
            return
        session.last_step = step
        session.unacknowledged = True
        self.core.report(report, self.now_s())
        self._wake.set()

    def heartbeat(self, session: WorkerSession) -> None:
        if self._sessions.get(session.worker_id) is session:
            self.core.heartbeat(session.worker_id, self.now_s())

    def drain(self, session: WorkerSession) -> None:
        if self._sessions.get(session.worker_id) is session:
            self.core.worker_draining(session.worker_id, self.now_s())
            self._wake.set()

    # --- The loop ----------------------------------------------------------------------------

    async def run(self) -> None:
        """Ticks until the term is lost.

        Raises:
            StaleLeader: another scheduler leads the pool now.
            HistoryWentBack, LogConflict: the store is not the one that this term wrote.
        """
        try:
            await while_leading(self._work(), self._store, self._leader_ttl_s, self._told_of_renewal)
        finally:
            for waiters in (self._waiters, *(decided.waiters for decided in self._under_way)):
                for waiter in waiters:
                    waiter.cancel()
            for session in self._sessions.values():
                session.close()
            self.hub.close()
            if self._traces is not None:
                self._traces.close(self.now_s())

    async def _work(self) -> None:
        failed = self._failed = asyncio.get_running_loop().create_future()
        tasks: list[asyncio.Task[Any]] = [
            asyncio.create_task(work) for work in (self._decide_forever(), self._repeat_forever())
        ]
        try:
            await asyncio.gather(*tasks, failed)
        finally:
            failed.cancel()
            self._store.forget_sent()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _told_of_renewal(self, renewed: bool) -> None:
        self._renewed = renewed

    async def _decide_forever(self) -> None:
        while True:
            await self._room.acquire()
            await self._until_due()
            self._decide(self.now_s())
            self._decided_s = self.now_s()

    def _decide(self, now_s: float) -> None:
        """One tick, and its commit on its way."""
        for request_id in self.hub.take_abandoned(now_s):
            self.core.cancel(request_id, now_s)
        tick = self.core.tick(now_s)
        self._close_lost_sessions()
        sessions = dict(self._sessions)
        decided = Decided(
            tick,
            now_s,
            time.perf_counter(),
            sessions,
            steps={session.worker_id: session.last_step for session in sessions.values()},
            reported=[session.worker_id for session in sessions.values() if session.unacknowledged],
            waiters=self._waiters,
        )
        self._waiters = []
        for worker_id in decided.reported:
            sessions[worker_id].unacknowledged = False
        self._under_way.append(decided)
        if tick.commit:
            # Packed now: the records go on changing while the store is being asked.
            decided.encoded = self._store.encode(tick.commit, now_s)
            self._store.send(decided.encoded, partial(self._answered, decided))
        else:
            self._answered(decided, None)

    def _answered(self, decided: Decided, error: StoreError | None) -> None:
        """Called from within the event loop, where nobody would hear of what it raises."""
        if self._failed is None or self._failed.done():
            return
        try:
            if error is None:
                decided.stored = True
            elif isinstance(error, StoreUnavailable):
                decided.error = error
            else:
                raise error
            self._tell()
        except Exception as failure:
            self._failed.set_exception(failure)

    def _tell(self) -> None:
        """Of everything that is stored, with all that was decided before it. What then comes first and has
        failed is to be repeated, whether it failed just now or before those in front of it were answered."""
        while self._under_way and self._under_way[0].stored:
            decided = self._under_way[0]
            if decided.encoded:
                self.ticks += 1
                self._observe_commit_s(time.perf_counter() - decided.began_s)
            self._publish(decided)
            for waiter in decided.waiters:
                if not waiter.done():
                    waiter.set_result(None)
            self._under_way.popleft()
            self._room.release()
        if self._under_way and self._under_way[0].error is not None:
            self._trouble.set()

    async def _repeat_forever(self) -> None:
        while True:
            await self._trouble.wait()
            self._trouble.clear()
            lost_with_another = False
            while self._under_way and (first := self._under_way[0]).error is not None:
                await self._repeat(first, None if lost_with_another else first.error)
                first.stored = True
                self._tell()
                lost_with_another = True

    def _close_lost_sessions(self) -> None:
        """Of workers that the core has given up for their silence. A stream can outlive that, for
        example when it was this process that stood still: the worker then has to join anew."""
        for worker_id in [name for name in self._sessions if name not in self.core.workers]:
            log.warning("worker was silent for too long", worker_id=worker_id)
            self._sessions.pop(worker_id).close()

    async def _until_due(self) -> None:
        if not self._wake.is_set():
            timers = [t for t in (self.core.next_timer_s(), self.hub.next_orphan_s()) if t is not None]
            alarm = None
            if timers:
                due_s = max(0.0, min(timers) - self.now_s())
                alarm = asyncio.get_running_loop().call_later(due_s, self._wake.set)
            try:
                await self._wake.wait()
            finally:
                if alarm is not None:
                    alarm.cancel()
        self._wake.clear()
        # After a pause at once, for somebody waits for the answer. Otherwise what comes in the meantime joins
        # this tick, and its one commit.
        await asyncio.sleep(max(0.0, self._decided_s + self._tick_interval_s - self.now_s()))

    async def _repeat(self, decided: Decided, error: StoreUnavailable | None) -> None:
        """Returns when it is stored. The outcome of the calls may be unknown; they are idempotent."""
        retry_s = RETRY_FIRST_S
        while True:
            if error is not None:
                if not self._store_down:
                    log.error("store does not answer; nothing is released until it does", error=str(error))
                self._store_down = True
                await asyncio.sleep(retry_s)
                retry_s = min(2 * retry_s, RETRY_LAST_S)
            try:
                await self._store.commit(decided.encoded)
                break
            except StoreUnavailable as still:
                error = still
        if self._store_down:
            self._store_down = False
            log.info("store answers again", down_s=round(time.perf_counter() - decided.began_s, 3))

    def _publish(self, decided: Decided) -> None:
        tick, now_s, sessions = decided.tick, decided.now_s, decided.sessions
        self.hub.published(tick.commit.emitted, tick.commit.logprobs)
        self.hub.finished(tick.commit.finished)
        for request in tick.commit.submitted:
            self.hub.submitted(request, now_s)
        if self._traces is not None:
            self._traces.stored(tick, now_s, self.now_s())
        for request in tick.commit.finished:
            log.info(
                "finished",
                request_id=request.request_id,
                finish_reason=request.finish_reason,
                output_tokens=request.output_tokens,
                preemptions=request.preemptions,
                **telemetry.trace_field(request.spec.traceparent),
            )
        settings = self.core.settings
        history = self._store.seen.to_proto()
        # Whose leases were renewed too: a worker that only prefills has nothing to report, and gives back
        # what it has not heard of for as long as a lease lasts. In their order, which must not vary.
        renewed = [worker.worker_id for worker, _ in tick.commit.workers if any(worker.running)]
        told = dict.fromkeys([*decided.reported, *renewed])
        for worker_id, update in updates(tick, told, self._traceparent).items():
            session = sessions.get(worker_id)
            if session is None or self._sessions.get(worker_id) is not session:
                continue
            leases = update.leases
            leases.epoch = self.epoch
            leases.history.CopyFrom(history)
            leases.acknowledged_step = decided.steps[worker_id]
            leases.step_credit = settings.step_credit
            leases.lease_duration_s = settings.lease_duration_s
            if not session.tell(update):
                log.warning("worker does not read", worker_id=worker_id)
                self.close_session(session)
                session.abandon()

    def _traceparent(self, request: Request) -> str:
        return request.spec.traceparent if self._traces is None else self._traces.traceparent(request)
