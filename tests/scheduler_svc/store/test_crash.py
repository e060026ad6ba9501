"""The server is killed, frozen and rolled back; nothing that was acknowledged may be lost unnoticed."""

from __future__ import annotations

import asyncio
import functools
import shutil
import time

import pytest

from scheduler_svc.core.records import Append, Commit
from scheduler_svc.store import library
from scheduler_svc.store.errors import AlreadyStored, HistoryWentBack, StoreFull, StoreUnavailable
from scheduler_svc.store.server import LocalServer
from scheduler_svc.store.store import Store


@pytest.fixture
def own_server(binary, tmp_path):
    """A server that a test may treat badly, with every write on disk before it is acknowledged."""
    server = LocalServer(binary=binary, data_dir=tmp_path / "data", appendfsync="always")
    server.start()
    yield server
    server.close()


@pytest.fixture
async def own_store(own_server):
    store = Store(own_server.url, "p", timeout_s=20.0)
    await store.load_functions()
    await store.lead("a", "here", 60.0)
    yield store
    await store.close()


async def until_available(call, *args):
    async with asyncio.timeout(90):
        while True:
            try:
                return await call(*args)
            except StoreUnavailable:
                await asyncio.sleep(0.01)


async def commit_until_stored(store, encoded):
    return await until_available(store.commit, encoded)


async def test_kill_9_loses_nothing_acknowledged(own_server, own_store, make_request, tokens):
    """Three kills in the midst of commits. What was acknowledged is there afterwards, once."""
    await own_store.commit(own_store.encode(Commit(submitted=[make_request()]), time.time()))
    loop = asyncio.get_running_loop()
    acknowledged = 0
    for round_number in range(3):
        killed_after = 15 + 10 * round_number
        killed = asyncio.Event()

        def crash(killed=killed):
            own_server.kill()
            own_server.start()
            killed.set()

        for turn in range(40):
            entry = Append("req-1", acknowledged + 1, acknowledged, tokens(acknowledged))
            encoded = own_store.encode(Commit(appended=[entry]), time.time())
            if turn == killed_after:
                crashing = loop.run_in_executor(None, crash)
            await commit_until_stored(own_store, encoded)
            acknowledged += 1
        await crashing
        assert killed.is_set()
        log = await own_store.read_log("req-1", 0)
        assert log[0] == tokens(*range(acknowledged))
    [request] = (await own_store.recover()).requests
    assert request.output == tokens(*range(acknowledged))
    assert request.log_entries == acknowledged


async def test_a_frozen_server_is_unavailable_and_the_same_bytes_may_be_sent_again(
    own_server, make_request, inspector_of
):
    store = Store(own_server.url, "p", timeout_s=0.2)
    # A disk may take longer than that without being frozen.
    await until_available(store.load_functions)
    await until_available(store.lead, "a", "here", 60.0)
    encoded = store.encode(Commit(submitted=[make_request()]), time.time())
    own_server.freeze()
    with pytest.raises(StoreUnavailable, match="does not answer in time"):
        await store.commit(encoded)
    with pytest.raises(StoreUnavailable):
        await store.read_request("req-1")
    own_server.thaw()
    await commit_until_stored(store, encoded)
    assert not await commit_until_stored(store, encoded)
    queues = await until_available(inspector_of(store).list_queues)
    assert queues.commit_seq == 1
    await store.close()


