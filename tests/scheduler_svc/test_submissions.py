"""Submissions in a stream: stored before they are acknowledged, refused one by one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from laps import channels, errors
from laps.v1 import generation_pb2, scheduler_pb2, scheduler_pb2_grpc
from scheduler_svc import submissions
from scheduler_svc.core.policies import make_policy
from scheduler_svc.core.scheduler import Scheduler
from scheduler_svc.core.settings import SchedulerSettings
from scheduler_svc.leader import Leader
from scheduler_svc.scheduler_service import SchedulerService
from tests.doubles import Instead
from tests.servers import listening


class Term:
    """A leader whose store answers when the test says so."""

    def __init__(self) -> None:
        core = Scheduler("p", make_policy("fcfs"), SchedulerSettings(max_queued_requests=3))
        store: Any = SimpleNamespace()
        self.leader = Leader(core, store, epoch=5, tick_interval_s=0.0, gateway_grace_s=5.0, leader_ttl_s=3.0)
        self.stored = asyncio.Event()
        self.over = False
        self.leads = True
        self.refused: list[str] = []
        self.leader.settled = self._settled  # type: ignore[method-assign]
        terms: Any = SimpleNamespace(
            pool="p",
            store_full=False,
            leader_or_abort=self._leader,
            leader_or_raise=self._leader_or_raise,
            not_leading=lambda: errors.Unavailable("gone", reason=errors.Reason.NOT_LEADER),
        )
        self.service = SchedulerService(terms, lambda method, status: self.refused.append(status))

    async def _settled(self) -> None:
        await self.stored.wait()
        if self.over:
            raise asyncio.CancelledError

    async def _leader(self, context: Any) -> Leader:
        return self.leader

    def _leader_or_raise(self) -> Leader:
        if not self.leads:
            raise errors.Unavailable("gone", reason=errors.Reason.NOT_LEADER)
        return self.leader


@asynccontextmanager
async def stream_of(term: Term) -> AsyncIterator[Any]:
    server = channels.new_server()
    scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(term.service, server)
    async with listening(server) as port, channels.open_channel(f"127.0.0.1:{port}") as channel:
        call: Any = scheduler_pb2_grpc.SchedulerServiceStub(channel).SubmitMany()  # type: ignore[call-arg]
        yield call
        call.cancel()


def message(*ids: str, **spec: Any) -> scheduler_pb2.SubmitManyRequest:
    made = scheduler_pb2.SubmitManyRequest()
    for number, request_id in enumerate(ids, 1):
        asked = scheduler_pb2.RequestSpec(
            request_id=request_id,
            prompt_token_ids=b"\1\0\0\0",
            stopping=generation_pb2.StoppingParams(max_tokens=9),
            digest=bytes(32),
            **spec,
        )
        made.submissions.add(number=number, request=scheduler_pb2.SubmitRequest(spec=asked, gateway_id="g"))
    return made


async def answers(call: Any, count: int) -> dict[int, scheduler_pb2.SubmitAnswer]:
    found: dict[int, scheduler_pb2.SubmitAnswer] = {}
    while len(found) < count:
        response = await asyncio.wait_for(call.read(), 60)
        found |= {answer.number: answer for answer in response.answers}
    return found


async def until_taken(term: Term, request_id: str) -> None:
    async with asyncio.timeout(60):
        while term.leader.core.get(request_id) is None:  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def refusal(answer: scheduler_pb2.SubmitAnswer) -> errors.LapsError:
    return errors.from_rpc_error(errors.rpc_error_of(answer.refused))


async def test_nothing_is_acknowledged_before_it_is_stored() -> None:
    term = Term()
    async with stream_of(term) as call:
        await call.write(message("a", "b"))
        reading = asyncio.ensure_future(answers(call, 2))
        await until_taken(term, "b")
        assert not reading.done()
        term.stored.set()
        found = await reading
        assert [found[number].stored.epoch for number in (1, 2)] == [5, 5]
        # The same again is no second request.
        await call.write(message("a"))
        assert (await answers(call, 1))[1].stored.joined


@pytest.mark.parametrize("stepped_s", [-600.0, 0.0, 3600.0])
async def test_a_step_of_the_hosts_clock_leaves_requests_the_time_that_they_were_given(
    monkeypatch: pytest.MonkeyPatch, stepped_s: float
) -> None:
    """A deadline comes by the host's clock; the leader's goes on from where it was when the term began."""
    term = Term()
    term.stored.set()
    term.leader.now_s = lambda: 1000.0  # type: ignore[assignment]
    host_s = 1000.0 + stepped_s
    monkeypatch.setattr(submissions, "time", SimpleNamespace(time=lambda: host_s))
    async with stream_of(term) as call:
        await call.write(message("a", deadline_s=host_s + 30.0))
        assert (await answers(call, 1))[1].HasField("stored")
        request = term.leader.core.get("a")
        assert request is not None
        assert request.spec.deadline_s == pytest.approx(1030.0)
        await call.write(message("late", deadline_s=host_s - 1.0))
        assert refusal((await answers(call, 1))[1]).status == "DEADLINE_EXCEEDED"


async def test_who_is_refused_harms_nobody_else_and_is_told_at_once() -> None:
    term = Term()
    async with stream_of(term) as call:
        await call.write(message("a", "b", "c", "one-too-many"))
        refused = await answers(call, 1)
        assert list(refused) == [4]
        assert refusal(refused[4]).reason is errors.Reason.QUEUE_FULL
        assert (refusal(refused[4]).retry_after_s or 0) > 0
        term.stored.set()
        assert sorted(await answers(call, 3)) == [1, 2, 3]
        await call.write(message("bad", priority=101))
        error = refusal((await answers(call, 1))[1])
        assert error.status == "INVALID_ARGUMENT"
        assert error.violations[0].field == "spec.priority"
        assert term.refused == ["INVALID_ARGUMENT"]


async def test_a_defect_is_one_requests_answer_and_not_the_end_of_the_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    term = Term()
    term.stored.set()
    submit = term.leader.core.submit

    def broken(spec: Any, *rest: Any) -> Any:
        if spec.request_id == "b":
            raise ZeroDivisionError("private")
        return submit(spec, *rest)

    monkeypatch.setattr(term.leader, "core", Instead(term.leader.core, submit=broken))
    async with stream_of(term) as call:
        await call.write(message("a", "b", "c"))
        found = await answers(call, 3)
        assert [found[number].HasField("stored") for number in (1, 2, 3)] == [True, False, True]
        error = refusal(found[2])
        assert error.status == "INTERNAL"
        assert "private" not in error.message


async def test_a_long_message_is_answered_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submissions, "MOST_AT_ONCE", 1)
    term = Term()
    term.stored.set()
    async with stream_of(term) as call:
        await call.write(message("a", "b", "c", "d"))
        found = await answers(call, 4)
        assert [found[number].HasField("stored") for number in (1, 2, 3, 4)] == [True, True, True, False]


@pytest.mark.parametrize("when", ["before", "while it is stored"])
async def test_when_the_term_is_over_all_are_told_to_ask_again(when: str) -> None:
    term = Term()
    term.over, term.leads = True, when != "before"
    term.stored.set()
    async with stream_of(term) as call:
        await call.write(message("a", "b"))
        found = await answers(call, 2)
        assert {refusal(answer).reason for answer in found.values()} == {errors.Reason.NOT_LEADER}


async def test_of_a_gateway_that_reads_no_answers_no_more_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submissions, "MOST_UNREAD", 2)
    term = Term()
    async with stream_of(term) as call:
        for name in "abc":
            await call.write(message(name))
        await until_taken(term, "b")
        term.stored.set()
        # Both have been answered, so the third is read as well.
        assert len(await answers(call, 1)) == 1
        await until_taken(term, "c")
