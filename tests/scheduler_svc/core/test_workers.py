"""Workers that come, go, are silent, let go late, and where their KV cache is."""

from __future__ import annotations

import itertools
import zlib

from scheduler_svc.core.records import (
    Recovered,
    RequestState,
    Resident,
    RevokeReason,
    StepReport,
)

from .house import FakeWorker, Store, pack, running, scheduler, spec, worker


def test_preemption_waits_for_the_worker_to_let_go() -> None:
    core, store, fake = scheduler("laps-sd-paper"), Store(), FakeWorker("w", 1)
    old, _ = core.submit(spec("old", max_tokens=500), 0.0)
    assert old is not None
    core.worker_joined(worker(), [], 0.0)
    tick = core.tick(0.0)
    store.apply(tick.commit)
    fake.apply(tick)
    for step in range(20):
        core.report(fake.step(2), step * 0.032)
        store.apply(core.tick(step * 0.032).commit)
    assert old.level == 1
    core.submit(spec("new"), 1.0)
    late = fake.step(2)
    tick = core.tick(1.0)
    store.apply(tick.commit)
    assert [(revoke.request_id, revoke.reason) for revoke in tick.revokes] == [
        ("old", RevokeReason.PREEMPTED)
    ]
    assert [(grant.request.request_id, grant.slot) for grant in tick.grants] == [("new", 0)]
    assert old.releasing
    assert old.preemptions == 1
    assert "level 0" in old.preempted_because
    core.check_invariants()

    core.report(late, 1.01)
    assert old.output_tokens == 42, "rows that were under way count"
    fake.apply(tick)
    core.report(fake.step(2), 1.04)
    store.apply(core.tick(1.04).commit)
    assert old.state is RequestState.PREEMPTED
    assert not old.releasing
    assert old.kv_resident
    assert "old" in store.waiting

    core.cancel("new", 1.1)
    tick = core.tick(1.1)
    assert [(grant.request.request_id, grant.has_context) for grant in tick.grants] == [("old", False)]
    core.check_invariants()


def test_a_worker_that_never_confirms_a_preemption_loses_the_request_in_time() -> None:
    core, fake = scheduler("laps-sd-paper", lease_duration_s=5.0), FakeWorker("w", 1)
    old, _ = core.submit(spec("old", max_tokens=500), 0.0)
    assert old is not None
    running(core, fake)
    for step in range(20):
        core.report(fake.step(2), step * 0.032)
    core.submit(spec("new", max_tokens=500), 1.0)
    core.tick(1.0)
    assert old.releasing
    for second in range(2, 7):
        core.heartbeat("w", float(second))
        core.tick(float(second))
    assert old.state is RequestState.PREEMPTED
    assert not old.kv_resident
    core.check_invariants()


def test_a_silent_worker_is_lost_and_its_requests_move_on() -> None:
    core, fake = scheduler(session_timeout_s=2.0), FakeWorker("w", 1)
    request, _ = core.submit(spec("a"), 0.0)
    assert request is not None
    running(core, fake)
    core.report(fake.step(), 0.5)
    core.tick(0.5)
    core.worker_joined(worker("v"), [], 2.0)
    assert core.tick(2.0).grants == []
    lost = fake.step()
    tick = core.tick(2.5)
    assert tick.commit.workers_gone == ["w"]
    assert [(grant.worker_id, grant.has_context) for grant in tick.grants] == [("v", True)]
    assert request.preempted_because.startswith("its worker said nothing")
    core.report(lost, 2.6)
    assert core.counters.reports_refused == 1
    assert request.output_tokens == 2


def test_workers_that_joined_together_are_renewed_one_by_one_and_in_time() -> None:
    """A thousand leases renewed in one commit would keep everybody waiting."""
    core = scheduler(session_timeout_s=4.0)
    for number in range(10):
        core.submit(spec(f"r{number}"), 0.0)
        core.worker_joined(worker(f"w{number}"), [], 0.0)
    core.tick(0.0)
    renewed_s: dict[str, list[float]] = {f"w{number}": [0.0] for number in range(10)}
    now_s = 0.0
    while now_s < 20.0:
        for name in renewed_s:
            core.heartbeat(name, now_s)
        due_s = core.next_timer_s()
        assert due_s is not None
        now_s = max(now_s, due_s)
        commit = core.tick(now_s).commit
        assert len(commit.workers) == len(commit.leased) <= 1
        for renewed, expiry_s in commit.workers:
            assert expiry_s >= now_s + 2.0
            renewed_s[renewed.worker_id].append(now_s)
    for instants in renewed_s.values():
        pauses_s = [later - earlier for earlier, later in itertools.pairwise([*instants, now_s])]
        assert max(pauses_s) <= 1.5 + 1e-9
        assert len(instants) > 12


