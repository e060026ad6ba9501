"""The driver: leases on an engine. The engine here emits one token a step, its own step count."""

from __future__ import annotations

import queue
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from laps.v1 import worker_pb2
from worker_svc.driver import EngineDriver, SessionLost, SessionOpened
from worker_svc.engine import EngineConfig, EngineRequest, FinishReason, StepResult
from worker_svc.reports import Report

TIMEOUT_S = 60.0


def pack(tokens: list[int]) -> bytes:
    return array("I", tokens).tobytes()


@dataclass
class FakeEngine:
    """Writes 100, 101, ... for every request; keeps everything until told to drop it."""

    held: dict[str, list[int]] = field(default_factory=dict)
    most: dict[str, int] = field(default_factory=dict)
    running: list[str] = field(default_factory=list)
    switches: list[tuple[int, float]] = field(default_factory=list)
    """`switched` and `switch_s` of the next steps."""
    prefills: int = 0
    """So many of the next steps are prefill alone."""
    refuse: set[str] = field(default_factory=set)
    config: EngineConfig = field(default_factory=EngineConfig)
    context_tokens: int = 64
    kv_capacity_tokens: int = 1024
    orders: dict[str, tuple[float, ...]] = field(default_factory=dict)
    events: list[str] = field(default_factory=list)
    """What the thread did, in its order."""
    costs: Any = field(
        default_factory=lambda: SimpleNamespace(
            draft_s=lambda draft_tokens: 0.0, verify_s=0.0, prefill_s_per_token=0.0
        )
    )

    def add(self, request: EngineRequest) -> None:
        if request.request_id in self.refuse:
            raise ValueError("no")
        self.held[request.request_id] = list(request.output_token_ids)
        self.most[request.request_id] = request.stopping.max_tokens or 0
        self.running.append(request.request_id)
        self.orders[request.request_id] = request.run_order

    def preempt(self, request_id: str, run_order: tuple[float, ...] | None = None) -> None:
        self.orders[request_id] = run_order or self.orders[request_id]
        self.running.remove(request_id)

    def drop(self, request_id: str) -> None:
        self.held.pop(request_id, None)
        if request_id in self.running:
            self.running.remove(request_id)

    def holds(self, request_id: str) -> int:
        return len(self.held.get(request_id, [])) + 1 if request_id in self.held else 0

    def step(self, meanwhile: Callable[[], object]) -> StepResult:
        self.events.append("step")
        switched, switch_s = self.switches.pop(0) if self.switches else (0, 0.0)
        if self.prefills:
            self.prefills -= 1
            return StepResult(switched=switched, switch_s=switch_s, prefill_tokens=8)
        meanwhile()
        self.events.append("computed")
        names = tuple(self.running)
        offsets = tuple(len(self.held[name]) for name in names)
        for name, offset in zip(names, offsets, strict=True):
            self.held[name].append(100 + offset)
        finish = tuple(
            FinishReason.LENGTH if len(self.held[name]) >= self.most[name] else None for name in names
        )
        for name, reason in zip(names, finish, strict=True):
            if reason is not None:
                self.running.remove(name)  # as with `hold_finished`
        return StepResult(
            switched=switched,
            switch_s=switch_s,
            request_ids=names,
            offsets=offsets,
            emitted_counts=(1,) * len(names),
            token_ids=np.array([100 + offset for offset in offsets], np.int32),
            drafted_counts=(0,) * len(names),
            accepted_counts=(0,) * len(names),
            finish=finish,
            matched_stop=(None,) * len(names),
            logprobs=(None,) * len(names),
            cached_tokens={row: 7 for row, offset in enumerate(offsets) if offset == 0},
        )


@dataclass
class House:
    """A driver in session, and its reports."""

    engine: FakeEngine
    driver: EngineDriver
    reports: queue.SimpleQueue[worker_pb2.StepReport]
    events: list[str]
    messages: list[int] = field(default_factory=list)
    """How many reports each message held."""

    def open(self, epoch: int = 1, report_interval_s: float = 0.0) -> None:
        self.driver.post(SessionOpened(epoch, self._sent, report_interval_s))

    def _sent(self, reports: Sequence[Report]) -> None:
        self.messages.append(len(reports))
        self.events.append("sent")
        for report in reports:
            self.reports.put(report.to_proto())

    def update(self, epoch: int = 1, acknowledged: int = 0, credit: int = 1000, **fields: Any) -> None:
        self.driver.post(
            worker_pb2.LeaseUpdate(
                epoch=epoch,
                acknowledged_step=acknowledged,
                step_credit=credit,
                lease_duration_s=60,
                **fields,
            )
        )

    def next(self) -> worker_pb2.StepReport:
        return self.reports.get(timeout=TIMEOUT_S)


