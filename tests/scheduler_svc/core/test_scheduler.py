"""A request's life: admitted, run, ended, kept, restored; bounds and order."""

from __future__ import annotations

import pytest

from scheduler_svc import convert
from scheduler_svc.core.records import (
    FinishReason,
    Refused,
    RequestState,
    Retained,
    RevokeReason,
)
from scheduler_svc.core.settings import SchedulerSettings

from .house import FakeWorker, Store, pack, running, scheduler, spec, worker


def test_a_request_runs_and_finishes() -> None:
    core, store, fake = scheduler(), Store(), FakeWorker("w", 1)
    request, joined = core.submit(spec("a", max_tokens=5), 0.0)
    assert request is not None
    assert not joined
    assert request.state is RequestState.QUEUED
    store.apply(core.tick(0.0).commit)
    assert store.waiting == {"a": (0, 1.0)}

    core.worker_joined(worker(), [], 0.1)
    tick = core.tick(0.1)
    store.apply(tick.commit)
    fake.apply(tick)
    assert [(grant.request.request_id, grant.slot, grant.has_context) for grant in tick.grants] == [
        ("a", 0, True)
    ]
    assert tick.grants[0].lease_id >> 32 == 1
    assert not store.waiting
    assert store.leases == {"a": pytest.approx(10.1)}

    core.report(fake.step(3), 0.2)
    store.apply(core.tick(0.2).commit)
    assert store.output("a") == pack(100, 101, 102)
    core.report(fake.step(3), 0.3)
    tick = core.tick(0.3)
    store.apply(tick.commit)
    assert tick.commit.finished == [request]
    assert request.finish_reason is FinishReason.LENGTH
    assert request.output_tokens == 5
    assert request.acceptance_histogram == [0, 1, 1]
    assert request.first_token_s == 0.2
    assert (request.steps, request.attained_s) == (2, pytest.approx(0.064))
    assert not tick.revokes
    assert core.get("a") is None
    assert core.submit(spec("a", max_tokens=5), 0.4) == (None, True)
    kinds = [event.kind for event in tick.commit.events]
    assert kinds == ["finished"]


def test_the_same_id_joins_and_another_body_is_refused() -> None:
    core = scheduler()
    first, _ = core.submit(spec("a"), 0.0)
    assert core.submit(spec("a"), 0.0) == (first, True)
    with pytest.raises(Refused) as refused:
        core.submit(spec("a", digest="other"), 0.0)
    assert refused.value.reason == "ID_CONFLICT"
    core.cancel("a", 0.0)
    assert core.submit(spec("a"), 0.0) == (None, True), "also before the tick"
    with pytest.raises(Refused):
        core.submit(spec("a", digest="other"), 0.0)


def test_bounds_are_checked_before_anything_changes() -> None:
    core = scheduler(max_queued_requests=2, max_queued_tokens=10)
    core.submit(spec("a", prompt_tokens=6), 0.0)
    before = core.backlog_s()
    with pytest.raises(Refused) as refused:
        core.submit(spec("b", prompt_tokens=5), 0.0)
    assert refused.value.reason == "QUEUE_TOKENS_FULL"
    core.submit(spec("b", prompt_tokens=4), 0.0)
    with pytest.raises(Refused) as refused:
        core.submit(spec("c", prompt_tokens=1), 0.0)
    assert refused.value.reason == "QUEUE_FULL"
    assert refused.value.retry_after_s is not None
    assert refused.value.retry_after_s > 0.0
    with pytest.raises(Refused) as refused:
        core.submit(spec("d", deadline_s=1.0), 1.0)
    assert refused.value.reason == "DEADLINE_PASSED"
    assert list(core.requests) == ["a", "b"]
    assert before > 0.0
    core.worker_joined(worker(context_tokens=64), [], 1.0)
    with pytest.raises(Refused) as refused:
        core.submit(spec("e", prompt_tokens=1, max_tokens=64), 1.0)
    assert refused.value.reason == "TOO_LONG"
    assert "64" in str(refused.value)
    core.check_invariants()
    assert core.counters.refused == 4


def test_a_request_too_long_for_the_worker_that_came_later_fails() -> None:
    core = scheduler()
    request, _ = core.submit(spec("a", max_tokens=100), 0.0)
    core.submit(spec("b", max_tokens=10), 0.0)
    core.worker_joined(worker(context_tokens=64), [], 1.0)
    tick = core.tick(1.0)
    assert request is not None
    assert request.finish_reason is FinishReason.ERROR
    assert "64" in request.error
    assert [grant.request.request_id for grant in tick.grants] == ["b"]


def test_cancelling_frees_the_slot_at_the_next_step() -> None:
    core, fake = scheduler(), FakeWorker("w", 1)
    core.submit(spec("a"), 0.0)
    core.submit(spec("b"), 0.0)
    running(core, fake)
    assert core.cancel("unknown", 0.0) is None
    late = fake.step()
    assert core.cancel("a", 0.1) is RequestState.FINISHED
    assert core.cancel("a", 0.1) is RequestState.FINISHED
    core.report(late, 0.1)
    assert core.counters.rows_stale == 1
    tick = core.tick(0.1)
    assert [(revoke.request_id, revoke.reason) for revoke in tick.revokes] == [("a", RevokeReason.ENDED)]
    assert [grant.request.request_id for grant in tick.grants] == ["b"]
    assert [request.finish_reason for request in tick.commit.finished] == [FinishReason.CANCELLED]
    assert not tick.commit.appended
    fake.apply(tick)
    core.cancel("b", 0.2)
    core.submit(spec("c"), 0.2)
    core.cancel("c", 0.2)
    tick = core.tick(0.2)
    assert {request.request_id for request in tick.commit.finished} == {"b", "c"}
    assert [request.request_id for request in tick.commit.submitted] == ["c"]
    core.check_invariants()


