"""A worker that lives but does not say that it let go of a preempted request."""

from __future__ import annotations

from scheduler_svc.core.records import RevokeReason

from .house import FakeWorker, scheduler, spec, worker


def test_who_never_confirmed_is_told_to_forget_the_request() -> None:
    core = scheduler("srpt", lease_duration_s=5.0, session_timeout_s=5.0)
    core.worker_joined(worker("w0"), [], 0.0)
    core.submit(spec("long", max_tokens=50), 0.0)
    silent = FakeWorker("w0", 1)
    silent.apply(core.tick(0.0))
    core.report(silent.step(2), 0.1)
    core.tick(0.1)
    core.submit(spec("urgent", priority=1), 0.2)
    (revoke,) = core.tick(0.2).revokes
    assert (revoke.request_id, revoke.reason) == ("long", RevokeReason.PREEMPTED)
    core.heartbeat("w0", 4.9)
    tick = core.tick(5.3)
    # It may run elsewhere now: nobody would ever tell this worker that it has ended.
    (forget,) = tick.revokes
    assert (forget.worker_id, forget.request_id, forget.reason) == ("w0", "long", RevokeReason.ENDED)
    assert core.get("long") is not None
    assert not core.get("long").kv_resident
    core.check_invariants()
