"""What one tick does stays bounded however long the queue is and however many requests run."""

from __future__ import annotations

import pytest

from scheduler_svc.core.ledger import MAX_RECORDS_AT_ONCE, MAX_RECORDS_PER_S
from scheduler_svc.core.policies import make_policy
from scheduler_svc.core.policies.laps_sd import LapsSd
from scheduler_svc.core.records import FinishReason, Recovered, StepCosts, Worker
from scheduler_svc.core.scheduler import Scheduler
from scheduler_svc.core.settings import SchedulerSettings
from scheduler_svc.store.packing import CommitPacker

from .house import FakeWorker, Store, spec

QUEUED = 1300


def filled(slots: int, **settings: float) -> tuple[Scheduler, FakeWorker]:
    core = Scheduler("p", make_policy("laps-sd"), SchedulerSettings(**settings))  # type: ignore[arg-type]
    core.worker_joined(Worker("w", slots, StepCosts(0.002, 0.025), last_seen_s=0.0), [], 0.0)
    fake = FakeWorker("w", slots)
    for number in range(slots + QUEUED):
        core.submit(spec(f"r{number}", max_tokens=4000), 0.0)
    fake.apply(core.tick(0.0))
    return core, fake


def test_a_long_queue_is_ranked_anew_little_by_little() -> None:
    core, _ = filled(2)
    policy = core.policy
    assert isinstance(policy, LapsSd)
    policy.knowledge.add("", 256.0, False, tokens=30, steps=10)
    now_s = 0.2
    moved: list[set[str]] = []
    while not moved or policy._to_rank:
        # The second tick comes before its turn. Enough is learnt all the time, but a round goes to its end.
        for finishes in (QUEUED, 0):
            policy._finishes = finishes
            moves = core.tick(now_s).commit.moves
            moved.append({move.request_id for move in moves if move.level is not None})
        core.check_invariants()
        ranked_s, now_s = now_s, core.next_timer_s() or now_s
    assert max(map(len, moved)) <= 10
    assert not any(moved[1::2])
    assert sum(map(len, moved)) == core.waiting_requests == len(set.union(*moved))
    assert 0.5 < ranked_s < 1.0


def test_a_recovered_queue_is_written_anew_in_several_ticks_and_runs_at_once() -> None:
    core, _ = filled(2)
    again = Scheduler("p", make_policy("laps-sd"), SchedulerSettings(), epoch=2)
    again.restore(Recovered(requests=list(core.requests.values())), 1.0)
    again.worker_joined(Worker("w", 2, StepCosts(0.002, 0.025), last_seen_s=1.0), [], 1.0)
    first = again.tick(1.0)
    assert len(first.grants) == 2
    written = {request.request_id for request in first.commit.changed}
    assert len(written) <= 102
    while again.next_timer_s() == 1.0:
        written |= {request.request_id for request in again.tick(1.0).commit.changed}
    assert written == set(again.requests)


def crashed(policy: str, store: Store, now_s: float, **settings: float) -> Scheduler:
    """The next leader, its first commits stored."""
    core = Scheduler("p", make_policy(policy), SchedulerSettings(**settings), epoch=2)  # type: ignore[arg-type]
    core.restore(store.recover(), now_s)
    return core


def waiting(core: Scheduler) -> list[tuple[str, int, float]]:
    return [(request.request_id, request.level, request.rank) for request in core.waiting_order()]


def test_a_recovered_queue_keeps_its_order_and_nothing_of_it_is_written_anew() -> None:
    store = Store()
    core = crashed("laps-sd", store, 0.0, starvation_bound_s=1.5)
    fake = FakeWorker("w", 2)
    core.worker_joined(Worker("w", 2, StepCosts(0.001, 0.1), last_seen_s=0.0), [], 0.0)
    for number in range(300):
        late = number >= 100
        core.submit(spec(f"r{number}", max_tokens=1 + number % 97), float(late))
    for now_s in (1.0, 2.0):  # the first hundred are overdue at the second
        tick = core.tick(now_s)
        fake.apply(tick)
        store.apply(tick.commit)
    running = {request.request_id for request in core.requests.values() if request.lease_id}
    assert len(running) == 2
    before = [place for place in waiting(core) if place[0] not in running]
    assert before[0][2] < -1e12 < before[-1][2]

    # Steps take 0.101 s; the next leader has no worker that would tell it.
    again = crashed("laps-sd", store, 2.0, starvation_bound_s=1.5)
    first = again.tick(2.0)
    store.apply(first.commit)
    assert [place for place in waiting(again) if place[0] not in running] == before
    assert {request.request_id for request in first.commit.changed} == running
    assert {move.request_id for move in first.commit.moves} == running
    assert not again.tick(2.0).commit
    assert store.waiting == {name: (level, rank) for name, level, rank in waiting(again)}
    again.check_invariants()


