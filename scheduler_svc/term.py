"""Leadership: waiting for it, recovering, serving a term, and losing it again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import grpc
import structlog

from laps import errors, runtime
from laps.history import HistoryPoint
from scheduler_svc.core.policies import make_policy
from scheduler_svc.core.scheduler import Scheduler
from scheduler_svc.core.settings import SchedulerSettings
from scheduler_svc.leader import Leader
from scheduler_svc.renewal import while_leading
from scheduler_svc.store.errors import Alarm, PoolStopped, StaleLeader, StoreUnavailable
from scheduler_svc.store.store import Leadership, Store

log = structlog.get_logger()

STORE_RETRY_S = 0.5
STOPPED_RETRY_AFTER_S = 30.0
"""What callers of a stopped pool are told: it takes a person."""


class Terms:
    """The pool's leadership as this process sees it: `leader` while it leads, else None."""

    def __init__(
        self,
        *,
        pool: str,
        store: Store,
        policy: str,
        core_settings: SchedulerSettings,
        holder: str,
        address: str,
        tick_interval_s: float,
        leader_ttl_s: float,
        gateway_grace_s: float,
        on_change: Callable[[bool], None] = lambda leading: None,
        on_alarm: Callable[[Alarm], None] = lambda alarm: None,
    ) -> None:
        self.pool = pool
        self.store = store
        self.leader: Leader | None = None
        self.store_full = False
        """The store has no room for another request."""
        self.stopped = ""
        """Why nobody may lead the pool; empty: somebody may."""
        self._stands_by = False
        self._store_answers = False
        """While nobody leads here. It has not answered before it is asked."""
        self._policy = policy
        self._core_settings = core_settings
        # Whoever comes back under the same name may take its own term over at once after a crash.
        # The epoch grows all the same and fences what is left of the term.
        self._holder = holder
        self._address = address
        self._tick_interval_s = tick_interval_s
        self._leader_ttl_s = leader_ttl_s
        self._gateway_grace_s = gateway_grace_s
        self._on_change = on_change
        self._on_alarm = on_alarm
        self._stopping: asyncio.Task[None] | None = None
        self._queue = runtime.LoadedObjects()

    @property
    def ready(self) -> bool:
        """It leads, or would when the leader went; and its store answers."""
        return self._stands_by if self.leader is None else self.leader.store_answers

    @property
    def store_answers(self) -> bool:
        """As far as is known: whether this process leads, stands by or waits for the store."""
        return self._store_answers if self.leader is None else self.leader.store_answers

    # --- For the services --------------------------------------------------------------------

    def not_leading(self) -> errors.LapsError:
        if self.stopped:
            return errors.Unavailable(
                f"pool {self.pool} was stopped and waits for an operator (laps pool status): {self.stopped}",
                reason=errors.Reason.POOL_STOPPED,
                retry_after_s=STOPPED_RETRY_AFTER_S,
            )
        return errors.Unavailable(
            f"this scheduler does not lead pool {self.pool}",
            reason=errors.Reason.NOT_LEADER,
            retry_after_s=self._leader_ttl_s / 3,
        )

    def leader_or_raise(self) -> Leader:
        """The present leader, or Unavailable with a retry hint: nothing is accepted that
        could not be stored."""
        leader = self.leader
        if leader is None:
            raise self.not_leading()
        if leader.store_down:
            raise errors.store_unreachable()
        return leader

    async def leader_or_abort(self, context: grpc.aio.ServicerContext[Any, Any]) -> Leader:
        """As `leader_or_raise`; the call ends with what it raises."""
        try:
            return self.leader_or_raise()
        except errors.Unavailable as error:
            await errors.abort(context, error)

    async def check_seen_or_abort(
        self, leader: Leader, seen: HistoryPoint, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        """A peer tells how far it has seen the history. If the store is behind that, this leader has
        either been succeeded or leads what has been restored from an older copy: the peer is turned away."""
        try:
            await self.store.witness(seen)
        except StoreUnavailable as error:
            await errors.abort(context, errors.store_unreachable(str(error)))
        except StaleLeader:
            await errors.abort(context, self.not_leading())
        except Alarm as alarm:
            if self._stopping is None:
                # A task of its own: the peer's call may end before the mark is stored.
                self._stopping = asyncio.create_task(self._stop_pool(alarm, seen))
            await errors.abort(context, self.not_leading())

    async def settled_or_abort(self, leader: Leader, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Waits until all is stored. If the term ends first the caller must ask again, and the
        request_id makes that safe."""
        try:
            await leader.settled()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise  # The caller is gone.
            await errors.abort(context, self.not_leading())

    # --- The life ----------------------------------------------------------------------------

    async def run(self) -> None:
        """Leads whenever it can, for ever. Ends only by cancellation.

        An alarm (the store does not hold what was written to it; leading on would tell clients two
        different stories) stops the pool: a mark in the store keeps everybody from leading, this process
        and those that start later too, until an operator lets it go on.
        """
        await self._prepare_store()
        while True:
            if self._stopping is not None:
                await self._stopping
                self._stopping = None
            self._queue.dropped()
            epoch = 0
            try:
                leadership = await self._until_leading()
                epoch = leadership.epoch
                await self._serve_term(leadership)
            except StaleLeader as error:
                log.warning("leadership lost", pool=self.pool, epoch=epoch, error=str(error))
            except Alarm as alarm:
                await self._stop_pool(alarm, self.store.seen)
            except StoreUnavailable as error:
                log.error("store lost while taking over", error=str(error))
                self._store_answers = False
                await asyncio.sleep(STORE_RETRY_S)

    async def _stop_pool(self, alarm: Alarm, seen: HistoryPoint) -> None:
        self.stopped = str(alarm)
        log.critical("pool stopped: the store does not hold what was written to it", error=str(alarm))
        self._on_alarm(alarm)
        while True:
            try:
                await self.store.stop_pool(self._holder, str(alarm), seen)
            except StoreUnavailable as error:
                log.error("the pool's stop is not stored yet", error=str(error))
                self._store_answers = False
                await asyncio.sleep(STORE_RETRY_S)
            else:
                self._store_answers = True
                return

    async def _prepare_store(self) -> None:
        complained = False
        while True:
            try:
                server = await self.store.connect()
                await self.store.load_functions()
            except StoreUnavailable as error:
                if not complained:
                    log.error("store not reachable, trying again until it is", error=str(error))
                    complained = True
                await asyncio.sleep(STORE_RETRY_S)
            else:
                self._store_answers = True
                for warning in server.warnings:
                    log.warning("store is not durable", warning=warning)
                log.info("store connected", version=server.version)
                return

    async def _until_leading(self) -> Leadership:
        waiting = False
        while True:
            try:
                leadership = await self.store.lead(self._holder, self._address, self._leader_ttl_s)
            except StoreUnavailable as error:
                log.error("store does not answer", error=str(error))
                leadership, self._stands_by, self._store_answers = None, False, False
            except PoolStopped as stopped:
                if not self.stopped:
                    log.critical(
                        "pool is stopped until an operator resumes it", pool=self.pool, error=str(stopped)
                    )
                self.stopped, self._stands_by, self._store_answers = str(stopped), False, True
                await asyncio.sleep(STORE_RETRY_S)
                continue
            else:
                if self.stopped:
                    log.warning("pool was resumed", pool=self.pool, history=str(self.store.seen))
                self.stopped, self._stands_by, self._store_answers = "", True, True
            if leadership is not None:
                return leadership
            if not waiting:
                log.info("standing by", pool=self.pool)
                waiting = True
            await asyncio.sleep(self._leader_ttl_s / 6)

    async def _serve_term(self, leadership: Leadership) -> None:
        started_s = time.monotonic()
        # A long queue takes longer than a leadership lasts: unless it is renewed a standby takes it over,
        # begins to recover, and loses it to this process in the same way, for ever.
        with self._queue.loading():
            core = await while_leading(
                self._recover(leadership.epoch), self.store, self._leader_ttl_s, self._told_of_renewal
            )
        await self.store.describe(core.policy.name, core.policy.level_thresholds_s)
        leader = Leader(
            core,
            self.store,
            epoch=leadership.epoch,
            tick_interval_s=self._tick_interval_s,
            gateway_grace_s=self._gateway_grace_s,
            leader_ttl_s=self._leader_ttl_s,
        )
        log.info(
            "leading",
            pool=self.pool,
            epoch=leadership.epoch,
            policy=core.policy.name,
            recovered_requests=len(core.requests),
            recovery_s=round(time.monotonic() - started_s, 3),
        )
        self.leader = leader
        self._on_change(True)
        try:
            await leader.run()
        finally:
            self.leader, self._stands_by = None, False
            self._on_change(False)
            leader.ended.set()

    def _told_of_renewal(self, renewed: bool) -> None:
        self._store_answers = renewed

    async def _recover(self, epoch: int) -> Scheduler:
        core = Scheduler(self.pool, make_policy(self._policy), self._core_settings, epoch)
        await take_over(core, self.store)
        return core


async def take_over(core: Scheduler, store: Store) -> None:
    """Gives a new core what the store holds, each part as soon as it is read: the store reads the next one
    meanwhile. Raises what `Store.recovering` does."""
    async with aclosing(store.recovering()) as parts:
        core.begin_restoring(await anext(parts), time.time())
        async for part in parts:
            core.take_over(part.requests, time.time())
    core.end_restoring()
