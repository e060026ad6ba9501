"""Whatever workers, gateways and the store say: refused, logged, counted, and nobody else suffers."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from laps import channels
from laps.errors import InvalidArgument, from_rpc_error
from laps.v1 import generation_pb2, scheduler_pb2, worker_pb2, worker_pb2_grpc
from scheduler_svc import checks, convert
from scheduler_svc.core.records import FinishReason, RequestState
from scheduler_svc.metrics import Refusals
from scheduler_svc.scheduler_service import SchedulerService
from scheduler_svc.worker_service import WorkerService
from tests.fuzz.seeds import LEASE, SEEDS, report
from tests.fuzz.targets import TARGETS, VOCABULARY, after_any_report, pool
from tests.servers import listening

quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
UINT32 = st.one_of(st.integers(0, 5), st.integers(0, 2**32 - 1))
COLUMN = st.lists(UINT32, max_size=4)


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_any_bytes(name: str) -> None:
    good = st.sampled_from(SEEDS[name])
    cut = st.builds(
        lambda seed, at, junk: seed[:at] + junk, good, st.integers(0, 200), st.binary(max_size=30)
    )
    flipped = st.builds(
        lambda seed, at, byte: seed[: at % len(seed)] + bytes([byte]) + seed[at % len(seed) + 1 :],
        good,
        st.integers(0, 10_000),
        st.integers(0, 255),
    )

    @quick
    @given(st.one_of(st.binary(max_size=200), cut, flipped))
    def throw(data: bytes) -> None:
        TARGETS[name](data)

    throw()


@quick
@given(
    leases=st.lists(st.sampled_from([LEASE, LEASE + 1, 0, 7]), max_size=4),
    columns=st.tuples(COLUMN, COLUMN, COLUMN, COLUMN),
    tokens=st.lists(st.one_of(st.integers(0, VOCABULARY - 1), UINT32), max_size=6),
    rows=st.lists(st.tuples(UINT32, st.sampled_from(list(generation_pb2.FinishReason.values()))), max_size=3),
    released=COLUMN,
    step_s=st.floats(),
)
def test_a_worker_may_say_what_it_likes(
    leases: list[int], columns: Any, tokens: list[int], rows: Any, released: list[int], step_s: float
) -> None:
    offsets, emitted, drafted, accepted = columns
    message = worker_pb2.StepReport(
        epoch=1,
        step=1,
        lease_ids=leases,
        offsets=offsets,
        emitted_counts=emitted,
        drafted_counts=drafted,
        accepted_counts=accepted,
        token_ids=b"".join(token.to_bytes(4, "little") for token in tokens),
        finishes=[worker_pb2.RowFinish(row=row, reason=reason) for row, reason in rows],
        released_lease_ids=[LEASE + entry % 3 for entry in released],
        missing_lease_ids=[LEASE + entry % 3 for entry in released],
        errors=[worker_pb2.RowError(lease_id=LEASE + 1, message="no")],
        timings=worker_pb2.StepTimings(step_s=step_s),
        evicted_request_ids=["honest", "lied-about", "x"],
    )
    TARGETS["worker"](worker_pb2.SessionRequest(report=message).SerializeToString())


LIES = {
    "more tokens than were accepted": {"emitted_counts": [2], "accepted_counts": [0]},
    "more accepted than drafted": {"accepted_counts": [4]},
    "a gap": {"offsets": [5]},
    "fewer tokens than counted": {"token_ids": b"\2\0\0\0"},
    "half a token": {"token_ids": b"\2\0\0\0\3\0\0"},
    "columns of different lengths": {"offsets": [0, 0]},
    "one lease twice": {"lease_ids": [LEASE, LEASE], "offsets": [0, 0], "emitted_counts": [1, 1]},
    "a token outside the vocabulary": {"token_ids": b"\2\0\0\0" + VOCABULARY.to_bytes(4, "little")},
    "a token of 32 bits": {"token_ids": b"\xff\xff\xff\xff\3\0\0\0"},
}


@pytest.mark.parametrize("lie", list(LIES))
def test_a_lie_is_refused_and_counted(lie: str) -> None:
    message = report()
    for name, value in LIES[lie].items():
        message.ClearField(name)  # type: ignore[arg-type]
        if isinstance(value, bytes):
            message.token_ids = value
        else:
            getattr(message, name).extend(value)
    core, neighbour = pool()
    victim = core.get("lied-about")
    assert victim is not None
    before = core.counters.rows_refused + core.counters.reports_refused
    core.report(convert.step_report("liar", message), 2.0)
    assert core.counters.rows_refused + core.counters.reports_refused > before
    assert victim.output == b"", "nothing of it is believed"
    assert victim.lease_id == 0
    after_any_report(core)
    assert core.get("honest") is neighbour
    for _ in range(2):
        core.report(convert.step_report("liar", _again(message, victim.lease_id)), 2.5)
        after_any_report(core)
    assert victim.state is RequestState.FINISHED
    assert victim.finish_reason is FinishReason.ERROR, "it is given up, with a reason"
    assert victim.error


def _again(message: worker_pb2.StepReport, lease_id: int) -> worker_pb2.StepReport:
    copy = worker_pb2.StepReport()
    copy.CopyFrom(message)
    copy.lease_ids[:] = [lease_id] * len(message.lease_ids)
    return copy


def test_a_row_with_a_bad_token_does_not_hurt_the_rows_beside_it() -> None:
    core, _ = pool()
    core.submit(convert.request_spec(_spec("second")), 2.0)
    core.worker_joined(convert.worker(_hello(slots=2, worker_id="wide", vocabulary_size=VOCABULARY)), [], 2.0)
    core.submit(convert.request_spec(_spec("third")), 2.0)
    core.tick(2.0)
    second, third = core.get("second"), core.get("third")
    assert second is not None
    assert third is not None
    bad = VOCABULARY.to_bytes(4, "little")
    message = worker_pb2.StepReport(
        lease_ids=[second.lease_id, third.lease_id],
        offsets=[0, 0],
        emitted_counts=[1, 1],
        drafted_counts=[0, 0],
        accepted_counts=[0, 0],
        token_ids=bad + b"\5\0\0\0",
    )
    core.report(convert.step_report("wide", message), 3.0)
    assert bytes(second.output) == b""
    assert bytes(third.output) == b"\5\0\0\0"
    after_any_report(core)


def _spec(request_id: str = "r", **fields: Any) -> scheduler_pb2.RequestSpec:
    stopping = generation_pb2.StoppingParams(max_tokens=8)
    given = {"prompt_token_ids": b"\1\0\0\0", "stopping": stopping, "digest": request_id.encode()}
    return scheduler_pb2.RequestSpec(request_id=request_id, **(given | fields))


def _hello(**fields: Any) -> worker_pb2.WorkerHello:
    given: dict[str, Any] = {"worker_id": "w", "pool": "p", "slots": 1}
    return worker_pb2.WorkerHello(**(given | fields))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("worker_id", ""),
        ("worker_id", "a:b"),
        ("worker_id", "x" * 129),
        ("slots", 0),
        ("slots", 2**32 - 1),
        ("device", "x" * 2000),
        ("vocabulary_size", 2**32 - 1),
        ("costs", worker_pb2.StepCosts(verify_s=math.nan)),
        ("costs", worker_pb2.StepCosts(draft_token_s=-1)),
        ("costs", worker_pb2.StepCosts(switch_s=math.inf)),
    ],
)
def test_a_worker_that_cannot_be_is_not_taken(field: str, value: Any) -> None:
    with pytest.raises(InvalidArgument, match=f"hello.{field}"):
        checks.check_hello(_hello(**{field: value}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("request_id", ""),
        ("request_id", "a:b:c"),
        ("request_id", "x\n"),
        ("prompt_token_ids", b""),
        ("prompt_token_ids", b"\1\0\0"),
        ("stopping", generation_pb2.StoppingParams()),
        ("priority", 101),
        ("deadline_s", math.nan),
        ("disconnect_grace_s", -1.0),
        ("request_class", "a b"),
        ("sampling", generation_pb2.SamplingParams(temperature=math.nan)),
        ("sampling", generation_pb2.SamplingParams(frequency_penalty=math.inf)),
        ("sampling", generation_pb2.SamplingParams(logit_bias={3: 1.0, 4: math.nan})),
    ],
)
def test_a_request_that_no_gateway_lets_through(field: str, value: Any) -> None:
    with pytest.raises(InvalidArgument, match=f"spec.{field}"):
        checks.check_spec(_spec(**{field: value}))
    checks.check_spec(_spec())


class Terms:
    """A leader without a loop: what the session needs of it."""

    pool = "p"

    def __init__(self) -> None:
        from laps.history import HistoryPoint
        from scheduler_svc.leader import Leader

        class Nothing:
            seen = HistoryPoint()

        self.store: Any = Nothing()
        self.refusals = Refusals("p")
        self.store_full = False
        core, self.neighbour = pool()
        self.leader = Leader(
            core, self.store, epoch=1, tick_interval_s=0.0, gateway_grace_s=1.0, leader_ttl_s=3.0
        )

    def leader_or_raise(self) -> Any:
        return self.leader

    async def leader_or_abort(self, context: Any) -> Any:
        return self.leader

    async def check_seen_or_abort(self, leader: Any, seen: Any, context: Any) -> None:
        return None

    def not_leading(self) -> Any:
        raise AssertionError("the session ended for another reason")


@asynccontextmanager
async def session() -> AsyncIterator[tuple[Terms, Any]]:
    terms = Terms()
    server = channels.new_server()
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(WorkerService(terms, 1.0, terms.refusals), server)  # type: ignore[arg-type]
    async with listening(server) as port, channels.open_channel(f"127.0.0.1:{port}") as channel:
        yield terms, channel


@pytest.mark.parametrize(
    "lie",
    [
        worker_pb2.SessionRequest(),
        worker_pb2.SessionRequest(hello=_hello(worker_id="again")),
        worker_pb2.SessionRequest(
            report=worker_pb2.StepReport(epoch=1, timings=worker_pb2.StepTimings(step_s=math.nan))
        ),
        worker_pb2.SessionRequest(
            report=worker_pb2.StepReport(epoch=1, timings=worker_pb2.StepTimings(step_s=-5.0))
        ),
        worker_pb2.SessionRequest(
            report=worker_pb2.StepReport(epoch=1, logprobs={0: worker_pb2.RowLogprobs(logprobs=[{}] * 9)})  # type: ignore[list-item]
        ),
    ],
    ids=["nothing", "a second hello", "NaN", "a negative time", "logprobs of no tokens"],
)
async def test_a_session_that_says_what_cannot_be_is_ended(lie: worker_pb2.SessionRequest) -> None:
    async with session() as (terms, channel):
        call = worker_pb2_grpc.WorkerServiceStub(channel).Session()  # type: ignore[call-arg]
        await call.write(worker_pb2.SessionRequest(hello=_hello(worker_id="bad")))
        assert (await call.read()).HasField("welcome")
        assert "bad" in terms.leader.core.workers
        await call.write(lie)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert isinstance(from_rpc_error(caught.value), InvalidArgument)
        core = terms.leader.core
        assert core.counters.reports_refused == 1
        assert refused(terms) == {("WorkerService.Session", "INVALID_ARGUMENT"): 1.0}
        async with asyncio.timeout(60):
            while "bad" in core.workers:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        assert core.get("honest") is terms.neighbour
        assert "other" in core.workers


def refused(terms: Terms) -> dict[tuple[str, str], float]:
    """What the scheduler tells Prometheus of refused calls."""
    samples = [sample for family in terms.refusals.counter.collect() for sample in family.samples]
    return {
        (sample.labels["method"], sample.labels["status"]): sample.value
        for sample in samples
        if sample.name == "laps_scheduler_refused_calls_total"
    }


@pytest.mark.parametrize(
    ("first", "status"),
    [
        (worker_pb2.SessionRequest(heartbeat=worker_pb2.Heartbeat()), "INVALID_ARGUMENT"),
        (worker_pb2.SessionRequest(hello=_hello(pool="another")), "INVALID_ARGUMENT"),
        (worker_pb2.SessionRequest(hello=_hello(slots=0)), "INVALID_ARGUMENT"),
        (worker_pb2.SessionRequest(hello=_hello(model_fingerprint="another")), "FAILED_PRECONDITION"),
    ],
    ids=["no hello", "another pool", "no slots", "another model"],
)
async def test_a_worker_that_is_not_taken_is_counted(first: worker_pb2.SessionRequest, status: str) -> None:
    async with session() as (terms, channel):
        before = set(terms.leader.core.workers)
        call = worker_pb2_grpc.WorkerServiceStub(channel).Session()  # type: ignore[call-arg]
        await call.write(first)
        with pytest.raises(grpc.aio.AioRpcError):
            await call.read()
        assert refused(terms) == {("WorkerService.Session", status): 1.0}
        assert set(terms.leader.core.workers) == before


async def test_a_request_that_is_not_taken_is_counted() -> None:
    terms = Terms()
    service = SchedulerService(terms, terms.refusals)  # type: ignore[arg-type]

    class Context:
        async def abort(self, *_: Any) -> None:
            raise ConnectionAbortedError

    request = scheduler_pb2.SubmitRequest(spec=_spec(priority=101))
    with pytest.raises(ConnectionAbortedError):
        await service.Submit(request, Context())  # type: ignore[arg-type]
    assert refused(terms) == {("SchedulerService.Submit", "INVALID_ARGUMENT"): 1.0}
    assert terms.leader.core.counters.submitted == 2, "those of the pool"
    # A full store is no fault of the caller: a refused submission, as by a full queue.
    terms.store_full = True
    with pytest.raises(ConnectionAbortedError):
        await service.Submit(scheduler_pb2.SubmitRequest(spec=_spec()), Context())  # type: ignore[arg-type]
    assert terms.leader.core.counters.refused == 1
    assert len(refused(terms)) == 1


async def test_bytes_that_are_no_message_end_their_own_call_alone() -> None:
    async with session() as (terms, channel):
        call: Any = channel.stream_stream("/laps.v1.WorkerService/Session")()
        await call.write(b"\xff\xff\xff")
        with pytest.raises(grpc.aio.AioRpcError):
            await call.read()
        good = worker_pb2_grpc.WorkerServiceStub(channel).Session()  # type: ignore[call-arg]
        await good.write(worker_pb2.SessionRequest(hello=_hello(worker_id="good")))
        assert (await good.read()).HasField("welcome")
        assert "good" in terms.leader.core.workers