@pytest.mark.parametrize(("before", "after"), [("fcfs", "laps-sd"), ("laps-sd", "fcfs")])
def test_under_another_order_a_recovered_queue_is_placed_anew_even_after_a_second_crash(
    before: str, after: str
) -> None:
    store = Store()
    core = crashed(before, store, 0.0)
    for number in range(250):
        core.submit(spec(f"r{number}", max_tokens=1000 - number), 0.0)
    store.apply(core.tick(0.0).commit)
    core = crashed(after, store, 1.0)
    store.apply(core.tick(1.0).commit)  # some have been told, not all
    core = crashed(after, store, 1.0)
    right = waiting(core)
    while core.next_timer_s() == 1.0:
        store.apply(core.tick(1.0).commit)
    fresh = Scheduler("p", make_policy(after), SchedulerSettings())
    for number in range(250):
        fresh.submit(spec(f"r{number}", max_tokens=1000 - number), 0.0)
    assert right == waiting(fresh)
    assert store.waiting == {name: (level, rank) for name, level, rank in right}


def test_with_many_running_each_record_is_written_less_often() -> None:
    slots = 1000
    core, fake = filled(slots, record_interval_s=0.25)
    written = 0
    for step in range(1, 101):
        core.report(fake.step(1), step * 0.05)
        written += sum(written_by_ticks(core, step * 0.05, (step + 1) * 0.05))
    # They all got their slots at once, so the first is due after an interval, which is 2 s of the five.
    assert 0.9 * MAX_RECORDS_PER_S * 3.0 < written <= 1.1 * MAX_RECORDS_PER_S * 3.0


def test_records_of_one_age_are_not_written_in_one_tick() -> None:
    core, fake = filled(200, record_interval_s=0.25)
    ticks = []
    for step in range(1, 21):
        core.report(fake.step(1), step * 0.05)
        ticks += written_by_ticks(core, step * 0.05, (step + 1) * 0.05)
    assert max(ticks) == MAX_RECORDS_AT_ONCE
    # And none is forgotten: after the last step each is written once more.
    left = written_by_ticks(core, 1.05, 2.0)
    assert sum(left) <= 200
    assert all(request.book.written_s >= 1.0 for request in core.requests.values() if request.lease_id)


def written_by_ticks(core: Scheduler, now_s: float, until_s: float) -> list[int]:
    """Records of each tick, the first at once, the others when the core asks for them."""
    counts = []
    while now_s < until_s:
        counts.append(len(core.tick(now_s).commit.changed))
        due_s = core.next_timer_s()
        if due_s is None:
            break
        now_s = max(due_s, now_s + 1e-6)
    return counts


def test_a_rank_that_only_a_move_has_written_is_not_taken_for_the_stored_one() -> None:
    """The packer leaves out what has not changed since it packed it last; a move changes it in between."""
    core, _ = filled(1)
    request = core.requests["r0"]
    packer = CommitPacker(1, 0)
    core._ledger.changed(request)
    packer.pack(core.tick(0.1).commit, 0.1)
    assert "r0" in packer._written
    core._ledger.moved(request)
    packer.pack(core.tick(0.2).commit, 0.2)
    assert "r0" not in packer._written
    core.cancel("r0", 0.3, FinishReason.CANCELLED)
    packer.pack(core.tick(0.3).commit, 0.3)


@pytest.mark.parametrize("after", ["laps-sd", "fcfs", "las"])
def test_a_queue_taken_over_in_parts_is_as_one_taken_over_as_a_whole(after: str) -> None:
    store = Store()
    core = crashed("laps-sd", store, 0.0)
    for number in range(QUEUED):
        core.submit(spec(f"r{number}", max_tokens=1 + number % 97), 0.0)
    store.apply(core.tick(0.0).commit)
    core.cancel("r7", 0.5)
    store.apply(core.tick(0.5).commit)
    whole = crashed(after, store, 1.0)
    recovered, requests = store.recover(), store.recover().requests
    parts = Scheduler("p", make_policy(after), SchedulerSettings(), epoch=2)
    parts.begin_restoring(recovered, 1.0)
    for first in range(len(requests), -1, -500):
        parts.take_over(requests[max(0, first - 500) : first], 1.0)
    parts.end_restoring()
    parts.check_invariants()
    assert len(waiting(parts)) == QUEUED - 1
    assert waiting(parts) == waiting(whole)
    assert set(parts.requests) == set(whole.requests)
    assert parts.tick(1.0).commit.events == whole.tick(1.0).commit.events


def test_many_deadlines_at_one_instant_end_in_several_ticks_and_so_are_forgotten() -> None:
    core = Scheduler("p", make_policy("fcfs"), SchedulerSettings(retention_s=10.0))
    for number in range(QUEUED):
        core.submit(spec(f"r{number}", deadline_s=5.0), 0.0)
    core.tick(0.0)
    ended, forgotten = [], []
    for now_s in (5.0, 15.0):
        while (due_s := core.next_timer_s()) is not None and due_s <= now_s:
            commit = core.tick(now_s).commit
            ended.append(len(commit.finished))
            forgotten.append(len(commit.forgotten))
    assert max(ended + forgotten) <= 500
    assert sum(ended) == sum(forgotten) == QUEUED