@pytest.fixture
def house() -> Iterator[House]:
    engine = FakeEngine()
    failures: list[BaseException] = []
    driver = EngineDriver(engine, failures.append)  # type: ignore[arg-type]
    driver.start()
    yield House(engine, driver, queue.SimpleQueue(), engine.events)
    driver.stop(TIMEOUT_S)
    assert failures == []


def grant(lease_id: int, request_id: str, output: list[int], max_tokens: int, **fields: Any) -> Any:
    message = worker_pb2.LeaseGrant(
        lease_id=lease_id,
        request_id=request_id,
        output_tokens=len(output),
        output_crc32=zlib.crc32(pack(output)),
        **fields,
    )
    message.stopping.max_tokens = max_tokens
    return message


def full(lease_id: int, request_id: str, output: list[int], max_tokens: int) -> Any:
    return grant(
        lease_id,
        request_id,
        output,
        max_tokens,
        has_context=True,
        prompt_token_ids=pack([1, 2]),
        output_token_ids=pack(output),
    )


def test_it_steps_until_the_end_and_reports_each(house: House) -> None:
    house.open()
    house.update(grants=[full(7, "a", [], 3)])
    reports = [house.next() for _ in range(3)]
    assert [list(r.lease_ids) for r in reports] == [[7]] * 3
    assert [list(r.offsets) for r in reports] == [[0], [1], [2]]
    assert [r.token_ids for r in reports] == [pack([100]), pack([101]), pack([102])]
    assert [r.step for r in reports] == [1, 2, 3]
    assert len(reports[2].finishes) == 1
    assert house.driver.wait_idle(TIMEOUT_S)


def test_steps_between_the_first_token_and_the_end_are_told_together(house: House) -> None:
    house.open(report_interval_s=60.0)
    house.update(grants=[full(7, "a", [], 5)])
    assert [list(house.next().offsets) for _ in range(5)] == [[0], [1], [2], [3], [4]]
    assert house.messages == [1, 4]


def test_what_waits_is_told_before_the_credit_is_used_up(house: House) -> None:
    house.open(report_interval_s=60.0)
    house.update(credit=4, grants=[full(7, "a", [], 50)])
    assert [house.next().step for _ in range(4)] == [1, 2, 3, 4]
    assert house.messages == [1, 3]


def test_a_session_that_is_lost_takes_what_waits_along(house: House) -> None:
    house.open(report_interval_s=60.0)
    house.update(credit=1, grants=[full(7, "a", [], 50)])
    assert house.next().step == 1
    house.driver.post(SessionLost())
    assert house.driver.wait_detached(TIMEOUT_S)
    (resident,) = house.driver.resident()
    assert resident.output_tokens == 1
    house.open(epoch=2, report_interval_s=60.0)
    house.update(epoch=2, credit=1, grants=[grant(8, "a", [100], 50)])
    report = house.next()
    assert (report.epoch, report.step, list(report.lease_ids), list(report.offsets)) == (2, 1, [8], [1])
    assert house.messages == [1, 1]


def test_what_only_tells_of_tokens_goes_while_the_next_step_computes(house: House) -> None:
    """Not between two steps, in which the engine's device has nothing to do."""
    house.open(report_interval_s=1e-9)
    house.update(credit=4, grants=[full(7, "a", [], 50)])
    assert [house.next().step for _ in range(4)] == [1, 2, 3, 4]
    told, untold = ["step", "sent", "computed"], ["step", "computed"]
    # A request's first token is waited for, and after the last step of its credit no other follows.
    assert house.events == [*untold, "sent", *untold, *told, *told, "sent"]


