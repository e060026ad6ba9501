"""What the inspector tells is what the keys hold."""

from __future__ import annotations

import asyncio
import time

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from laps.v1 import queue_pb2, scheduler_pb2
from scheduler_svc.core.records import (
    Append,
    Commit,
    Event,
    FinishReason,
    QueueMove,
    RequestState,
    StepCosts,
    Worker,
)
from scheduler_svc.store import codec, inspector_proto
from scheduler_svc.store.errors import StoreUnavailable
from scheduler_svc.store.inspector import BadPageToken, Inspector

NOW_S = 1_700_000_000.25


def run(request, worker_id="w-1", slot=0):
    request.state, request.worker_id, request.slot, request.lease_id = (
        RequestState.RUNNING,
        worker_id,
        slot,
        7,
    )
    return request


def finish(request):
    request.state, request.finish_reason, request.finished_s = (
        RequestState.FINISHED,
        FinishReason.LENGTH,
        NOW_S + 5,
    )
    return request


def worker(slots=2, worker_id="w-1"):
    return Worker(
        worker_id,
        slots,
        StepCosts(0.001, 0.02, 0.0, 0.003),
        device="cpu",
        last_seen_s=NOW_S,
        kv_capacity_tokens=99,
    )


def logged(request, output, log_entries=1):
    """With so much output, all of it in its log."""
    request.log_entries, request.output = log_entries, bytearray(output)
    return request


async def test_an_empty_pool(inspector):
    snapshot = await inspector.snapshot()
    assert (snapshot.queues.epoch, snapshot.queues.waiting, snapshot.queues.leader) == (0, 0, "")
    assert len(snapshot.queues.levels) == 1
    assert (snapshot.workers, snapshot.running) == ([], [])
    assert (await inspector.list_requests()).requests == []


async def test_the_picture_is_what_the_keys_hold(leading, apply, make_request, tokens, inspector, raw, pool):
    requests = [make_request(n, perceived_s=1.5) for n in range(1, 7)]
    far_s = time.time() + 60
    await leading.describe("laps-sd", [0.5])
    await apply(
        leading,
        submitted=requests,
        moves=[QueueMove(f"req-{n}", n % 2, float(10 - n)) for n in range(1, 6)],
        workers=[(worker(), far_s)],
    )
    await apply(
        leading,
        changed=[run(logged(requests[5], tokens(4, 5, 6)), slot=1)],
        leased=[("req-6", far_s)],
        appended=[Append("req-6", 1, 0, tokens(4, 5, 6))],
    )
    snapshot = await inspector.snapshot(head_limit=2)
    queues = snapshot.queues
    assert (queues.pool, queues.policy, queues.epoch, queues.commit_seq) == (pool, "laps-sd", 1, 2)
    assert (queues.leader, queues.waiting, queues.running) == ("127.0.0.1:1", 5, 1)
    assert queues.backlog_s == pytest.approx(9.0)
    for level in queues.levels:
        key = f"laps:{{{pool}}}:queue:{level.level}"
        assert level.waiting == await raw.zcard(key)
        assert [view.request_id for view in level.head] == await raw.zrange(key, 0, 1)
    assert [view.request_id for view in queues.levels[1].head] == ["req-5", "req-3"]
    [running] = snapshot.running
    assert (running.request_id, running.fields["output_tokens"]) == ("req-6", 3)
    assert running.lease_expires_s == pytest.approx(far_s, abs=0.002)
    [told] = snapshot.workers
    assert [slot.request_id for slot in told.slots] == ["", "req-6"]

    message = inspector_proto.snapshot_to_proto(snapshot)
    assert message.pools[0].levels[1].head[0].request_id == "req-5"
    assert message.pools[0].levels[0].threshold_s == 0.5
    assert message.running[0].state == queue_pb2.REQUEST_STATE_RUNNING
    assert message.running[0].output_tokens == 3
    assert message.workers[0].slots[1].request_id == "req-6"
    assert message.workers[0].switch_ms == pytest.approx(3.0)


