"""Whom to preempt: how often that is looked for."""

from __future__ import annotations

import random

import pytest

from scheduler_svc.core import placement
from scheduler_svc.core.board import MANY_RUNNING, SOUGHT_AFTER_S
from scheduler_svc.core.records import FinishReason, Refused, Tick
from scheduler_svc.core.scheduler import Scheduler

from .house import FakeWorker, Store, scheduler, spec, worker


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


# --- Workers whose contexts differ --------------------------------------------------------


def granted(tick: Tick) -> dict[str, str]:
    return {grant.request.request_id: grant.worker_id for grant in tick.grants}


def large_and_small(policy: str = "fcfs", slots: int = 1) -> Scheduler:
    core = scheduler(policy)
    core.worker_joined(worker("large", slots, context_tokens=8000), [], 0.0)
    core.worker_joined(worker("small", slots, context_tokens=4000), [], 0.0)
    return core


def test_who_has_room_on_a_busy_worker_alone_waits_and_keeps_nobody_back() -> None:
    core = large_and_small()
    core.submit(spec("first", max_tokens=7000), 0.0)
    assert granted(core.tick(0.0)) == {"first": "large"}
    core.submit(spec("long", max_tokens=5000), 1.0)
    core.submit(spec("longer", max_tokens=6000), 1.0)
    core.submit(spec("short", max_tokens=100), 1.0)
    core.submit(spec("shorter", max_tokens=10), 1.0)
    assert granted(core.tick(1.0)) == {"short": "small"}
    core.check_invariants()
    assert [request.request_id for request in core.waiting_order()] == ["long", "longer", "shorter"]
    core.cancel("first", 2.0)
    assert granted(core.tick(2.0)) == {"long": "large"}
    core.cancel("short", 3.0)
    assert granted(core.tick(3.0)) == {"shorter": "small"}
    core.check_invariants()


def test_the_search_past_those_who_wait_for_room_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    core = large_and_small()
    core.submit(spec("first", max_tokens=7000), 0.0)
    core.tick(0.0)
    for number in range(placement.MOST_PASSED_OVER):
        core.submit(spec(f"long-{number}", max_tokens=5000), 1.0)
    core.submit(spec("short"), 1.0)
    assert granted(core.tick(1.0)) == {}
    core.cancel("long-7", 2.0)
    assert granted(core.tick(2.0)) == {"short": "small"}
    core.check_invariants()


@pytest.mark.parametrize("joins", [["large", "small"], ["small", "large"]])
def test_the_pools_context_is_that_of_the_largest_worker_whoever_came_last(joins: list[str]) -> None:
    core = scheduler()
    for name in joins:
        core.worker_joined(worker(name, context_tokens=8000 if name == "large" else 4000), [], 0.0)
    assert core.context_tokens == 8000
    core.submit(spec("fits", max_tokens=7000), 0.0)
    with pytest.raises(Refused, match="8000"):
        core.submit(spec("too long", max_tokens=8000), 0.0)
    assert granted(core.tick(0.0)) == {"fits": "large"}
    core.worker_left("large", 1.0)
    assert core.context_tokens == 4000


def test_who_is_longer_than_every_context_fails_at_once() -> None:
    core = scheduler()
    core.submit(spec("a", max_tokens=9000), 0.0)
    core.worker_joined(worker("large", context_tokens=8000), [], 0.0)
    core.worker_joined(worker("small", context_tokens=4000), [], 0.0)
    [failed] = core.tick(0.0).commit.finished
    assert failed.finish_reason is FinishReason.ERROR
    assert "8000" in failed.error


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_worker_with_a_larger_context_is_given_time_to_come_back(comes_back: bool) -> None:
    core = large_and_small()
    core.submit(spec("long", max_tokens=7000), 0.0)
    core.tick(0.0)
    core.worker_left("large", 1.0)
    core.submit(spec("short"), 1.0)
    assert granted(core.tick(1.0)) == {"short": "small"}
    core.cancel("short", 1.0)
    assert not core.tick(1.1).grants
    assert core.get("long") is not None
    until_s = 1.0 + core.settings.lease_duration_s
    now_s = 1.1
    while now_s < until_s - 1.0:
        now_s += 1.0
        core.heartbeat("small", now_s)
        assert not core.tick(now_s).commit.finished
    if comes_back:
        core.worker_joined(worker("large", context_tokens=8000), [], now_s)
        assert granted(core.tick(now_s)) == {"long": "large"}
        return
    core.heartbeat("small", until_s - 0.01)
    due_s = core.next_timer_s()
    assert due_s is not None
    assert due_s <= until_s
    [failed] = core.tick(until_s).commit.finished
    assert (failed.request_id, failed.finish_reason) == ("long", FinishReason.ERROR)
    assert "4000" in failed.error
    core.check_invariants()