def test_it_runs_no_further_than_its_credit(house: House) -> None:
    house.open()
    house.update(credit=2, grants=[full(7, "a", [], 50)])
    house.next()
    house.next()
    with pytest.raises(queue.Empty):
        house.reports.get(timeout=0.2)
    house.update(acknowledged=2, credit=1)
    assert house.next().step == 3


def test_revoke_and_grant_of_one_update_are_a_swap(house: House) -> None:
    house.open()
    house.update(credit=1, grants=[full(7, "a", [], 50)])
    house.next()
    revoke = worker_pb2.LeaseRevoke(lease_id=7, request_id="a", reason=worker_pb2.REVOKE_REASON_PREEMPTED)
    house.update(acknowledged=1, credit=1, revokes=[revoke], grants=[full(8, "b", [], 50)])
    report = house.next()
    assert list(report.released_lease_ids) == [7]
    assert list(report.lease_ids) == [8]
    # It kept what it had of the first, so that a grant without context is enough.
    house.update(acknowledged=2, credit=1, grants=[grant(9, "a", [100], 50)])
    report = house.next()
    assert dict(zip(report.lease_ids, report.offsets, strict=True)) == {8: 1, 9: 1}


def test_it_goes_back_to_what_is_stored(house: House) -> None:
    """A leader that recovered may know less than this worker has computed."""
    house.open()
    house.update(credit=5, grants=[full(7, "a", [], 50)])
    for _ in range(5):
        house.next()
    house.driver.post(SessionLost())
    assert house.driver.wait_detached(TIMEOUT_S)
    resident = house.driver.resident()
    assert [(r.request_id, r.output_tokens) for r in resident] == [("a", 5)]
    house.open(epoch=2)
    house.update(epoch=2, credit=1, grants=[grant(8, "a", [100, 101], 50)])
    report = house.next()
    assert list(report.offsets) == [2]
    assert report.epoch == 2
    assert report.step == 1


def test_a_finished_request_is_kept_until_its_end_is_acknowledged(house: House) -> None:
    house.open()
    house.update(credit=9, grants=[full(7, "a", [], 2), full(8, "b", [], 4)])
    for _ in range(4):
        house.next()
    house.update(acknowledged=3, grants=[full(9, "c", [], 1)])
    assert list(house.next().lease_ids) == [9]
    assert house.engine.held.keys() == {"b", "c"}
    house.update(acknowledged=5, grants=[full(10, "d", [], 1)])
    report = house.next()
    assert list(report.lease_ids) == [10]
    assert list(report.evicted_request_ids) == []
    assert house.engine.held.keys() == {"d"}


def test_an_end_that_no_leader_has_stored_costs_no_kv(house: House) -> None:
    """The leader dies with the last reports unread; the next one has stored less."""
    house.open()
    house.update(credit=9, grants=[full(7, "a", [], 4), full(8, "b", [], 3)])
    for _ in range(4):
        house.next()
    house.driver.post(SessionLost())
    assert house.driver.wait_detached(TIMEOUT_S)
    assert {r.request_id: r.output_tokens for r in house.driver.resident()} == {"a": 4, "b": 3}
    house.open(epoch=2)
    # The end of the other one is stored.
    revoke = worker_pb2.LeaseRevoke(request_id="b", reason=worker_pb2.REVOKE_REASON_ENDED)
    house.update(epoch=2, credit=9, revokes=[revoke], grants=[grant(9, "a", [100, 101], 4)])
    reports = [house.next(), house.next()]
    assert [list(r.missing_lease_ids) for r in reports] == [[], []]
    assert [list(r.offsets) for r in reports] == [[2], [3]]
    assert len(reports[1].finishes) == 1
    assert house.engine.held.keys() == {"a"}


def test_a_finished_request_that_the_engine_has_given_up_is_not_offered(house: House) -> None:
    house.open()
    house.update(credit=9, grants=[full(7, "a", [], 1)])
    house.next()
    assert house.driver.wait_idle(TIMEOUT_S)
    house.engine.held.clear()
    house.update(credit=9, grants=[full(8, "b", [], 1)])
    assert list(house.next().evicted_request_ids) == ["a"]
    house.driver.post(SessionLost())
    assert house.driver.wait_detached(TIMEOUT_S)
    assert [r.request_id for r in house.driver.resident()] == ["b"]