async def test_a_preempted_request_does_not_hide_its_successor(leading, apply, make_request, inspector):
    first, second = make_request(1), make_request(2)
    far_s = time.time() + 60
    await apply(leading, submitted=[first, second], workers=[(worker(1), far_s)])
    run(first).releasing = True
    await apply(
        leading,
        changed=[first, run(second)],
        leased=[("req-1", far_s + 1), ("req-2", far_s)],
    )
    snapshot = await inspector.snapshot()
    assert snapshot.queues.running == 1
    assert [view.request_id for view in snapshot.running] == ["req-2"]
    assert [slot.request_id for slot in snapshot.workers[0].slots] == ["req-2"]


async def test_workers_are_told_by_number_whoever_was_heard_of_last(leading, apply, inspector):
    far_s = time.time() + 60
    names = ["w-10", "w-2", "w-1", "gpu"]
    workers = [(worker(worker_id=name), far_s + number) for number, name in enumerate(names)]
    await apply(leading, workers=workers)
    assert [each.worker_id for each in await inspector.list_workers()] == ["gpu", "w-1", "w-2", "w-10"]


async def test_workers_whose_session_expired_are_not_told(leading, apply, inspector):
    await apply(leading, workers=[(worker(), time.time() - 1)])
    assert await inspector.list_workers() == []


async def every_page(inspector, **asked):
    seen, token, pages = [], "", 0
    while True:
        page = await inspector.list_requests(page_token=token, **asked)
        seen += [view.request_id for view in page.requests]
        token, pages = page.next_page_token, pages + 1
        if not token:
            return seen, pages


async def test_pages_tell_every_request_once(leading, apply, make_request, inspector):
    requests = [make_request(n) for n in range(25)]
    await apply(leading, submitted=requests)
    await apply(leading, finished=[finish(r) for r in requests[20:]], changed=[run(r) for r in requests[:3]])
    await apply(leading, leased=[(f"req-{n}", NOW_S + n) for n in range(3)])
    live = [f"req-{n}" for n in range(20)]
    ended = [f"req-{n}" for n in range(20, 25)]
    assert await every_page(inspector, page_size=7) == (live, 3)
    assert await every_page(inspector, page_size=20) == (live, 1)
    assert (await every_page(inspector, states=list(RequestState), page_size=6))[0] == live + ended
    assert (await every_page(inspector, states=[RequestState.FINISHED], page_size=2)) == (ended, 3)
    assert (await every_page(inspector, states=[RequestState.RUNNING], page_size=2)) == (live[:3], 2)
    assert (await every_page(inspector, states=[RequestState.QUEUED], page_size=3))[0] == live[3:]


async def test_pages_go_on_where_a_request_was_forgotten(leading, apply, make_request, inspector):
    requests = [make_request(n) for n in range(6)]
    await apply(leading, submitted=requests)
    first = await inspector.list_requests(page_size=3)
    await apply(leading, finished=[finish(requests[2])])
    rest = await inspector.list_requests(page_size=3, page_token=first.next_page_token)
    assert [view.request_id for view in rest.requests] == ["req-3", "req-4", "req-5"]


@pytest.mark.parametrize(
    "token",
    [
        "x",
        "live/x/req",
        "finished/1/req-1",
        "live/1;DEL/x",
        "live/nan/x",
        "live/1e+e/x",
        "live/./x",
        "leases/0/x",
    ],
)
async def test_a_foreign_page_token_is_refused(inspector, token):
    with pytest.raises(BadPageToken):
        await inspector.list_requests(page_token=token)


async def test_a_listing_is_told_as_protos(leading, apply, make_request, inspector):
    await apply(leading, submitted=[make_request(n) for n in range(3)])
    message = inspector_proto.page_to_proto(await inspector.list_requests(page_size=2), "p")
    assert [info.request_id for info in message.requests] == ["req-0", "req-1"]
    assert message.next_page_token
    whole = inspector_proto.request_to_proto(await leading.read_request("req-0"), "p")
    assert whole == message.requests[0]