def test_a_deadline_ends_a_request_wherever_it_is() -> None:
    core, fake = scheduler(), FakeWorker("w", 1)
    core.submit(spec("runs", deadline_s=5.0), 0.0)
    core.submit(spec("waits", deadline_s=4.0), 0.0)
    running(core, fake)
    assert core.next_timer_s() == pytest.approx(1.25), "the session is renewed first"
    for tenth in range(1, 50):
        core.heartbeat("w", tenth / 10)
        if tick := core.tick(tenth / 10):
            ended = [(request.request_id, tenth) for request in tick.commit.finished]
            assert ended == ([("waits", 40)] if tenth == 40 else [])
    tick = core.tick(5.0)
    assert [request.finish_reason for request in tick.commit.finished] == [FinishReason.DEADLINE]
    assert [revoke.reason for revoke in tick.revokes] == [RevokeReason.ENDED]


def test_higher_priority_goes_first_and_preempts_only_where_the_policy_does() -> None:
    for policy, preempts in (("fcfs", False), ("laps-sd-paper", True)):
        core, fake = scheduler(policy), FakeWorker("w", 1)
        core.submit(spec("low"), 0.0)
        running(core, fake)
        core.submit(spec("low too"), 0.1)
        core.submit(spec("high", priority=1), 0.1)
        assert [request.request_id for request in core.waiting_order()] == ["high", "low too"]
        tick = core.tick(0.1)
        assert [grant.request.request_id for grant in tick.grants] == (["high"] if preempts else [])


def test_retention_is_bounded_in_time_and_number() -> None:
    core = scheduler(retention_s=10.0, max_retained=2)
    for number in range(3):
        core.submit(spec(f"r{number}"), float(number))
        core.cancel(f"r{number}", float(number))
        forgotten = core.tick(float(number)).commit.forgotten
    assert forgotten == ["r0"]
    assert core.next_timer_s() == 11.0
    assert core.tick(11.0).commit.forgotten == ["r1"]
    assert core.retained("r2") == Retained("r2", "digest of r2", 2.0)


def test_restoring_brings_everything_back() -> None:
    store, core, fake = Store(), scheduler(), FakeWorker("w", 1)
    core.worker_joined(worker(), [], 0.0)
    for name in ("a", "b", "c"):
        core.submit(spec(name), 0.0)
    tick = core.tick(0.0)
    store.apply(tick.commit)
    fake.apply(tick)
    core.report(fake.step(2), 0.1)
    core.cancel("c", 0.1)
    store.apply(core.tick(0.1).commit)

    core = scheduler(epoch=2)
    core.restore(store.recover(), 1.0)
    core.check_invariants()
    assert [(request.request_id, request.state.value) for request in core.waiting_order()] == [
        ("a", "preempted"),
        ("b", "queued"),
    ]
    store.apply(core.tick(1.0).commit)
    assert store.waiting.keys() == {"a", "b"}
    assert core.submit(spec("c"), 1.0) == (None, True)
    core.worker_joined(worker(), fake.residents(), 1.1)
    tick = core.tick(1.1)
    assert [(grant.lease_id >> 32, grant.has_context) for grant in tick.grants] == [(2, False)]
    core.submit(spec("d"), 1.2)
    assert [request.arrival_seq for request in core.waiting_order()] == [2, 3]


def test_the_starvation_bound_puts_the_oldest_first() -> None:
    core, fake = scheduler("laps-sd", starvation_bound_s=3.0), FakeWorker("w", 1)
    long, _ = core.submit(spec("long", predicted_output_tokens=500.0, max_tokens=600), 0.0)
    core.submit(spec("short", predicted_output_tokens=5.0, max_tokens=600), 0.5)
    running(core, fake, 0.5)
    assert [request.request_id for request in core.waiting_order()] == ["long"]
    core.submit(spec("short too", predicted_output_tokens=5.0), 1.0)
    core.heartbeat("w", 2.9)
    core.tick(2.9)
    assert [request.request_id for request in core.waiting_order()] == ["short too", "long"]
    core.heartbeat("w", 3.0)
    assert core.next_timer_s() == pytest.approx(3.0)
    tick = core.tick(3.0)
    assert [grant.request for grant in tick.grants] == [long]
    short = core.get("short")
    assert short is not None
    assert short.preempted_because == "long is past the starvation bound"
    core.heartbeat("w", 4.0)
    assert not core.tick(4.0).grants, "it is preempted no more"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("draft_tokens", 0),
        ("draft_tokens", 1.5),
        ("session_timeout_s", 0.0),
        ("starvation_bound_s", -1.0),
        ("lease_duration_s", 1.0),
        ("retention_s", float("nan")),
    ],
)
def test_settings_are_checked(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        SchedulerSettings(**{name: value})  # type: ignore[arg-type]


def test_a_spec_that_no_gateway_lets_through() -> None:
    with pytest.raises(ValueError, match="max_tokens"):
        scheduler().submit(spec("a", max_tokens=0), 0.0)
    with pytest.raises(ValueError, match="slots"):
        scheduler().worker_joined(worker(slots=0), [], 0.0)


def test_a_preempted_request_tells_its_place_in_the_order() -> None:
    core, fake = scheduler("srpt"), FakeWorker("w", 1)
    long, _ = core.submit(spec("long", max_tokens=500, priority=0), 0.0)
    running(core, fake)
    core.submit(spec("urgent", max_tokens=5, priority=5), 0.1)
    (revoke,) = core.tick(0.1).revokes
    assert revoke.request is long
    wire = convert.revoke(revoke)
    assert long is not None
    assert (wire.run_order.priority, wire.run_order.level, wire.run_order.rank) == (0, long.level, long.rank)
