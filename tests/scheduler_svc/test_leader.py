"""The loop that joins core and store: nothing is seen before it is stored."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

import pytest

from laps.history import HistoryPoint
from scheduler_svc.core.policies import make_policy
from scheduler_svc.core.records import Commit, RequestSpec, StepCosts, StepReport, Worker
from scheduler_svc.core.scheduler import Scheduler
from scheduler_svc.core.settings import SchedulerSettings
from scheduler_svc.deliveries import Follower
from scheduler_svc.leader import Leader
from scheduler_svc.sessions import MAX_UNREAD_UPDATES, UPDATE_BYTES, WorkerSession
from scheduler_svc.store.connection import Unawaited
from scheduler_svc.store.errors import StaleLeader, StoreError, StoreUnavailable
from tests.doubles import Instead

TOKEN = bytes(4)


class FakeStore:
    """Stores when it is let to, after the `failures`."""

    def __init__(self) -> None:
        self.allowed = asyncio.Event()
        self.allowed.set()
        self.failures: list[Exception] = []
        self.calls: list[bytes] = []
        self.asked = asyncio.Event()
        self.seen = HistoryPoint()
        self.stored: list[bytes] = []
        self._sent = Unawaited()

    def encode(self, commit: Commit, now_s: float) -> bytes:
        return repr(commit.emitted).encode()

    async def commit(self, encoded: bytes) -> bool:
        self.calls.append(encoded)
        self.asked.set()
        await self.allowed.wait()
        if self.failures:
            raise self.failures.pop(0)
        self.stored.append(encoded)
        return True

    def send(self, encoded: bytes, on_stored: Callable[[StoreError | None], None]) -> None:
        self._sent.begin(partial(self.commit, encoded), lambda _, error: on_stored(error))

    def forget_sent(self) -> None:
        self._sent.cancel()

    async def renew(self) -> None:
        return None


@asynccontextmanager
async def running(store: FakeStore) -> AsyncIterator[tuple[Leader, asyncio.Task[None]]]:
    core = Scheduler("p", make_policy("fcfs"), SchedulerSettings())
    leader = Leader(
        core,
        store,  # type: ignore[arg-type]
        epoch=1,
        tick_interval_s=0.0,
        gateway_grace_s=5.0,
        leader_ttl_s=3.0,
    )
    task = asyncio.create_task(leader.run())
    try:
        yield leader, task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def join(leader: Leader) -> WorkerSession:
    session = WorkerSession("w")
    leader.open_session(session, Worker("w", 1, StepCosts(0.001, 0.01)), [])
    return session


def submit(leader: Leader, request_id: str = "a") -> None:
    leader.core.submit(RequestSpec(request_id, TOKEN, 10), leader.now_s())


async def test_a_lease_is_sent_only_after_its_commit() -> None:
    store = FakeStore()
    async with running(store) as (leader, _):
        session = join(leader)
        await asyncio.wait_for(leader.settled(), 60)
        store.allowed.clear()
        store.asked.clear()
        submit(leader)
        settled = asyncio.ensure_future(leader.settled())
        await asyncio.wait_for(store.asked.wait(), 60)
        assert session.outbox.empty()
        assert not settled.done()
        store.allowed.set()
        await asyncio.wait_for(settled, 60)
        message = session.outbox.get_nowait()
        assert message is not None
        assert message.leases.grants[0].request_id == "a"


async def test_tokens_reach_followers_only_after_their_commit() -> None:
    store, follower = FakeStore(), Follower()
    async with running(store) as (leader, _):
        session = join(leader)
        submit(leader)
        await asyncio.wait_for(leader.settled(), 60)
        message = session.outbox.get_nowait()
        assert message is not None
        lease_id = message.leases.grants[0].lease_id
        request = leader.core.get("a")
        assert request is not None
        leader.hub.follow(follower, request, 0, 0)
        store.allowed.clear()
        store.asked.clear()
        leader.report(session, 1, StepReport("w", [lease_id], [0], [2], [3], [1], 2 * TOKEN))
        waiting = asyncio.ensure_future(follower.next_message())
        await asyncio.wait_for(store.asked.wait(), 60)
        assert not waiting.done()
        leader.core.report(StepReport("w", [lease_id], [2], [3], [3], [2], 3 * TOKEN), leader.now_s())
        assert (request.output_tokens, leader.stored_tokens(request)) == (5, 0)
        store.allowed.set()
        assert (await asyncio.wait_for(waiting, 60)).counts == [2]
        assert leader.stored_tokens(request) == 2
        acknowledged = await asyncio.wait_for(session.outbox.get(), 60)
        assert acknowledged is not None
        assert acknowledged.leases.acknowledged_step == 1


async def test_what_comes_during_a_commit_is_decided_at_once_and_told_after_it() -> None:
    """And not a third tick: of what is repeated, the store knows the last two."""
    store = FakeStore()
    async with running(store) as (leader, _):
        session = WorkerSession("w")
        leader.open_session(session, Worker("w", 2, StepCosts(0.001, 0.01)), [])
        await asyncio.wait_for(leader.settled(), 60)
        store.allowed.clear()
        told: list[str] = []
        waiting = []
        for name in "abc":
            store.asked.clear()
            leader.core.submit(RequestSpec(name, TOKEN, 10), leader.now_s())
            settled = asyncio.ensure_future(leader.settled())
            settled.add_done_callback(lambda _, name=name: told.append(name))  # type: ignore[misc]
            waiting.append(settled)
            if name != "c":
                await asyncio.wait_for(store.asked.wait(), 60)
        calls = len(store.calls)
        for _ in range(10):
            await asyncio.sleep(0)
        assert len(store.calls) == calls
        assert not told
        # Where the first one's fails, the second one's was sent in vain. Both are sent again, in their order.
        store.failures += [StoreUnavailable("no answer"), StoreUnavailable("nor to the next")]
        store.allowed.set()
        await asyncio.wait_for(asyncio.gather(*waiting), 60)
        assert told == ["a", "b", "c"]


async def test_a_report_that_comes_during_a_commit_is_acknowledged_by_the_next() -> None:
    store = FakeStore()
    async with running(store) as (leader, _):
        session = WorkerSession("w")
        leader.open_session(session, Worker("w", 2, StepCosts(0.001, 0.01)), [])
        submit(leader)
        await asyncio.wait_for(leader.settled(), 60)
        first = session.outbox.get_nowait()
        assert first is not None
        store.allowed.clear()
        store.asked.clear()
        leader.core.submit(RequestSpec("b", TOKEN, 10), leader.now_s())
        leader.wake()
        await asyncio.wait_for(store.asked.wait(), 60)
        report = StepReport("w", [first.leases.grants[0].lease_id], [0], [1], [0], [0], TOKEN)
        leader.report(session, 1, report)
        store.allowed.set()
        updates = [await asyncio.wait_for(session.outbox.get(), 60) for _ in range(2)]
        assert [update.leases.acknowledged_step for update in updates if update] == [0, 1]


async def test_an_unknown_outcome_is_asked_again_with_the_same_bytes() -> None:
    store = FakeStore()
    store.failures = [StoreUnavailable("timeout"), StoreUnavailable("timeout")]
    async with running(store) as (leader, _):
        submit(leader)
        await asyncio.wait_for(leader.settled(), 60)
        assert len(store.calls) == 3
        assert len(set(store.calls)) == 1
        assert not leader.store_down


class DetouredStore(FakeStore):
    """The answers to what is sent are given by the test."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: asyncio.Queue[Callable[[StoreError | None], None]] = asyncio.Queue()

    def send(self, encoded: bytes, on_stored: Callable[[StoreError | None], None]) -> None:
        self.answers.put_nowait(on_stored)