@pytest.mark.parametrize(
    ("field", "text"),
    [("rank", "nonsense"), ("level", None), ("slot", "x"), ("steps", str(1 << 70)), ("state", "lost")],
)
async def test_a_damaged_record_hides_no_other(
    leading, apply, make_request, inspector, raw, pool, field, text
):
    requests = [make_request(n) for n in range(3)]
    moves = [QueueMove(request.request_id, 0, 1.0) for request in requests[:2]]
    await apply(leading, submitted=requests[:2], moves=moves)
    leases = [("req-2", time.time() + 60.0)]
    await apply(leading, submitted=[run(requests[2])], workers=[(worker(), time.time() + 60)], leased=leases)
    for request in requests[1:]:
        key = f"laps:{{{pool}}}:request:{request.request_id}"
        await (raw.hset(key, field, text) if text else raw.hdel(key, field))
    told = inspector_proto.snapshot_to_proto(await inspector.snapshot())
    assert [request.request_id for request in told.pools[0].levels[0].head] == ["req-0", "req-1"]
    assert [request.request_id for request in told.running] == ["req-2"]
    page = inspector_proto.page_to_proto(await inspector.list_requests(), pool)
    by_id = {request.request_id: request for request in page.requests}
    # The store itself looks for the state.
    assert set(by_id) == ({"req-0"} if field == "state" else {"req-0", "req-1", "req-2"})
    assert not by_id["req-0"].error
    for request in [*told.pools[0].levels[0].head[1:], *told.running]:
        assert request.error == "its record cannot be read"
    timeline = await inspector.timeline("req-1")
    assert inspector_proto.timeline_to_proto(timeline, pool).request.error == "its record cannot be read"


async def test_a_reading_is_consistent_while_others_write(leading, apply, make_request, inspector):
    """Every commit moves requests between queue and slots; no reading may see half of one."""
    requests = [make_request(n) for n in range(20)]
    await apply(leading, submitted=requests, moves=[QueueMove(r.request_id, 0, 1.0) for r in requests])
    done = asyncio.Event()

    async def write():
        for turn in range(60):
            out = [requests[(turn + k) % 20].request_id for k in range(5)]
            await apply(
                leading,
                moves=[QueueMove(name, None) for name in out],
                leased=[(name, NOW_S) for name in out],
            )
            await apply(leading, moves=[QueueMove(name, turn % 3, 1.0) for name in out], unleased=out)
        done.set()

    writing = asyncio.create_task(write())
    readings = 0
    while not done.is_set():
        queues = await inspector.list_queues(head_limit=50)
        heads = [view.request_id for level in queues.levels for view in level.head]
        assert len(heads) == len(set(heads)) == queues.waiting
        assert queues.waiting in (15, 20)
        answer = await inspector._reader.ask("laps_snapshot", 0, 0)
        assert sum(count for count, _ in answer[4]) + len(answer[6]) // 5 == 20
        readings += 1
    await writing
    assert readings > 3


async def test_ten_thousand_waiting_requests_make_a_small_answer(leading, apply, make_request, inspector):
    for first in range(0, 10_000, 2500):
        some = [make_request(n) for n in range(first, first + 2500)]
        moves = [QueueMove(r.request_id, r.arrival_seq % 4, float(r.arrival_seq)) for r in some]
        await apply(leading, submitted=some, moves=moves)
    queues = await inspector.list_queues(head_limit=5)
    assert queues.waiting == 10_000
    assert [len(level.head) for level in queues.levels] == [5, 5, 5, 5]
    packed = msgpack.packb(await inspector._reader.ask("laps_snapshot", 5, 5))
    assert len(packed) < 40_000


ranked = st.tuples(st.integers(-2, 2), st.integers(0, 3000).map(lambda n: n / 100), st.integers(0, 1))


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(ranked, min_size=1, max_size=30))
def test_queues_are_in_run_order(server, make_request, items):
    async def check():
        import uuid

        from scheduler_svc.store.store import Store

        store = Store(server.url, uuid.uuid4().hex)
        await store.lead("a", "b", 60.0)
        # Ids against the order of arrival, so that their own order cannot help.
        requests = [
            make_request(n, request_id=f"r{1000 - n}", priority=p) for n, (p, _, _) in enumerate(items)
        ]
        moves = [QueueMove(r.request_id, lv, rank) for r, (_, rank, lv) in zip(requests, items, strict=True)]
        await store.commit(store.encode(Commit(submitted=requests, moves=moves), NOW_S))
        queues = await Inspector(store.reader, store.pool).list_queues(head_limit=100)
        for level in queues.levels:
            wanted = sorted(
                (-r.spec.priority, m.rank, r.arrival_seq, r.request_id)
                for r, m in zip(requests, moves, strict=True)
                if m.level == level.level
            )
            assert [view.request_id for view in level.head] == [key[3] for key in wanted]
        scores = await store.reader.redis.zrange(f"laps:{{{store.pool}}}:queue:0", 0, -1, withscores=True)
        by_id = {r.request_id: (r, m) for r, m in zip(requests, moves, strict=True)}
        for name, score in scores:
            request, move = by_id[name.decode()]
            assert score == codec.queue_score(request.spec.priority, move.rank, request.arrival_seq)
        await store.close()

    asyncio.run(check())