@pytest.mark.parametrize("output", [[100, 999], [100, 101, 102]])
def test_it_asks_for_context_where_its_own_does_not_fit(house: House, output: list[int]) -> None:
    house.open()
    house.update(credit=2, grants=[full(7, "a", [], 50)])
    house.next()
    house.next()
    revoke = worker_pb2.LeaseRevoke(lease_id=7, request_id="a", reason=worker_pb2.REVOKE_REASON_PREEMPTED)
    house.update(acknowledged=2, credit=9, revokes=[revoke], grants=[grant(8, "a", output, 50)])
    report = house.next()
    assert list(report.missing_lease_ids) == [8]
    assert list(report.lease_ids) == []


def test_an_ended_request_is_forgotten(house: House) -> None:
    house.open()
    house.update(credit=1, grants=[full(7, "a", [], 50)])
    house.next()
    revoke = worker_pb2.LeaseRevoke(lease_id=7, request_id="a", reason=worker_pb2.REVOKE_REASON_ENDED)
    house.update(acknowledged=1, revokes=[revoke])
    assert list(house.next().released_lease_ids) == [7]
    assert house.driver.wait_idle(TIMEOUT_S)
    assert house.engine.held == {}


def test_a_request_that_the_engine_refuses_does_not_take_the_others_along(house: House) -> None:
    house.engine.refuse.add("bad")
    house.open()
    house.update(credit=1, grants=[full(7, "bad", [], 5), full(8, "good", [], 5)])
    report = house.next()
    assert [(e.lease_id, e.message) for e in report.errors] == [(7, "ValueError: no")]
    assert list(report.lease_ids) == [8]


def test_updates_of_another_epoch_are_ignored(house: House) -> None:
    house.open(epoch=2)
    house.update(epoch=1, grants=[full(7, "a", [], 5)])
    house.update(epoch=2, credit=1, grants=[full(8, "b", [], 5)])
    assert list(house.next().lease_ids) == [8]


def test_leases_end_by_themselves(house: House) -> None:
    house.open()
    update = worker_pb2.LeaseUpdate(
        epoch=1, step_credit=1, lease_duration_s=1.0, grants=[full(7, "a", [], 50)]
    )
    house.driver.post(update)
    house.next()
    assert list(house.next().released_lease_ids) == [7]


def test_the_order_of_running_reaches_the_engine_and_cached_tokens_the_scheduler(house: House) -> None:
    def order(priority: int, level: int, rank: float) -> Any:
        return worker_pb2.RunOrder(priority=priority, level=level, rank=rank)

    house.open()
    first, second = full(7, "a", [], 50), full(8, "b", [], 50)
    first.run_order.CopyFrom(order(0, 2, 1.5))
    second.run_order.CopyFrom(order(3, 0, 9.0))
    house.update(credit=1, grants=[first, second])
    assert dict(house.next().cached_tokens) == {0: 7, 1: 7}
    assert house.engine.orders["b"] < house.engine.orders["a"]
    revoke = worker_pb2.LeaseRevoke(
        lease_id=8, request_id="b", reason=worker_pb2.REVOKE_REASON_PREEMPTED, run_order=order(0, 3, 0.0)
    )
    house.update(acknowledged=1, credit=1, revokes=[revoke])
    report = house.next()
    while not report.lease_ids:
        report = house.next()
    assert dict(report.cached_tokens) == {}
    assert house.engine.orders["b"] > house.engine.orders["a"]


def test_what_a_return_costs_is_the_mean_of_returns(house: House) -> None:
    house.engine.switches = [(0, 0.0), (1, 0.008), (0, 0.5), (2, 0.008)]
    house.open()
    house.update(credit=4, grants=[full(7, "a", [], 50)])
    told = [house.next().timings.costs.switch_s for _ in range(4)]
    assert told == pytest.approx([0.0, 0.008, 0.008, 0.006])


def test_returns_in_steps_of_prefill_alone_count(house: House) -> None:
    """Those are the ones whose KV was lost, or that come back beside none that decodes."""
    house.engine.prefills = 2
    house.engine.switches = [(1, 0.008), (1, 0.004), (0, 0.0)]
    house.open()
    house.update(credit=1, grants=[full(7, "a", [], 50)])
    assert house.next().timings.costs.switch_s == pytest.approx(0.006)
