"""One writer: whoever has the newest epoch, and nobody else."""

from __future__ import annotations

import asyncio

import pytest

from scheduler_svc.core.records import Commit
from scheduler_svc.store.errors import HistoryWentBack, StaleLeader

NOW_S = 1_700_000_000.0


async def until_leading(store, holder, ttl_s=60.0):
    async with asyncio.timeout(60):
        # The expiry is on the clock of the server: there is nothing here to wait for but the answer.
        while (leadership := await store.lead(holder, "there", ttl_s)) is None:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    return leadership


async def test_only_one_leads(store, other, raw):
    first = await store.lead("a", "127.0.0.1:1", 60.0)
    assert first.epoch == 1
    assert await other.lead("b", "127.0.0.1:2", 60.0) is None
    leader = await raw.hgetall(f"laps:{{{store.pool}}}:leader")
    assert (leader["epoch"], leader["holder"], leader["address"]) == ("1", "a", "127.0.0.1:1")


async def test_the_same_holder_takes_over_from_itself_at_once(store, other, make_request):
    await store.lead("a", "here", 60.0)
    encoded = store.encode(Commit(submitted=[make_request()]), NOW_S)
    assert (await other.lead("a", "here", 60.0)).epoch == 2
    with pytest.raises(StaleLeader):
        await store.commit(encoded)
    with pytest.raises(StaleLeader):
        await store.renew()


async def test_an_expired_leadership_can_be_taken(store, other):
    await store.lead("a", "here", 0.03)
    assert (await until_leading(other, "b")).epoch == 2


async def test_an_expired_leadership_that_nobody_took_goes_on(store, apply, make_request):
    await store.lead("a", "here", 0.001)
    await asyncio.sleep(0.005)
    assert await apply(store, submitted=[make_request()])
    assert (await store.renew()).epoch == 1


@pytest.mark.parametrize("version", ["this", "before"])
async def test_an_expiry_from_before_the_servers_clock_was_set_back_keeps_nobody_out(
    store, other, raw, version
):
    """Its holder is dead, and nothing renews it: it counts as renewed now, for as long as a renewal lasts."""
    ttl_s = 0.05
    await store.lead("a", "here", 60.0 if version == "before" else ttl_s)
    key = f"laps:{{{store.pool}}}:leader"
    if version == "before":
        # Which had no `ttl_ms`: twice that of whoever asks.
        await raw.hdel(key, "ttl_ms")
    await raw.hincrby(key, "expires_ms", 600_000)
    assert await other.lead("b", "there", ttl_s) is None
    seconds, microseconds = await raw.time()
    left_ms = int(await raw.hget(key, "expires_ms")) - seconds * 1000 - microseconds // 1000
    assert left_ms <= 2 * ttl_s * 1000
    assert (await until_leading(other, "b", ttl_s)).epoch == 2


async def test_a_longer_leadership_is_not_cut_by_who_wants_a_shorter_one(store, other, raw):
    """Their settings may differ, while they are being changed."""
    await store.lead("a", "here", 60.0)
    key = f"laps:{{{store.pool}}}:leader"
    before = await raw.hgetall(key)
    assert await other.lead("b", "there", 0.01) is None
    assert await raw.hgetall(key) == before


async def test_resigning_lets_others_lead_at_once(store, other):
    await store.lead("a", "here", 60.0)
    encoded = store.encode(Commit(learnt={"a": "b"}), NOW_S)
    await store.resign()
    with pytest.raises(StaleLeader):
        await store.commit(encoded)
    with pytest.raises(StaleLeader):
        store.encode(Commit(learnt={"a": "b"}), NOW_S)
    assert (await other.lead("b", "there", 60.0)).epoch == 2
    await store.resign()  # Not ours any more: changes nothing.
    await other.renew()


async def test_a_stale_leaders_commit_leaves_nothing(store, other, apply, make_request, dump):
    await store.lead("a", "here", 60.0)
    await apply(store, submitted=[make_request(1)])
    encoded = store.encode(Commit(submitted=[make_request(2)], learnt={"x": "y"}), NOW_S)
    await store.lead("a", "here", 0.02)
    await until_leading(other, "b")
    before = dump(store.pool)
    with pytest.raises(StaleLeader):
        await store.commit(encoded)
    assert dump(store.pool) == before


async def test_the_sequence_goes_on_under_the_next_leader(store, other, apply, make_request):
    await store.lead("a", "here", 60.0)
    await apply(store, submitted=[make_request(1)])
    await apply(store, submitted=[make_request(2)])
    await store.resign()
    assert (await other.lead("b", "there", 60.0)).commit_seq == 2
    assert await apply(other, submitted=[make_request(3)])


async def test_leases_of_an_earlier_epoch_are_void(store, other, apply, make_request, raw):
    await store.lead("a", "here", 60.0)
    await apply(store, submitted=[make_request(1)], leased=[("req-1", NOW_S)])
    await store.resign()
    await other.lead("b", "there", 60.0)
    assert await raw.zcard(f"laps:{{{store.pool}}}:leases") == 0


async def test_a_store_that_lost_commits_is_not_led(leading, apply, make_request, raw):
    await apply(leading, submitted=[make_request(1)])
    await raw.hset(f"laps:{{{leading.pool}}}:meta", "commit_seq", 0)
    with pytest.raises(HistoryWentBack):
        await apply(leading, submitted=[make_request(2)])
    with pytest.raises(HistoryWentBack):
        await leading.lead("holder-1", "here", 60.0)


async def test_a_store_that_was_emptied_is_not_written(leading, apply, make_request, raw):
    await apply(leading, submitted=[make_request(1)])
    await raw.delete(*[key async for key in raw.scan_iter(match=f"laps:{{{leading.pool}}}:*")])
    with pytest.raises(HistoryWentBack):
        await apply(leading, submitted=[make_request(2)])
    with pytest.raises(HistoryWentBack):
        await leading.renew()


async def test_functions_that_are_gone_are_loaded_again(leading, apply, make_request, raw):
    await raw.function_delete("laps")
    assert await apply(leading, submitted=[make_request(1)])
    await raw.function_delete("laps_inspection")
    assert (await leading.read_request("req-1")).request_id == "req-1"


async def test_another_schema_is_refused(store, raw):
    await raw.hset(f"laps:{{{store.pool}}}:meta", "schema", 999)
    with pytest.raises(Exception, match="schema 999"):
        await store.lead("a", "here", 60.0)


async def test_describe_is_fenced(store, other, inspector):
    await store.lead("a", "here", 60.0)
    await store.describe("laps-sd", [0.5, 1.0])
    await other.lead("a", "here", 60.0)
    with pytest.raises(StaleLeader):
        await store.describe("fcfs")
    queues = await inspector.list_queues()
    assert queues.policy == "laps-sd"
    assert [level.threshold_s for level in queues.levels] == [0.5, 1.0, 0.0]


async def test_the_answer_to_a_call_that_was_given_up_is_not_the_next_ones(store, server):
    assert await store.lead("a", "here", 60.0) is not None
    server.freeze()
    try:
        given_up = asyncio.create_task(store.lead("a", "here", 60.0))
        # It has been sent when nothing is left to do but to wait for the server.
        for _ in range(50):
            await asyncio.sleep(0)
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
    finally:
        server.thaw()
    assert await store.resume_pool("operator") == 0


async def test_only_the_last_epochs_are_remembered(store, raw):
    for _ in range(1005):
        await store.lead("a", "here", 60.0)
    epochs = await raw.hkeys(f"laps:{{{store.pool}}}:epochs")
    assert sorted(map(int, epochs)) == list(range(6, 1006))