async def test_log_from_every_offset(leading, apply, make_request, tokens):
    await apply(leading, submitted=[make_request()])
    ids = list(range(100, 123))
    offset = 0
    for number, count in enumerate([1, 3, 2, 1, 5, 4, 7], start=1):
        entry = Append("req-1", number, offset, tokens(*ids[offset : offset + count]))
        await apply(leading, appended=[entry])
        offset += count
    for start in range(24):
        assert (await leading.read_log("req-1", start))[0] == tokens(*ids[start:])
    entries = await leading.read_entries("req-1", 4)
    assert (entries[0].entry, entries[0].offset) == (3, 4)
    assert await leading.read_log("nobody") == (b"", b"")
    assert await leading.read_request("nobody") is None


async def test_a_long_log_is_read_in_batches(leading, apply, make_request, tokens, monkeypatch):
    monkeypatch.setattr("scheduler_svc.store.store.LOG_BATCH_ENTRIES", 4)
    await apply(leading, submitted=[make_request()])
    await apply(leading, appended=[Append("req-1", n + 1, 2 * n, tokens(n, n)) for n in range(12)])
    whole = tokens(*[n for n in range(12) for _ in range(2)])
    assert (await leading.read_log("req-1", 0))[0] == whole
    assert (await leading.read_log("req-1", 3))[0] == whole[12:]
    assert bytes((await leading.read_request("req-1")).output) == whole


async def test_logprobs_come_with_their_tokens(leading, apply, make_request, tokens):
    def logprobs(*values):
        message = scheduler_pb2.TokenLogprobs()
        for value in values:
            message.logprobs.add(logprob=value)
        return message.SerializeToString()

    await apply(leading, submitted=[make_request()])
    await apply(
        leading,
        appended=[
            Append("req-1", 1, 0, tokens(1, 2, 3), logprobs(-1, -2, -3)),
            Append("req-1", 2, 3, tokens(4), logprobs(-4)),
        ],
    )
    for start in range(5):
        packed, found = await leading.read_log("req-1", start)
        told = [entry.logprob for entry in scheduler_pb2.TokenLogprobs.FromString(found).logprobs]
        assert told == [-1, -2, -3, -4][start:]
        assert len(packed) // 4 == len(told)


async def test_an_unreachable_store_is_told_in_one_line():
    inspector = Inspector.open("redis://someone:secret@127.0.0.1:1/0", "p")
    with pytest.raises(StoreUnavailable) as caught:
        await inspector.snapshot()
    await inspector.close()
    assert "127.0.0.1:1" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


