"""A tenant's quota counts what is unfinished, across leaders, and nobody else's."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler_svc.core.policies import make_policy
from scheduler_svc.core.records import Recovered, Refused, Request, RequestSpec, TenantQuota
from scheduler_svc.core.scheduler import Scheduler
from scheduler_svc.core.settings import SchedulerSettings
from scheduler_svc.core.tenants import Tenants


def spec(request_id: str, prompt_tokens: int = 2, max_tokens: int = 8) -> RequestSpec:
    return RequestSpec(request_id, b"\1\0\0\0" * prompt_tokens, max_tokens, digest=request_id)


def scheduler() -> Scheduler:
    return Scheduler("p", make_policy("fcfs"), SchedulerSettings())


def test_requests_and_tokens_are_bounded_per_tenant() -> None:
    core = scheduler()
    two = TenantQuota(max_queued_requests=2)
    core.submit(spec("a:1"), 1.0, two)
    core.submit(spec("a:2"), 1.0, two)
    with pytest.raises(Refused, match="2 requests") as caught:
        core.submit(spec("a:3"), 1.0, two)
    assert caught.value.reason == "TENANT_QUEUE_FULL"
    assert caught.value.retry_after_s
    assert core.get("a:3") is None
    core.submit(spec("b:1"), 1.0, two)
    core.submit(spec("free"), 1.0)
    assert core.submit(spec("a:1"), 1.0, two)[1], "joining one that is there costs nothing"
    tokens = TenantQuota(max_queued_tokens=25)
    with pytest.raises(Refused, match="25"):
        core.submit(spec("a:3"), 1.0, tokens)
    core.cancel("a:1", 2.0)
    core.tick(2.0)
    core.submit(spec("a:3"), 2.0, two)


def test_a_new_leader_counts_what_it_finds() -> None:
    core = scheduler()
    core.restore(Recovered(requests=[Request(spec("a:1"), 1.0), Request(spec("a:2"), 1.0)]), 2.0)
    with pytest.raises(Refused):
        core.submit(spec("a:3"), 2.0, TenantQuota(max_queued_requests=2))


@given(
    st.lists(st.tuples(st.sampled_from(["a", "b", ""]), st.integers(1, 50), st.integers(1, 50)), max_size=30)
)
def test_counts_come_back_to_nothing(requests: list[tuple[str, int, int]]) -> None:
    tenants = Tenants()
    specs = [spec(f"{t}:{i}" if t else str(i), p, m) for i, (t, p, m) in enumerate(requests)]
    for each in specs:
        tenants.add(each)
    for each in specs:
        tenants.remove(each)
    none_left = TenantQuota(max_queued_requests=1, max_queued_tokens=10)
    assert not tenants.problem(spec("a:x"), none_left)
    assert not tenants._held