def test_a_worker_that_comes_back_keeps_its_kv_cache() -> None:
    core, fake = scheduler(), FakeWorker("w", 2)
    core.submit(spec("same"), 0.0)
    core.submit(spec("longer"), 0.0)
    running(core, fake)
    core.report(fake.step(), 0.1)
    core.tick(0.1)
    fake.outputs["longer"] += pack(9)
    core.worker_joined(worker("w", 2), [*fake.residents(), Resident("unknown", 1, 0)], 0.2)
    assert not core.tick(0.2).commit.workers_gone, "gone and back within a tick"
    fake.slots = [None, None]
    contexts = {request.request_id: request.kv_resident for request in core.requests.values()}
    assert contexts == {"same": True, "longer": True}
    core.check_invariants()


def test_residents_are_compared_with_what_is_stored() -> None:
    core = scheduler()
    stored = pack(1, 2, 3)
    requests = []
    for name in ("equal", "shorter", "longer", "differs"):
        request, _ = scheduler().submit(spec(name), 0.0)
        assert request is not None
        request.output = bytearray(stored)
        requests.append(request)
    core.restore(Recovered(requests=requests), 1.0)
    held = {"equal": stored, "shorter": pack(1, 2), "longer": pack(1, 2, 3, 4), "differs": pack(1, 2, 4)}
    residents = [Resident(name, len(kv) // 4, zlib.crc32(kv)) for name, kv in held.items()]
    core.worker_joined(worker("w", 4), residents, 1.0)
    tick = core.tick(1.0)
    contexts = {grant.request.request_id: grant.has_context for grant in tick.grants}
    # The one that is ahead of the store compares for itself, by the digest in the grant.
    assert contexts == {"equal": False, "shorter": True, "longer": False, "differs": True}
    assert {revoke.request_id for revoke in tick.revokes} == {"differs"}


def test_placement_prefers_the_worker_that_holds_the_kv_cache() -> None:
    core = scheduler()
    request, _ = scheduler().submit(spec("a"), 0.0)
    assert request is not None
    request.output = bytearray(pack(7))
    core.restore(Recovered(requests=[request]), 0.0)
    core.worker_joined(worker("many", 4), [], 0.0)
    core.worker_joined(worker("holder", 1), [Resident("a", 1, zlib.crc32(pack(7)))], 0.0)
    assert [(grant.worker_id, grant.has_context) for grant in core.tick(0.0).grants] == [("holder", False)]


def test_a_draining_worker_gets_nothing_new() -> None:
    core, fake = scheduler(), FakeWorker("w", 2)
    core.submit(spec("a", max_tokens=2), 0.0)
    running(core, fake)
    core.worker_draining("w", 0.1)
    core.submit(spec("b"), 0.1)
    assert not core.tick(0.1).grants
    core.report(fake.step(2), 0.2)
    tick = core.tick(0.2)
    assert len(tick.commit.finished) == 1
    assert not tick.grants
    core.worker_left("w", 0.3)
    assert core.tick(0.3).commit.workers_gone == ["w"]


def test_missing_kv_cache_is_sent_again_under_the_same_lease() -> None:
    core, fake = scheduler(), FakeWorker("w", 1)
    core.submit(spec("a"), 0.0)
    running(core, fake)
    lease_id = next(iter(core.requests.values())).lease_id
    core.report(StepReport("w", missing=[lease_id, 999]), 0.1)
    tick = core.tick(0.1)
    assert [(grant.lease_id, grant.slot, grant.has_context) for grant in tick.grants] == [(lease_id, 0, True)]


def test_evicted_kv_cache_is_sent_with_the_next_grant() -> None:
    core, fake = scheduler(), FakeWorker("w", 1)
    request, _ = core.submit(spec("a"), 0.0)
    assert request is not None
    running(core, fake)
    core.report(StepReport("w", released=[request.lease_id], evicted=["a", "b"]), 0.1)
    assert request.state is RequestState.PREEMPTED
    assert [grant.has_context for grant in core.tick(0.1).grants] == [True]