async def test_a_timeline_tells_a_life(leading, apply, make_request, tokens, inspector, monkeypatch):
    # Everything in batches of two: what is read by several calls is put together right.
    monkeypatch.setattr("scheduler_svc.store.inspector.LOOK_LIMIT", 2)
    now_s = time.time()
    request, other = make_request(1), make_request(2)
    request.arrival_s = now_s
    await apply(
        leading,
        submitted=[request, other],
        moves=[QueueMove("req-2", 0, 1.0), QueueMove("req-1", 0, 2.0)],
        events=[Event("submitted", "req-1"), Event("submitted", "req-2")],
    )
    waiting = await inspector.timeline("req-1")
    assert (waiting.position, waiting.tokens_per_entry, waiting.events_lost) == (1, [], False)
    request.leased_s = now_s + 1
    await apply(
        leading,
        changed=[run(request)],
        moves=[QueueMove("req-1", None)],
        leased=[("req-1", now_s + 60)],
        events=[Event("leased", "req-2", "w-2", "slot 1"), Event("leased", "req-1", "w-1", "slot 0")],
    )
    for entry, (offset, ids) in enumerate([(0, (5,)), (1, (6, 7, 8)), (4, (9, 9)), (6, (1,))], start=1):
        await apply(leading, appended=[Append("req-1", entry, offset, tokens(*ids))])
    running = await inspector.timeline("req-1")
    assert (running.position, running.tokens_per_entry) == (None, [1, 3, 2, 1])
    assert running.request.fields["leased_s"] == pytest.approx(now_s + 1)
    finish(logged(request, tokens(5, 6, 7, 8, 9, 9, 1), log_entries=4))
    await apply(leading, finished=[request], events=[Event("finished", "req-1", "w-1", "length")])
    await apply(leading, events=[Event("leased", "req-2") for _ in range(5)])
    ended = await inspector.timeline("req-1")
    assert [(event.kind, event.worker_id, event.detail) for event in ended.events] == [
        ("submitted", "", ""),
        ("leased", "w-1", "slot 0"),
        ("finished", "w-1", "length"),
    ]
    assert all(abs(event.time_s - now_s) < 60 for event in ended.events)
    message = inspector_proto.timeline_to_proto(ended, inspector.pool)
    assert list(message.tokens_per_entry) == [1, 3, 2, 1]
    assert not message.HasField("position")
    assert await inspector.timeline("nobody") is None


async def test_a_timeline_says_when_its_beginning_is_lost(leading, apply, make_request, inspector, raw, pool):
    request = make_request(1)
    request.arrival_s = time.time()
    await apply(leading, submitted=[request], events=[Event("submitted", "req-1")])
    assert not (await inspector.timeline("req-1")).events_lost
    await raw.xtrim(f"laps:{{{pool}}}:events", maxlen=0, approximate=False)
    timeline = await inspector.timeline("req-1")
    assert timeline.events_lost
    assert timeline.events == []


async def test_a_window_of_one_level(leading, apply, make_request, inspector):
    requests = [make_request(n) for n in range(1, 31)]
    await apply(
        leading,
        submitted=requests,
        moves=[QueueMove(r.request_id, r.arrival_seq % 2, float(r.arrival_seq)) for r in requests],
    )
    whole = await inspector.list_queues(head_limit=100)
    order = [[view.request_id for view in level.head] for level in whole.levels]
    for level, offset, limit in ((0, 0, 4), (1, 3, 5), (1, 14, 5), (0, 99, 5)):
        window = await inspector.list_queues(limit, head_offset=offset, level=level)
        assert [each.waiting for each in window.levels] == [15, 15]
        assert [view.request_id for view in window.levels[level].head] == order[level][
            offset : offset + limit
        ]
        assert window.levels[1 - level].head == []


async def test_the_finished_of_late(leading, apply, make_request, inspector):
    requests = [make_request(n) for n in range(1, 8)]
    await apply(leading, submitted=requests)
    for number, request in enumerate(requests):
        finish(request).finished_s = NOW_S + number / 10
        await apply(leading, now_s=NOW_S + number / 10, finished=[request])
    states = [RequestState.FINISHED]
    for number in range(7):
        page = await inspector.list_requests(states, finished_after_s=NOW_S + number / 10)
        assert [view.request_id for view in page.requests] == [f"req-{n + 2}" for n in range(number, 6)]
    page = await inspector.list_requests(states, 2, finished_after_s=NOW_S + 0.2)
    assert [view.request_id for view in page.requests] == ["req-4", "req-5"]
    page = await inspector.list_requests(states, 9, page.next_page_token, NOW_S + 0.2)
    assert [view.request_id for view in page.requests] == ["req-6", "req-7"]


async def test_a_record_of_an_earlier_version_is_recovered(leading, apply, make_request, raw, pool):
    await apply(leading, submitted=[make_request(1)])
    assert await raw.hdel(f"laps:{{{pool}}}:request:req-1", "leased_s") == 1
    [request] = (await leading.recover()).requests
    assert request.leased_s is None
