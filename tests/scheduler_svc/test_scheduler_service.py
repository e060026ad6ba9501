"""Following at the scheduler: one request must not hold up the others of its gateway's stream."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from laps.history import HistoryPoint
from laps.v1 import generation_pb2, scheduler_pb2
from scheduler_svc import convert, scheduler_service
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
    leader, follower = leader_of(store), Follower()
    spec = scheduler_pb2.RequestSpec(
        request_id="a",
        prompt_token_ids=b"\1\0\0\0",
        stopping=generation_pb2.StoppingParams(max_tokens=9, stop=["logprobs"]),
    )
    leader.core.submit(convert.request_spec(spec), 0.0)
    request = leader.core.requests["a"]
    request.output[:] = OUTPUT
    leader.hub.restored([request], 0.0)
    assert await asyncio.wait_for(service_of(store)._follow_live(leader, follower, "a", 0), 5)
    assert store.log_readings == 0
    message = await asyncio.wait_for(follower.next_message(), 5)
    assert message is not None
    assert message.token_ids == OUTPUT


async def test_a_damaged_record_is_one_request_less_and_not_the_end_of_the_stream() -> None:
    store = Store()
    leader, follower = leader_of(store), Follower()
    await service_of(store)._follow_ended(leader, follower, "a", 0)
    message = await asyncio.wait_for(follower.next_message(), 5)
    assert message is not None
    assert list(message.unknown) == ["a"]


async def test_a_store_that_knows_less_of_an_end_than_was_told_counts_as_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It went back to an earlier state, and no commit has noticed yet."""
    store = Store()
    leader, follower = leader_of(store), Follower()
    spec = scheduler_pb2.RequestSpec(request_id="a", prompt_token_ids=b"\1\0\0\0")
    unfinished = Request(convert.request_spec(spec), arrival_s=0.0, arrival_seq=1)

    async def read_request(request_id: str) -> Request | None:
        return unfinished

    monkeypatch.setattr(store, "read_request", read_request)
    with pytest.raises(StoreUnavailable, match="has not ended"):
        await service_of(store)._follow_ended(leader, follower, "a", 0)


class Gateway:
    """What a gateway writes to its stream, in place of the call's context."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[Any] = asyncio.Queue()

    async def read(self) -> Any:
        return await self.messages.get()

    def follow(self, *request_ids: str) -> None:
        follows = [scheduler_pb2.Follow(request_id=request_id) for request_id in request_ids]
        self.messages.put_nowait(scheduler_pb2.DeliverRequest(follow=follows))

    def unfollow(self, *request_ids: str) -> None:
        unfollows = [scheduler_pb2.Unfollow(request_id=request_id) for request_id in request_ids]
        self.messages.put_nowait(scheduler_pb2.DeliverRequest(unfollow=unfollows))

    def end(self) -> None:
        self.messages.put_nowait(grpc.aio.EOF)  # type: ignore[attr-defined]


class SlowStore(Store):
    """Answers when the test says so. Whatever has ended it does not know any more."""

    def __init__(self) -> None:
        super().__init__()
        self.answers = asyncio.Event()
        self.asked: list[str] = []

    async def read_request(self, request_id: str) -> Request | None:
        self.asked.append(request_id)
        await self.answers.wait()
        return None


def submit(leader: Leader, *request_ids: str) -> None:
    for request_id in request_ids:
        spec = scheduler_pb2.RequestSpec(
            request_id=request_id,
            prompt_token_ids=b"\1\0\0\0",
            stopping=generation_pb2.StoppingParams(max_tokens=9),
        )
        leader.core.submit(convert.request_spec(spec), 0.0)


async def test_live_requests_are_followed_before_the_store_is_asked_for_those_that_have_ended() -> None:
    """A gateway that comes back asks for all, the oldest first. Whom nobody follows in time is cancelled."""
    store, gateway, follower = SlowStore(), Gateway(), Follower()
    leader = leader_of(store)
    settlings = 0

    async def settled() -> None:
        nonlocal settlings
        settlings += 1

    leader.settled = settled  # type: ignore[method-assign]
    submit(leader, "live-1", "live-2")
    leader.hub.restored(leader.core.requests.values(), 0.0)
    gateway.follow("ended-1", "ended-2", "ended-3", "live-1")
    gateway.follow("ended-4", "live-2")
    service: Any = service_of(store)
    reading = asyncio.create_task(service._read_follows(leader, follower, gateway))
    async with asyncio.timeout(60):
        while not {"live-1", "live-2"} <= follower.followed:  # noqa: ASYNC110
            await asyncio.sleep(0)
        while not store.asked:  # noqa: ASYNC110
            await asyncio.sleep(0)
    assert leader.hub.take_abandoned(100.0) == []
    assert store.asked == ["ended-1"]
    gateway.unfollow("ended-2")
    gateway.end()
    while not gateway.messages.empty():  # noqa: ASYNC110
        await asyncio.sleep(0)
    store.answers.set()
    await asyncio.wait_for(reading, 60)
    assert store.asked == ["ended-1", "ended-3", "ended-4"]
    assert settlings <= 2
    message = await asyncio.wait_for(follower.next_message(), 60)
    assert message is not None
    assert list(message.unknown) == store.asked


async def test_who_asks_for_very_many_that_have_ended_is_not_read_until_some_are_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scheduler_service, "MOST_ENDED", 2)
    store, gateway, follower = SlowStore(), Gateway(), Follower()
    leader = leader_of(store)

    async def settled() -> None:
        return None

    leader.settled = settled  # type: ignore[method-assign]
    gateway.follow("a", "b", "c", "d", "e")
    gateway.follow("f")
    gateway.end()
    service: Any = service_of(store)
    reading = asyncio.create_task(service._read_follows(leader, follower, gateway))
    async with asyncio.timeout(60):
        while not store.asked:  # noqa: ASYNC110
            await asyncio.sleep(0)
    for _ in range(20):
        await asyncio.sleep(0)
    assert gateway.messages.qsize() == 2
    store.answers.set()
    await asyncio.wait_for(reading, 60)
    assert store.asked == list("abcdef")


async def test_a_store_that_is_away_while_it_is_asked_ends_the_stream() -> None:
    class AwayStore(Store):
        async def read_request(self, request_id: str) -> Request | None:
            raise StoreUnavailable("away")

    store, gateway = AwayStore(), Gateway()
    leader = leader_of(store)

    async def settled() -> None:
        return None

    leader.settled = settled  # type: ignore[method-assign]
    gateway.follow("a")
    service: Any = service_of(store)
    with pytest.raises(StoreUnavailable):
        await asyncio.wait_for(service._read_follows(leader, Follower(), gateway), 60)
