"""What one tick does stays bounded however long the queue is and however many requests run."""

from __future__ import annotations

from scheduler_svc.core.ledger import MAX_RECORDS_PER_S
from scheduler_svc.core.policies import make_policy
from scheduler_svc.core.policies.laps_sd import LapsSd
from scheduler_svc.core.records import FinishReason, Recovered, StepCosts, Worker
from scheduler_svc.core.scheduler import Scheduler
from scheduler_svc.core.settings import SchedulerSettings
from scheduler_svc.store.packing import CommitPacker

from .house import FakeWorker, spec

QUEUED = 1300


def filled(slots: int, **settings: float) -> tuple[Scheduler, FakeWorker]:
    core = Scheduler("p", make_policy("laps-sd"), SchedulerSettings(**settings))  # type: ignore[arg-type]
    core.worker_joined(Worker("w", slots, StepCosts(0.002, 0.025), last_seen_s=0.0), [], 0.0)
    fake = FakeWorker("w", slots)
    for number in range(slots + QUEUED):
        core.submit(spec(f"r{number}", max_tokens=4000), 0.0)
    fake.apply(core.tick(0.0))
    return core, fake


def test_a_long_queue_is_ranked_anew_in_several_ticks() -> None:
    core, _ = filled(2)
    policy = core.policy
    assert isinstance(policy, LapsSd)
    policy.knowledge.add("", 256.0, False, tokens=30, steps=10)
    policy._finishes = QUEUED
    moves: list[int] = []
    while len(moves) < 10:
        commit = core.tick(0.2).commit
        moves.append(len([move for move in commit.moves if move.level is not None]))
        core.check_invariants()
        if core.next_timer_s() != 0.2:
            break
    assert len(moves) > 1
    assert max(moves) <= 500
    assert sum(moves) == core.waiting_requests


def test_a_recovered_queue_is_written_anew_in_several_ticks_and_runs_at_once() -> None:
    core, _ = filled(2)
    again = Scheduler("p", make_policy("laps-sd"), SchedulerSettings(), epoch=2)
    again.restore(Recovered(requests=list(core.requests.values())), 1.0)
    again.worker_joined(Worker("w", 2, StepCosts(0.002, 0.025), last_seen_s=1.0), [], 1.0)
    first = again.tick(1.0)
    assert len(first.grants) == 2
    written = {request.request_id for request in first.commit.changed}
    assert len(written) <= 502
    while again.next_timer_s() == 1.0:
        written |= {request.request_id for request in again.tick(1.0).commit.changed}
    assert written == set(again.requests)


def test_with_many_running_each_record_is_written_less_often() -> None:
    slots = 1000
    core, fake = filled(slots, record_interval_s=0.25)
    written = 0
    for step in range(1, 41):
        core.report(fake.step(1), step * 0.05)
        written += len(core.tick(step * 0.05).commit.changed)
    assert 0.5 * MAX_RECORDS_PER_S * 2.0 < written <= 1.1 * MAX_RECORDS_PER_S * 2.0


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


def test_a_recovered_queue_is_taken_over_in_small_steps() -> None:
    core, _ = filled(2)
    stored = Recovered(requests=list(core.requests.values()))
    again = Scheduler("p", make_policy("laps-sd"), SchedulerSettings(), epoch=2)
    taken_over = []
    for _ in again.restoring(stored, 1.0):
        taken_over.append(len(again.requests) - sum(taken_over))
    assert max(taken_over) <= 500
    assert len(again.requests) == len(stored.requests)
    assert again.waiting_requests == len(stored.requests)
    again.check_invariants()


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