async def test_a_commit_that_fails_before_the_one_before_it_is_stored_is_asked_again() -> None:
    """That one may have to be made again in another place, which takes longer."""
    store = DetouredStore()
    async with running(store) as (leader, _):
        submit(leader, "a")
        leader.wake()
        first = await asyncio.wait_for(store.answers.get(), 60)
        submit(leader, "b")
        settled = asyncio.ensure_future(leader.settled())
        second = await asyncio.wait_for(store.answers.get(), 60)
        second(StoreUnavailable("sent by a connection that was lost"))
        for _ in range(5):  # whoever repeats commits looks, and finds that the first one is on its way
            await asyncio.sleep(0)
        first(None)
        await asyncio.wait_for(settled, 60)
        assert len(store.calls) == 1
        assert not leader.store_down


async def test_a_lost_term_ends_the_loop_and_whoever_waits() -> None:
    store = FakeStore()
    store.failures = [StaleLeader("STALE_EPOCH")]
    async with running(store) as (leader, task):
        session = join(leader)
        waiting = asyncio.ensure_future(leader.settled())
        with pytest.raises(StaleLeader):
            await asyncio.wait_for(task, 60)
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert session.outbox.get_nowait() is None


async def test_what_goes_wrong_as_a_tick_is_told_ends_the_term(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for a commit that was sent: what its answer leads to would go wrong unheard."""
    store = FakeStore()
    async with running(store) as (leader, task):
        await asyncio.wait_for(leader.settled(), 60)

        def broken(*_: object) -> None:
            raise ValueError("cannot be told")

        monkeypatch.setattr(leader, "hub", Instead(leader.hub, finished=broken))
        submit(leader)
        waiting = asyncio.ensure_future(leader.settled())
        with pytest.raises(ValueError, match="cannot be told"):
            await asyncio.wait_for(task, 60)
        with pytest.raises(asyncio.CancelledError):
            await waiting


async def test_a_worker_given_up_by_the_core_must_join_anew() -> None:
    store = FakeStore()
    async with running(store) as (leader, _):
        session = join(leader)
        await asyncio.wait_for(leader.settled(), 60)
        leader.core.worker_left("w", leader.now_s())
        leader.wake()
        messages = [await asyncio.wait_for(session.outbox.get(), 60)]
        while messages[-1] is not None:
            messages.append(await asyncio.wait_for(session.outbox.get(), 60))


async def test_a_worker_that_has_nothing_to_report_is_told_that_its_leases_were_renewed() -> None:
    """As in a long prefill. It would give them back when they end, and begin anew."""
    store = FakeStore()
    async with running(store) as (leader, _):
        now_s = leader.now_s()
        leader.now_s = lambda: now_s  # type: ignore[assignment]
        session, idle = join(leader), WorkerSession("idle")
        submit(leader)
        await asyncio.wait_for(leader.settled(), 60)
        granted = session.outbox.get_nowait()
        assert granted is not None
        assert len(granted.leases.grants) == 1
        leader.open_session(idle, Worker("idle", 1, StepCosts(0.001, 0.01)), [])
        await asyncio.wait_for(leader.settled(), 60)
        for _ in range(8):
            now_s += leader.core.settings.session_timeout_s / 4
            for each in (session, idle):
                leader.heartbeat(each)
            await asyncio.wait_for(leader.settled(), 60)
        renewed = [session.outbox.get_nowait() for _ in range(session.outbox.qsize())]
        assert len(renewed) >= 3
        for update in renewed:
            assert update is not None
            assert update.leases.lease_duration_s == leader.core.settings.lease_duration_s
            assert not update.leases.grants
        assert idle.outbox.empty()


async def test_contexts_too_long_for_one_message_come_in_several() -> None:
    """As when a worker with many slots joins a pool of long prompts: gRPC refuses what is too large."""
    store, slots = FakeStore(), 8
    prompt = bytes(UPDATE_BYTES // 3 // 4 * 4)
    async with running(store) as (leader, _):
        for number in range(slots):
            leader.core.submit(RequestSpec(f"r{number}", prompt, 10), leader.now_s())
        session = WorkerSession("w")
        leader.open_session(session, Worker("w", slots, StepCosts(0.001, 0.01)), [])
        await asyncio.wait_for(leader.settled(), 60)
        granted: list[str] = []
        while len(granted) < slots:
            message = session.outbox.get_nowait()
            assert message is not None
            assert message.ByteSize() <= UPDATE_BYTES + 4096
            update = message.leases
            assert (update.epoch, update.step_credit) == (1, leader.core.settings.step_credit)
            assert update.lease_duration_s == leader.core.settings.lease_duration_s
            granted += [grant.request_id for grant in update.grants]
        assert sorted(granted) == [f"r{number}" for number in range(slots)]
        assert session.outbox.empty()


async def test_a_worker_that_reports_and_never_reads_loses_its_session() -> None:
    store = FakeStore()
    async with running(store) as (leader, _):
        session = join(leader)
        step = 0
        while "w" in leader.core.workers:
            step += 1
            leader.report(session, step, StepReport("w"))
            await asyncio.wait_for(leader.settled(), 60)
            assert session.outbox.qsize() <= MAX_UNREAD_UPDATES
        assert session.outbox.get_nowait() is None
        assert session.outbox.empty()


async def test_an_older_session_of_a_worker_cannot_speak_for_it() -> None:
    store = FakeStore()
    async with running(store) as (leader, _):
        old, new = join(leader), join(leader)
        leader.close_session(old)
        assert "w" in leader.core.workers
        leader.report(old, 1, StepReport("w"))
        assert not old.unacknowledged
        assert not new.unacknowledged


def test_what_is_stored_is_never_older_than_the_record_interval() -> None:
    """Even if nothing happens after the last step: a reader of the store must not see an old count."""
    core = Scheduler("p", make_policy("fcfs"), SchedulerSettings(record_interval_s=0.25))
    core.worker_joined(Worker("w", 1, StepCosts(0.001, 0.01)), [], 0.0)
    core.submit(RequestSpec("a", TOKEN, 10), 0.0)
    lease_id = core.tick(0.0).grants[0].lease_id
    core.report(StepReport("w", [lease_id], [0], [1], [0], [0], TOKEN), 0.1)
    assert core.tick(0.1).commit.changed == []
    due_s = core.next_timer_s()
    assert due_s == 0.25
    assert [request.request_id for request in core.tick(due_s).commit.changed] == ["a"]
    assert (core.next_timer_s() or 1.0) >= 0.5
