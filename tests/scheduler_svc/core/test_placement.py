"""Whom to preempt: how often that is looked for."""

from __future__ import annotations

import pytest

from scheduler_svc.core.board import MANY_RUNNING, SOUGHT_AFTER_S
from scheduler_svc.core.scheduler import Scheduler

from .house import FakeWorker, scheduler, spec, worker


def full(slots: int) -> tuple[Scheduler, FakeWorker]:
    """All slots are taken, and one more waits: the others have had as little service as it."""
    core, fake = scheduler("las"), FakeWorker("w", slots)
    core.worker_joined(worker(slots=slots), [], 0.0)
    for number in range(slots):
        core.submit(spec(f"r{number}", max_tokens=500), 0.0)
    fake.apply(core.tick(0.0))
    core.submit(spec("waits"), 0.0)
    core.tick(0.0)
    return core, fake


@pytest.mark.parametrize("slots", [4, MANY_RUNNING + 1])
def test_with_many_running_a_step_alone_does_not_have_the_victim_sought_anew(slots: int) -> None:
    """Few: after each step. Many: when the last search has become old, and whenever the slots change."""
    core, fake = full(slots)
    known = core._board.worst
    assert list(known) == ["w"]
    core.report(fake.step(step_s=0.1), 1.0)
    assert list(known) == []
    core.submit(spec("waits too"), 1.0)
    core.tick(1.0)
    core.report(fake.step(step_s=0.1), 1.0 + SOUGHT_AFTER_S / 2)
    assert list(known) == (["w"] if slots > MANY_RUNNING else [])
    core.report(fake.step(step_s=0.4), 1.0 + SOUGHT_AFTER_S)
    assert list(known) == []
    # All who run have come to level 1.
    tick = core.tick(1.0 + SOUGHT_AFTER_S)
    assert {grant.request.request_id for grant in tick.grants} == {"waits", "waits too"}
    assert list(known) == []
    core.check_invariants()


@pytest.mark.parametrize("slots", [4, MANY_RUNNING + 9])
def test_with_many_running_the_victim_is_sought_anew_when_it_leaves_and_not_when_another_does(
    slots: int,
) -> None:
    core, _ = full(slots)
    known = core._board.worst
    found = known["w"]
    assert found is not None
    victim = found[1].request_id
    others = [name for name in core.requests if name not in (victim, "waits")]
    core.cancel(others[0], 0.01)
    assert list(known) == (["w"] if slots > MANY_RUNNING else [])
    core.check_invariants()
    core.cancel(victim, 0.02)
    assert list(known) == []
    core.check_invariants()


@pytest.mark.parametrize("policy", ["laps-sd", "srpt", "las"])
@pytest.mark.parametrize("priority", [10, 5])
@pytest.mark.parametrize("slots", [8, MANY_RUNNING + 9])
def test_whoever_has_come_since_the_victim_was_found_is_preempted_if_its_priority_is_lower(
    slots: int, priority: int, policy: str
) -> None:
    core, fake = scheduler(policy), FakeWorker("w", slots)
    core.worker_joined(worker(slots=slots), [], 0.0)
    for number in range(slots):
        core.submit(spec(f"r{number}", max_tokens=500, priority=5), 0.0)
    fake.apply(core.tick(0.0))
    core.submit(spec("waits", max_tokens=500, priority=5), 0.0)
    core.tick(0.1)  # a victim is sought
    core.report(fake.step(step_s=0.1), 0.2)
    core.submit(spec("waits as well", max_tokens=500, priority=5), 0.2)
    core.tick(0.2)  # and anew, and kept for the next tenth of a second where many run
    known = core._board.worst["w"]
    assert known is not None
    first, second, third = [f"r{number}" for number in range(4) if f"r{number}" != known[1].request_id][:3]
    for request_id in (first, second):
        core.cancel(request_id, 0.21)
    core.tick(0.21)
    core.cancel(third, 0.22)
    core.submit(spec("low", max_tokens=500, priority=0), 0.22)
    core.tick(0.22)
    assert core.get("low").lease_id
    core.submit(spec("new", max_tokens=500, priority=priority), 0.23)
    revoked = [revoke.request_id for revoke in core.tick(0.23).revokes]
    assert revoked == ["low"]
