"""Random histories: whatever clients, workers and crashes do, the books stay right."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from scheduler_svc.core.invariants import check_work_conserving
from scheduler_svc.core.policies import servable_policies
from scheduler_svc.core.records import FinishReason, Refused, StepReport

from .house import FakeWorker, Store, pack, scheduler, spec, worker

WORKERS = st.sampled_from(["w0", "w1"])
NAMES = st.integers(0, 11).map(lambda number: f"r{number}")


class Pool(RuleBasedStateMachine):
    policy = "fcfs"

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.epoch = 0
        self.store = Store()
        self.fakes: dict[str, FakeWorker] = {}
        self.sent: list[StepReport] = []
        self.leases: set[int] = set()
        self.options: dict[str, Any] = {}

    @initialize(bound=st.sampled_from([None, 3.0]), queued=st.sampled_from([3, 100]))
    def begin(self, bound: float | None, queued: int) -> None:
        self.options = {
            "starvation_bound_s": bound,
            "max_queued_requests": queued,
            "max_queued_tokens": 60,
            "max_retained": 4,
            "retention_s": 20.0,
        }
        self.core = scheduler(self.policy, epoch=1, **self.options)
        self.epoch = 1

    @rule(
        name=NAMES,
        max_tokens=st.integers(1, 40),
        priority=st.sampled_from([0, 0, 0, 1]),
        predicted=st.one_of(st.none(), st.floats(1.0, 60.0)),
        lifetime_s=st.one_of(st.none(), st.floats(0.1, 5.0)),
        kind=st.sampled_from(["", "chat"]),
    )
    def submit(
        self,
        name: str,
        max_tokens: int,
        priority: int,
        predicted: float | None,
        lifetime_s: float | None,
        kind: str,
    ) -> None:
        asked = spec(
            name,
            max_tokens=max_tokens,
            priority=priority,
            predicted_output_tokens=predicted,
            deadline_s=None if lifetime_s is None else self.now_s + lifetime_s,
            request_class=kind,
        )
        known = self.core.get(name) is not None or self.core.retained(name) is not None
        before = self.core.waiting_requests
        try:
            _, joined = self.core.submit(asked, self.now_s)
        except Refused as refused:
            reason = refused.reason
            joined = False
        else:
            reason = ""
        assert joined == known
        assert reason in ("", "QUEUE_FULL", "QUEUE_TOKENS_FULL")
        assert self.core.waiting_requests == before + (not joined and not reason)

    @rule(name=NAMES)
    def cancel(self, name: str) -> None:
        self.core.cancel(name, self.now_s)
        assert self.core.get(name) is None

    @rule(worker_id=WORKERS, slots=st.integers(1, 3), keeps=st.booleans())
    def join(self, worker_id: str, slots: int, keeps: bool) -> None:
        old = self.fakes.get(worker_id)
        fake = FakeWorker(worker_id, slots)
        if old is not None and keeps:
            fake.outputs = old.outputs
        self.core.worker_joined(worker(worker_id, slots), fake.residents(), self.now_s)
        self.fakes[worker_id] = fake

    @rule(worker_id=WORKERS)
    def leave(self, worker_id: str) -> None:
        self.core.worker_left(worker_id, self.now_s)
        self.fakes.pop(worker_id, None)

    @rule(worker_id=WORKERS)
    def drain(self, worker_id: str) -> None:
        self.core.worker_draining(worker_id, self.now_s)

    @rule(worker_id=WORKERS, counts=st.integers(0, 5), stops=st.one_of(st.none(), NAMES))
    def step(self, worker_id: str, counts: int, stops: str | None) -> None:
        fake = self.fakes.get(worker_id)
        if fake is None:
            return
        report = fake.step(counts, finish={} if stops is None else {stops: FinishReason.STOP})
        self.sent.append(report)
        self.core.report(report, self.now_s)

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def repeat(self, data: st.DataObject) -> None:
        self.core.report(data.draw(st.sampled_from(self.sent)), self.now_s)

    @rule(
        worker_id=st.sampled_from(["w0", "w1", "stranger"]),
        data=st.data(),
        rows=st.lists(
            st.tuples(st.integers(-1, 12), st.integers(-1, 9), st.integers(-1, 5), st.integers(-1, 5)),
            max_size=3,
        ),
    )
    def lie(self, worker_id: str, data: st.DataObject, rows: list[tuple[int, int, int, int]]) -> None:
        """A worker that says anything about leases that may be its own."""
        leases = [request.lease_id for request in self.core.requests.values() if request.lease_id] + [7]
        some = st.lists(st.sampled_from(leases), max_size=2)
        report = StepReport(
            worker_id,
            lease_ids=[data.draw(st.sampled_from(leases)) for _ in rows],
            offsets=[row[0] for row in rows],
            emitted_counts=[row[1] for row in rows],
            drafted_counts=[row[2] for row in rows],
            accepted_counts=[row[3] for row in rows],
            token_ids=pack(*[1] * max(0, sum(row[1] for row in rows))),
            released=data.draw(some),
            missing=data.draw(some),
            errors=dict.fromkeys(data.draw(some), "lie"),
            evicted=data.draw(st.lists(NAMES, max_size=2)),
        )
        self.core.report(report, self.now_s)
        if worker_id in self.fakes:
            self.fakes[worker_id].drop(report.released)

    @rule(seconds=st.sampled_from([0.0, 0.01, 0.3, 2.0, 6.0]))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        if seconds < 5.0:
            for worker_id in self.fakes:
                self.core.heartbeat(worker_id, self.now_s)

    @rule()
    def tick(self) -> None:
        self._tick()
        if (next_s := self.core.next_timer_s()) is not None and next_s <= self.now_s:
            # A finished request that only waited for what this commit puts into the logs.
            self._tick()
            next_s = self.core.next_timer_s()
        assert next_s is None or next_s > self.now_s

    def _tick(self) -> None:
        tick = self.core.tick(self.now_s)
        self.store.apply(tick.commit)
        check_work_conserving(self.core._board)
        for grant in tick.grants:
            again = grant.lease_id in self.leases
            assert not again or grant.has_context, "a lease id is used twice only to send the context again"
            self.leases.add(grant.lease_id)
        for worker_id in tick.commit.workers_gone:
            self.fakes.pop(worker_id, None)
        for fake in self.fakes.values():
            fake.apply(tick)
        held = [request.lease_id for request in self.core.requests.values() if request.lease_id]
        assert len(held) == len(set(held))
        assert set(self.store.live) == set(self.core.requests)
        assert self.store.waiting == {
            request.request_id: (request.level, request.rank) for request in self.core.waiting_order()
        }
        assert set(self.store.leases) == {
            request.request_id for request in self.core.requests.values() if request.lease_id
        }
        for request_id, request in self.core.requests.items():
            assert self.store.output(request_id) == bytes(request.output)

    @rule(committed=st.booleans())
    def crash(self, committed: bool) -> None:
        if committed:
            self.tick()
        self.epoch += 1
        self.core = scheduler(self.policy, epoch=self.epoch, **self.options)
        self.core.restore(self.store.recover(), self.now_s)
        for fake in self.fakes.values():
            fake.slots = [None] * len(fake.slots)
            fake.released, fake.missing = [], []

    @invariant()
    def books_are_right(self) -> None:
        if self.epoch:
            self.core.check_invariants()

    def teardown(self) -> None:
        """Left alone with an honest worker, everything ends."""
        if not self.epoch:
            return
        self.core.worker_joined(worker("last", 2), [], self.now_s)
        self.fakes = {"last": FakeWorker("last", 2)}
        for _ in range(2000):
            self.now_s += 0.5
            self.tick()
            if not self.core.requests:
                break
            self.core.report(self.fakes["last"].step(2), self.now_s)
        assert not self.core.requests
        assert set(self.store.ever_finished) >= set(self.store.finished)


@pytest.mark.parametrize("policy", servable_policies())
def test_random_histories(policy: str) -> None:
    machine = type("PoolUnderTest", (Pool,), {"policy": policy})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=40,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        ),
    )
