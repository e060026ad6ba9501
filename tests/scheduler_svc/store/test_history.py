"""A store that has lost something stops the pool, whoever notices, until an operator accepts it."""

from __future__ import annotations

import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis

from laps.cli import main
from laps.history import HistoryPoint
from scheduler_svc.core.records import Commit
from scheduler_svc.store.custody import read_pool_state
from scheduler_svc.store.errors import HistoryWentBack, PoolStopped, StaleLeader
from scheduler_svc.store.store import Store

NOW_S = 1_700_000_000.0


@pytest.fixture
async def rollback(server, pool):
    """Puts a copy of the pool's keys aside, and in their place again."""
    client = Redis.from_url(server.url, protocol=2)
    prefix = f"laps:{{{pool}}}:"
    kept: dict[bytes, bytes] = {}

    class Rollback:
        async def put_aside(self):
            kept.clear()
            async for key in client.scan_iter(prefix + "*"):
                kept[key] = await client.dump(key)

        async def come_back_older(self):
            await client.delete(*[key async for key in client.scan_iter(prefix + "*")])
            for key, dumped in kept.items():
                await client.restore(key, 0, dumped)

    yield Rollback()
    await client.aclose()


async def learn(store, value):
    await store.commit(store.encode(Commit(learnt={"x": value}), NOW_S))


async def test_a_standby_knows_how_far_the_leader_had_come(leading, other, rollback):
    await learn(leading, "1")
    await rollback.put_aside()
    await learn(leading, "2")
    assert await other.lead("b", "there", 60.0) is None
    assert other.seen == HistoryPoint(1, 1, 2)
    await rollback.come_back_older()
    with pytest.raises(HistoryWentBack, match="commit 1 are stored; timeline 1, epoch 1, commit 2 were seen"):
        await other.lead("b", "there", 60.0)


async def test_a_leader_that_knows_nothing_is_told_by_its_peers(leading, other, rollback):
    """Everything but one worker was started anew, and the older store has been led and written since."""
    await learn(leading, "1")
    await rollback.put_aside()
    await learn(leading, "2")
    worker_has_seen = leading.seen
    await rollback.come_back_older()
    await other.lead("holder-1", "here", 60.0)
    for value in "345":
        await learn(other, value)
    assert other.seen.commit_seq > worker_has_seen.commit_seq
    with pytest.raises(HistoryWentBack):
        await other.witness(worker_has_seen)
    with pytest.raises(StaleLeader):
        other.encode(Commit(learnt={"x": "6"}), NOW_S)


async def test_an_epoch_given_out_twice_is_told_by_its_term(leading, other, rollback):
    """The older store is from before the epoch: the next leader gets the same number, and is soon further."""
    await learn(leading, "1")
    await rollback.put_aside()
    await leading.lead("holder-1", "here", 60.0)
    await learn(leading, "2")
    gateway_has_seen = leading.seen
    await rollback.come_back_older()
    await other.lead("holder-1", "here", 60.0)
    for value in "345":
        await learn(other, value)
    assert (other.seen.epoch, other.seen > gateway_has_seen) == (gateway_has_seen.epoch, True)
    with pytest.raises(HistoryWentBack):
        await other.witness(gateway_has_seen)


async def test_peers_of_earlier_terms_are_no_alarm(leading, other):
    await learn(leading, "1")
    seen = [leading.seen]
    for number in range(4):
        await other.lead("holder-1", "here", 60.0)
        seen.append(other.seen)
        await learn(other, str(number))
        seen.append(other.seen)
    for point in seen:
        await other.witness(point)
    await other.witness(HistoryPoint())


async def test_a_succeeded_leader_takes_what_its_peers_say_for_no_alarm(leading, other):
    await other.lead("holder-1", "here", 60.0)
    await learn(other, "1")
    with pytest.raises(StaleLeader):
        await leading.witness(other.seen)


async def test_a_stop_fences_everybody_until_it_is_lifted(leading, other, server, pool):
    await learn(leading, "1")
    packed = leading.encode(Commit(learnt={"x": "2"}), NOW_S)
    await other.stop_pool("b", "HISTORY_WENT_BACK for the test", HistoryPoint(1, 7, 9))
    with pytest.raises(StaleLeader):
        await leading.commit(packed)
    with pytest.raises(StaleLeader):
        await leading.renew()
    for _ in range(2):
        started_anew = Store(server.url, pool)
        with pytest.raises(PoolStopped, match="by b: HISTORY_WENT_BACK for the test"):
            await started_anew.lead("holder-1", "here", 60.0)
        await started_anew.close()
    await leading.stop_pool("a", "a second alarm", HistoryPoint(1, 7, 12))
    state = await read_pool_state(other)
    assert state.stopped is not None
    assert (state.stopped.by, state.stopped.lost_commits) == ("b", 11)
    assert await other.resume_pool("operator") == 2
    # Also those that had seen what is lost take it as it is now.
    leadership = await leading.lead("holder-1", "here", 60.0)
    assert (leadership.epoch, leadership.commit_seq) == (9, 1)
    await leading.witness(HistoryPoint(1, 7, 12))
    await learn(leading, "3")
    assert await other.resume_pool("operator") == 0


async def test_an_emptied_store_is_a_loss_too(leading, other, raw, pool):
    await learn(leading, "1")
    await raw.delete(*[key async for key in raw.scan_iter(f"laps:{{{pool}}}:*")])
    await other.load_functions()
    await other.lead("b", "there", 60.0)
    with pytest.raises(HistoryWentBack):
        await other.witness(leading.seen)


async def test_an_operator_sees_it_and_lets_it_go_on(leading, server, pool, capsys):
    def laps(*arguments):
        code = main(["pool", *arguments, "--redis-url", server.url, "--pool", pool])
        return code, capsys.readouterr().out

    await learn(leading, "1")
    code, out = await asyncio.to_thread(laps, "status")
    assert code == 0
    assert "not stopped; holder-1 leads" in out
    await leading.stop_pool("a", "HISTORY_WENT_BACK ...", HistoryPoint(1, 1, 5))
    code, out = await asyncio.to_thread(laps, "status")
    assert "STOPPED" in out
    assert "lost     at least 4 commits" in out
    _, out = await asyncio.to_thread(laps, "status", "--json")
    assert json.loads(out)["stopped"]["seen"]["commit_seq"] == 5
    code, out = await asyncio.to_thread(laps, "resume", "--yes")
    assert code == 0
    assert "resumed, timeline 2" in out
    assert (await leading.lead("a", "here", 60.0)).epoch == 3


points = st.builds(HistoryPoint, *[st.integers(0, 3)] * 3)


@given(points, points, points)
def test_the_furthest_point_does_not_depend_on_who_was_heard_first(a, b, c):
    assert max(max(a, b), c) == max(a, max(b, c))
    assert HistoryPoint.from_proto(a.to_proto()) == a