async def test_two_commits_without_an_answer_may_both_be_sent_again(own_server, make_request):
    store = Store(own_server.url, "p", timeout_s=0.2)
    # A disk may take longer than that without being frozen.
    await until_available(store.load_functions)
    await until_available(store.lead, "a", "here", 60.0)
    for number in (1, 3):
        commits = [
            store.encode(Commit(submitted=[make_request(each)]), time.time()) for each in (number, number + 1)
        ]
        own_server.freeze()
        outcomes = await asyncio.gather(*map(store.commit, commits), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [StoreUnavailable, StoreUnavailable]
        own_server.thaw()
        # They lie in the server's socket: it carries them out, and nobody hears of it.
        for encoded in commits:
            await commit_until_stored(store, encoded)
    assert store.seen.commit_seq == 4
    assert len((await until_available(store.recover)).requests) == 4
    await store.close()


async def test_the_answer_of_a_cancelled_commit_is_not_taken_for_that_of_the_next(
    own_server, own_store, make_request
):
    await own_store.commit(own_store.encode(Commit(submitted=[make_request(0)]), time.time()))
    commits = [own_store.encode(Commit(submitted=[make_request(n)]), time.time()) for n in (1, 2)]
    own_server.freeze()
    first, second = (asyncio.create_task(own_store.commit(encoded)) for encoded in commits)
    await asyncio.wait({first, second}, timeout=0.05)
    first.cancel()
    own_server.thaw()
    assert await second
    assert own_store.seen.commit_seq == 3
    for encoded in commits:
        assert not await own_store.commit(encoded)


async def sent(store, *commits):
    """What the callers of `send` are told, in the order in which they are."""
    told = []
    over = asyncio.Event()

    def on_stored(number, error):
        told.append((number, type(error)))
        if len(told) == len(commits):
            over.set()

    for number, encoded in enumerate(commits):
        store.send(encoded, functools.partial(on_stored, number))
    await asyncio.wait_for(over.wait(), 60)
    return told


async def test_commits_that_are_sent_tell_of_their_end_in_their_order(own_store, make_request):
    """The first ones when there is no connection yet."""
    numbers = iter(range(6))
    for _ in range(3):
        commits = [
            own_store.encode(Commit(submitted=[make_request(next(numbers))]), time.time()) for _ in range(2)
        ]
        assert await sent(own_store, *commits) == [(0, type(None)), (1, type(None))]
    assert own_store.seen.commit_seq == 6


async def test_commits_that_are_sent_load_the_functions_where_these_are_gone(own_store, make_request):
    first, second = (own_store.encode(Commit(submitted=[make_request(n)]), time.time()) for n in (1, 2))
    assert await sent(own_store, first) == [(0, type(None))]
    await own_store.reader.redis.function_flush()
    assert await sent(own_store, second) == [(0, type(None))]


async def test_commits_that_are_sent_are_refused_as_others_are(own_store, make_request):
    first, twice = (own_store.encode(Commit(submitted=[make_request(1)]), time.time()) for _ in range(2))
    assert await sent(own_store, first, twice) == [(0, type(None)), (1, AlreadyStored)]
    behind_a_lost_one = own_store.encode(Commit(submitted=[make_request(2)]), time.time())
    assert await sent(own_store, behind_a_lost_one) == [(0, StoreUnavailable)]


async def test_nobody_is_told_of_a_commit_that_was_given_up_as_if_it_were_stored(
    own_server, own_store, make_request
):
    await own_store.commit(own_store.encode(Commit(submitted=[make_request(1)]), time.time()))
    encoded = own_store.encode(Commit(submitted=[make_request(2)]), time.time())
    own_server.freeze()
    telling = asyncio.create_task(sent(own_store, encoded))
    await asyncio.wait({telling}, timeout=0.05)
    own_store.forget_sent()
    assert await telling == [(0, StoreUnavailable)]
    own_server.thaw()
    assert own_store.seen.commit_seq == 1


async def test_a_cancelled_commit_can_be_made_again(own_server, own_store, make_request):
    encoded = own_store.encode(Commit(submitted=[make_request()]), time.time())
    own_server.freeze()
    task = asyncio.create_task(own_store.commit(encoded))
    # The frozen server cannot answer; meanwhile the call goes out.
    await asyncio.wait({task}, timeout=0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    own_server.thaw()
    await commit_until_stored(own_store, encoded)
    second = own_store.encode(Commit(submitted=[make_request(2)]), time.time())
    assert await own_store.commit(second)


async def test_an_older_copy_of_the_data_is_noticed(own_server, own_store, make_request, tmp_path):
    await own_store.commit(own_store.encode(Commit(submitted=[make_request(1)]), time.time()))
    own_server.stop()
    shutil.copytree(own_server.data_dir, tmp_path / "older")
    own_server.start()
    encoded = own_store.encode(Commit(submitted=[make_request(2)]), time.time())
    await commit_until_stored(own_store, encoded)
    own_server.kill()
    shutil.rmtree(own_server.data_dir)
    shutil.copytree(tmp_path / "older", own_server.data_dir)
    own_server.start()
    encoded = own_store.encode(Commit(submitted=[make_request(3)]), time.time())
    with pytest.raises(HistoryWentBack):
        await commit_until_stored(own_store, encoded)
    with pytest.raises(HistoryWentBack):
        await until_available(own_store.lead, "a", "here", 60.0)


async def test_a_full_store_refuses_and_keeps_what_it_has(own_store, make_request):
    redis = own_store.reader.redis
    await redis.config_set("maxmemory", 1)
    encoded = own_store.encode(Commit(submitted=[make_request()]), time.time())
    with pytest.raises(StoreFull):
        await own_store.commit(encoded)
    await redis.config_set("maxmemory", 0)
    assert await own_store.commit(encoded)


async def test_functions_survive_a_restart(own_server, own_store, make_request):
    own_server.kill()
    own_server.start()
    info = await own_store.connect()
    assert info.warnings == []
    libraries = str(await own_store.reader.redis.function_list())
    assert "laps_inspection" in libraries
    encoded = own_store.encode(Commit(submitted=[make_request()]), time.time())
    await commit_until_stored(own_store, encoded)


@pytest.fixture
def inspector_of():
    from scheduler_svc.store.inspector import Inspector

    return lambda store: Inspector(store.reader, store.pool)


async def test_a_new_leader_has_the_functions_of_its_version(own_server, own_store):
    """A scheduler of another version has started since: who only stands by leaves its functions alone."""
    redis = own_store.reader.redis
    code = library.source("functions.lua") + "\n-- another version\n"
    await redis.function_load(code, replace=True)
    standby = Store(own_server.url, "p")
    assert await standby.lead("b", "there", 60.0) is None
    await standby.close()
    assert "another version" in str(await redis.function_list("laps", withcode=True))
    assert await own_store.lead("a", "here", 60.0) is not None
    assert "another version" not in str(await redis.function_list("laps", withcode=True))
