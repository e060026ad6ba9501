"""Following at the scheduler: one request must not hold up the others of its gateway's stream."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from laps.history import HistoryPoint
from laps.v1 import generation_pb2, scheduler_pb2
from scheduler_svc import convert
from scheduler_svc.core.policies import make_policy
from scheduler_svc.core.records import Request
from scheduler_svc.core.scheduler import Scheduler
from scheduler_svc.core.settings import SchedulerSettings
from scheduler_svc.deliveries import Follower
from scheduler_svc.leader import Leader
from scheduler_svc.scheduler_service import SchedulerService
from scheduler_svc.store.errors import RecordDamaged, StoreUnavailable

OUTPUT = b"\1\0\0\0\2\0\0\0"


class Store:
    """Its log is behind the journal, as it mostly is while a request runs."""

    def __init__(self) -> None:
        self.seen = HistoryPoint(1, 1, 5)
        self.log_readings = 0

    async def read_log(self, request_id: str, offset: int) -> tuple[bytes, bytes]:
        self.log_readings += 1
        await asyncio.sleep(0)
        return b"", b""

    async def read_request(self, request_id: str) -> Request | None:
        raise RecordDamaged(f"RECORD_DAMAGED {request_id}")

    async def renew(self) -> None:
        return None


def leader_of(store: Any) -> Leader:
    core = Scheduler("p", make_policy("fcfs"), SchedulerSettings())
    return Leader(core, store, epoch=1, tick_interval_s=0.0, gateway_grace_s=5.0, leader_ttl_s=3.0)


def service_of(store: Any) -> SchedulerService:
    terms: Any = SimpleNamespace(store=store, pool="p")
    return SchedulerService(terms)


async def test_a_stop_string_is_not_taken_for_a_wish_for_log_probabilities() -> None:
    store = Store()
    leader, follower = leader_of(store), Follower("g")
    spec = scheduler_pb2.RequestSpec(
        request_id="a",
        prompt_token_ids=b"\1\0\0\0",
        stopping=generation_pb2.StoppingParams(max_tokens=9, stop=["logprobs"]),
    )
    leader.core.submit(convert.request_spec(spec), 0.0)
    request = leader.core.requests["a"]
    request.output[:] = OUTPUT
    leader.hub.restored([request], 0.0)
    await asyncio.wait_for(service_of(store)._follow(leader, follower, "a", 0), 5)
    assert store.log_readings == 0
    message = await asyncio.wait_for(follower.next_message(), 5)
    assert message is not None
    assert message.token_ids == OUTPUT


async def test_a_damaged_record_is_one_request_less_and_not_the_end_of_the_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = Store()
    leader, follower = leader_of(store), Follower("g")

    async def settled() -> None:
        return None

    monkeypatch.setattr(leader, "settled", settled)
    await service_of(store)._follow(leader, follower, "a", 0)
    message = await asyncio.wait_for(follower.next_message(), 5)
    assert message is not None
    assert list(message.unknown) == ["a"]


async def test_a_store_that_knows_less_of_an_end_than_was_told_counts_as_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It went back to an earlier state, and no commit has noticed yet."""
    store = Store()
    leader, follower = leader_of(store), Follower("g")
    spec = scheduler_pb2.RequestSpec(request_id="a", prompt_token_ids=b"\1\0\0\0")
    unfinished = Request(convert.request_spec(spec), arrival_s=0.0, arrival_seq=1)

    async def read_request(request_id: str) -> Request | None:
        return unfinished

    async def settled() -> None:
        return None

    monkeypatch.setattr(store, "read_request", read_request)
    monkeypatch.setattr(leader, "settled", settled)
    with pytest.raises(StoreUnavailable, match="has not ended"):
        await service_of(store)._follow(leader, follower, "a", 0)