def test_after_a_takeover_the_workers_may_come_back_in_any_order() -> None:
    core, store = large_and_small(), Store()
    core.submit(spec("long", max_tokens=7000), 0.0)
    store.apply(core.tick(0.0).commit)
    after = scheduler(epoch=2)
    after.restore(store.recover(), 1.0)
    after.worker_joined(worker("small", context_tokens=4000), [], 2.0)
    assert not after.tick(2.0).commit.finished
    after.worker_joined(worker("large", context_tokens=8000), [], 3.0)
    assert granted(after.tick(3.0)) == {"long": "large"}


def test_room_is_made_where_there_is_room() -> None:
    core = large_and_small("las", slots=2)
    fakes = [FakeWorker(name, 2) for name in ("large", "small")]
    for name, priority in (("a", 1), ("b", 1), ("c", 0), ("d", 0)):
        core.submit(spec(name, priority=priority, max_tokens=500), 0.0)
    tick = core.tick(0.0)
    for fake in fakes:
        fake.apply(tick)
    running = {request.request_id: request.worker_id for request in core.requests.values()}
    # The lowest of all would be one of those on the small worker, if it had room.
    core.submit(spec("long", priority=2, max_tokens=5000), 1.0)
    tick = core.tick(1.0)
    assert granted(tick) == {"long": "large"}
    [revoke] = tick.revokes
    assert running[revoke.request_id] == "large"
    core.check_invariants()


def test_who_waits_for_room_keeps_nobody_from_making_room_elsewhere() -> None:
    core = large_and_small("las")
    core.submit(spec("first", priority=5, max_tokens=5000), 0.0)
    core.submit(spec("second", priority=0), 0.0)
    assert granted(core.tick(0.0)) == {"first": "large", "second": "small"}
    core.submit(spec("long", priority=4, max_tokens=5000), 1.0)
    assert not core.tick(1.0).grants
    core.submit(spec("short", priority=3), 2.0)
    assert granted(core.tick(2.0)) == {"short": "small"}
    core.check_invariants()


@pytest.mark.parametrize("policy", ["laps-sd", "las", "fcfs"])
@pytest.mark.parametrize("seed", range(5))
def test_where_all_have_room_everywhere_nothing_is_decided_otherwise(policy: str, seed: int) -> None:
    """Contexts that differ by what no request needs are looked at, and change nothing."""
    chance = random.Random(seed)
    decided: list[list[tuple[object, ...]]] = []
    jobs = [(chance.randrange(20), 2 + chance.randrange(60), chance.randrange(2)) for _ in range(40)]
    for contexts in ((4000, 4000), (4000, 4001)):
        core, told = scheduler(policy), []
        fakes = []
        for number, tokens in enumerate(contexts):
            core.worker_joined(worker(f"w{number}", 3, context_tokens=tokens), [], 0.0)
            fakes.append(FakeWorker(f"w{number}", 3))
        for turn in range(150):
            now_s = 0.05 * turn
            for number, (arrival, max_tokens, priority) in enumerate(jobs):
                if arrival == turn:
                    core.submit(spec(f"r{number}", max_tokens=max_tokens, priority=priority), now_s)
            for fake in fakes:
                core.report(fake.step(2), now_s)
            tick = core.tick(now_s)
            for fake in fakes:
                fake.apply(tick)
            told += [(turn, grant.request.request_id, grant.worker_id, grant.slot) for grant in tick.grants]
            told += [(turn, revoke.request_id, revoke.reason) for revoke in tick.revokes]
        assert not core.requests
        decided.append(told)
    assert decided[0] == decided[1]
