"""What a commit may do, and that a refused one does nothing."""

from __future__ import annotations

import asyncio

import msgpack
import pytest

from scheduler_svc.core.records import (
    Append,
    Commit,
    Emitted,
    Event,
    FinishReason,
    QueueMove,
    RequestState,
    StepCosts,
    Worker,
    emitted_of,
)
from scheduler_svc.store import packing
from scheduler_svc.store.errors import (
    AlreadyFinished,
    AlreadyStored,
    LogConflict,
    SequenceGap,
    StoreUnavailable,
    UnknownRequest,
)
from tests.scheduler_svc.core.house import FakeWorker, scheduler, spec, worker

NOW_S = 1_700_000_000.25


def finish(request, reason=FinishReason.STOP):
    request.state = RequestState.FINISHED
    request.finish_reason = reason
    request.finished_s = NOW_S + 9
    request.perceived_s = 0.0
    return request


async def test_the_same_commit_twice_is_one(leading, make_request, tokens, dump):
    encoded = leading.encode(
        Commit(
            submitted=[make_request()],
            appended=[Append("req-1", 1, 0, tokens(5))],
            moves=[QueueMove("req-1", 0, 1.0)],
            events=[Event("accepted", "req-1")],
        ),
        NOW_S,
    )
    assert await leading.commit(encoded)
    before = dump(leading.pool)
    assert not await leading.commit(encoded)
    assert dump(leading.pool) == before


async def test_another_commit_of_a_stored_number_is_an_alarm(leading, make_request, dump):
    first = leading.encode(Commit(submitted=[make_request(1)]), NOW_S)
    await leading.commit(first)
    leading._packer = packing.CommitPacker(1, 0)
    other = leading.encode(Commit(submitted=[make_request(2)]), NOW_S)
    before = dump(leading.pool)
    with pytest.raises(LogConflict, match="SEQ_CONFLICT"):
        await leading.commit(other)
    assert dump(leading.pool) == before


async def test_the_last_two_commits_may_come_again_and_an_older_one_is_an_alarm(leading, make_request, dump):
    """Two may be under way at once, and both be stored without their leader knowing."""
    commits = [leading.encode(Commit(submitted=[make_request(number)]), NOW_S) for number in (1, 2, 3)]
    for encoded in commits:
        assert await leading.commit(encoded)
    before = dump(leading.pool)
    assert not await leading.commit(commits[1])
    assert not await leading.commit(commits[2])
    with pytest.raises(LogConflict, match="SEQ_CONFLICT"):
        await leading.commit(commits[0])
    assert dump(leading.pool) == before


async def test_two_commits_under_way_are_stored_in_their_order(leading, make_request):
    commits = [leading.encode(Commit(submitted=[make_request(number)]), NOW_S) for number in range(1, 9)]
    for pair in zip(commits[::2], commits[1::2], strict=True):
        assert await asyncio.gather(*map(leading.commit, pair)) == [True, True]
    assert leading.seen.commit_seq == 8


async def test_a_commit_behind_one_that_is_not_stored_is_not_stored_and_no_alarm(leading, make_request, dump):
    first = leading.encode(Commit(submitted=[make_request(1)]), NOW_S)
    second = leading.encode(Commit(submitted=[make_request(2)]), NOW_S)
    before = dump(leading.pool)
    with pytest.raises(StoreUnavailable, match="the commit before"):
        await leading.commit(second)
    assert dump(leading.pool) == before
    assert await leading.commit(first)
    assert await leading.commit(second)


REFUSALS = {
    "log gap": (SequenceGap, lambda t: {"appended": [Append("req-1", 3, 2, t(9))]}),
    "wrong offset": (LogConflict, lambda t: {"appended": [Append("req-1", 2, 1, t(9))]}),
    "entry rewritten": (LogConflict, lambda t: {"appended": [Append("req-1", 1, 0, t(7, 9))]}),
    "entry with other logprobs": (
        LogConflict,
        lambda t: {"appended": [Append("req-1", 1, 0, t(7, 8), b"x")]},
    ),
    "append to an unknown request": (UnknownRequest, lambda t: {"appended": [Append("nobody", 1, 0, t(9))]}),
    "append to a finished request": (AlreadyFinished, lambda t: {"appended": [Append("req-2", 1, 0, t(9))]}),
    "move of a finished request": (AlreadyFinished, lambda t: {"moves": [QueueMove("req-2", 0)]}),
    "move of an unknown request": (UnknownRequest, lambda t: {"moves": [QueueMove("nobody", 0)]}),
    "lease of a finished request": (AlreadyFinished, lambda t: {"leased": [("req-2", NOW_S)]}),
    "lease of an unknown request": (UnknownRequest, lambda t: {"leased": [("nobody", NOW_S)]}),
    "forgetting a live request": (LogConflict, lambda t: {"forgotten": ["req-1"]}),
}


@pytest.mark.parametrize("case", REFUSALS)
async def test_a_refusal_leaves_nothing_half_done(case, leading, apply, make_request, tokens, dump):
    error, bad = REFUSALS[case]
    one, two = make_request(1), make_request(2)
    await apply(leading, submitted=[one, two], moves=[QueueMove("req-1", 0, 1.0), QueueMove("req-2", 1, 2.0)])
    await apply(leading, appended=[Append("req-1", 1, 0, tokens(7, 8))], finished=[finish(two)])
    before = dump(leading.pool)
    # Good parts before and after the bad one in the order of writing must not be written either.
    parts = {
        "submitted": [make_request(3)],
        "moves": [QueueMove("req-1", 2, 5.0)],
        "workers": [(Worker("w", 1, StepCosts(0.001, 0.02)), NOW_S)],
        "events": [Event("any")],
        "learnt": {"a": "b"},
    }
    for name, items in bad(tokens).items():
        parts[name] = parts.get(name, []) + items
    with pytest.raises(error):
        await apply(leading, **parts)
    assert dump(leading.pool) == before


async def test_a_request_is_submitted_once(leading, apply, make_request, dump):
    await apply(leading, submitted=[make_request()])
    before = dump(leading.pool)
    with pytest.raises(AlreadyStored):
        await apply(leading, submitted=[make_request(2), make_request()])
    assert dump(leading.pool) == before


async def test_a_request_ends_once(leading, apply, make_request, dump):
    request = make_request()
    await apply(leading, submitted=[request])
    await apply(leading, finished=[finish(request)])
    before = dump(leading.pool)
    with pytest.raises(AlreadyFinished):
        await apply(leading, finished=[finish(request, FinishReason.CANCELLED)])
    assert dump(leading.pool) == before


def logged(request, log_entries, output):
    """With so much output, all of it in its log."""
    request.log_entries, request.output = log_entries, bytearray(output)
    return request


async def test_the_record_tells_how_far_its_log_goes(leading, apply, make_request, tokens, dump):
    request = make_request()
    await apply(leading, submitted=[request])
    await apply(leading, appended=[Append("req-1", 1, 0, tokens(7, 8), b"lp")])
    stored = dump(leading.pool)["request:req-1"]
    assert (stored["log_entries"], stored["output_tokens"]) == ("1", "2")
    logged(request, 2, tokens(7, 8, 9))
    await apply(leading, appended=[Append("req-1", 2, 2, tokens(9))], finished=[finish(request)])
    stored = dump(leading.pool)["request:req-1"]
    assert (stored["log_entries"], stored["output_tokens"]) == ("2", "3")


@pytest.mark.parametrize("how", ["changed", "finished"])
async def test_a_log_that_lost_its_end_is_an_alarm_when_its_record_is_written(
    leading, apply, make_request, tokens, raw, dump, how
):
    request = make_request()
    await apply(leading, submitted=[request])
    entries = [Append("req-1", 1, 0, tokens(7)), Append("req-1", 2, 1, tokens(8))]
    await apply(leading, appended=entries, changed=[logged(request, 2, tokens(7, 8))])
    key = f"laps:{{{leading.pool}}}:request:req-1"
    await raw.hset(key, mapping={"log_entries": 1, "output_tokens": 1})
    before = dump(leading.pool)
    with pytest.raises(LogConflict, match="stored to 1 1, it was written to 2 2"):
        await apply(leading, **{how: [finish(request) if how == "finished" else request]})
    assert dump(leading.pool) == before


def output(offset, token_ids):
    return [emitted_of([("req-1", offset, token_ids)])]


async def test_the_journal_holds_what_is_in_no_log_yet(leading, apply, make_request, tokens, dump):
    request = make_request()
    await apply(leading, tick=1, logged_tick=1, submitted=[request])
    await apply(leading, tick=2, logged_tick=1, emitted=output(0, tokens(7, 8)))
    await apply(leading, tick=3, logged_tick=1, emitted=output(2, tokens(9)))
    assert len(dump(leading.pool)["journal"]) == 2
    [found] = (await leading.recover()).requests
    assert (found.output, found.book.logged_tokens, found.log_entries) == (tokens(7, 8, 9), 0, 0)
    logged(request, 1, tokens(7, 8, 9))
    # Part of it is in its log: only the rest is taken from the journal.
    await apply(leading, tick=4, logged_tick=2, appended=[Append("req-1", 1, 0, tokens(7, 8))])
    assert len(dump(leading.pool)["journal"]) == 1
    [found] = (await leading.recover()).requests
    assert (found.output, found.book.logged_tokens, found.log_entries) == (tokens(7, 8, 9), 2, 1)
    await apply(
        leading, tick=5, logged_tick=5, emitted=output(3, tokens(1)),
        appended=[Append("req-1", 2, 2, tokens(9, 1))],
    )  # fmt: skip
    assert not dump(leading.pool)["journal"]
    [found] = (await leading.recover()).requests
    assert (found.output, found.book.logged_tokens, found.log_entries) == (tokens(7, 8, 9, 1), 4, 2)


async def test_a_takeover_counts_the_steps_that_no_record_tells_of_yet(store, other):
    """Else its output would have come of fewer steps than it did, and the policy would learn that."""
    core, fake = scheduler("laps-sd"), FakeWorker("w", 2)
    core.worker_joined(worker("w", 2), [], NOW_S)
    for name in "ab":
        core.submit(spec(name, max_tokens=60), NOW_S)
    await store.lead("a", "here", 60.0)
    now_s = NOW_S

    async def tick():
        decided = core.tick(now_s)
        if decided.commit:
            assert await store.commit(store.encode(decided.commit, now_s))
        fake.apply(decided)

    await tick()
    for count in (2, 4, 3, 1, 5):
        now_s += 0.032
        core.report(fake.step({"a": count, "b": 2}), now_s)
        await tick()
    await other.lead("a", "here", 60.0)
    found = {request.request_id: request for request in (await other.recover()).requests}
    assert {name: request.book.logged_tokens for name, request in found.items()} == {"a": 0, "b": 0}
    for name, request in core.requests.items():
        assert found[name].output == request.output
        assert found[name].steps == request.steps == 5
        assert found[name].drafted_tokens == request.drafted_tokens
        assert found[name].accepted_tokens == request.accepted_tokens
        assert found[name].acceptance_histogram == request.acceptance_histogram
        assert found[name].attained_s == pytest.approx(request.attained_s, abs=1e-5)


def journal_rows_of_version_0_2(packed):
    """As it read them."""
    rows = []
    for ids, offsets, counts, token_ids in msgpack.unpackb(packed, raw=True):
        assert sum(counts) * 4 == len(token_ids)
        assert all(type(offset) is int for offset in offsets)
        rows += Emitted([name.decode() for name in ids], offsets, counts, bytes(token_ids)).rows()
    return rows


def test_versions_read_each_others_journal(tokens):
    """A scheduler of either may take over from one of the other."""
    step = Emitted(["a", "b"], [0, 7], [2, 1], tokens(5, 6, 8), [4, 0], [1, 0], 0.032)
    commit = Commit(tick=2, logged_tick=1, emitted=[step, *output(3, tokens(9))])
    journal = packing.unpack(packing.CommitPacker(1, 0).pack(commit, NOW_S)).journal
    assert packing.journal_rows(journal) == [
        ("a", 0, tokens(5, 6), (4, 1, 0.032)),
        ("b", 7, tokens(8), (0, 0, 0.032)),
        ("req-1", 3, tokens(9), None),
    ]
    old = journal_rows_of_version_0_2(journal)
    assert [row for row in old if row[0]] == [
        ("a", 0, tokens(5, 6)),
        ("b", 7, tokens(8)),
        ("req-1", 3, tokens(9)),
    ]
    assert {row[2] for row in old if not row[0]} == {b""}


async def test_steps_of_a_journal_that_tells_no_more_of_them_count_as_steps(
    leading, apply, make_request, tokens
):
    await apply(leading, tick=1, logged_tick=1, submitted=[make_request()])
    for place in range(3):
        await apply(leading, tick=2 + place, logged_tick=1, emitted=output(2 * place, tokens(place, place)))
    [found] = (await leading.recover()).requests
    assert (found.output_tokens, found.steps, found.drafted_tokens) == (6, 3, 0)


@pytest.mark.parametrize(
    "steps",
    [[10, 4 * 2048 + 5], [10, 2000 * 2048], [10], [10, 0, 0], [10, -1], ["x", 0], [10, "x"]],
)
def test_counts_that_cannot_be_are_no_journal(tokens, steps):
    columns = [(["a"], [0], [1], tokens(1)), ([""] * len(steps), steps, [0] * len(steps), b"")]
    with pytest.raises(ValueError, match="no journal entry"):
        packing.journal_rows(msgpack.packb(columns, use_bin_type=False))


@pytest.mark.parametrize("lost", [0, 1, 2])
async def test_a_journal_that_lost_an_entry_is_an_alarm_until_an_operator_accepts_it(
    leading, apply, make_request, tokens, raw, lost
):
    await apply(leading, tick=1, logged_tick=1, submitted=[make_request()])
    for place in range(3):
        await apply(leading, tick=2 + place, logged_tick=1, emitted=output(place, tokens(place)))
    journal = f"laps:{{{leading.pool}}}:journal"
    entries = await raw.xrange(journal)
    await raw.xdel(journal, entries[lost][0])
    with pytest.raises(LogConflict, match="the journal"):
        await leading.recover()
    await leading.stop_pool("a", "the journal lost something", leading.seen)
    assert await leading.resume_pool("operator") == 2
    assert await leading.lead("a", "127.0.0.1:1", 60.0)
    [found] = (await leading.recover()).requests
    assert found.output == tokens(*range(lost)), "what follows a hole is lost with it"


async def test_a_damaged_journal_is_an_alarm(leading, apply, make_request, tokens, raw):
    await apply(
        leading,
        tick=1,
        logged_tick=0,
        submitted=[make_request()],
        emitted=output(0, tokens(7)),
    )
    journal = f"laps:{{{leading.pool}}}:journal"
    [(entry_id, _)] = await raw.xrange(journal)
    await raw.xdel(journal, entry_id)
    await raw.delete(journal)
    await raw.xadd(journal, {"rows": "no rows"}, id=entry_id)
    with pytest.raises(LogConflict, match="cannot be read"):
        await leading.recover()


async def test_submitted_run_and_ended_in_one_tick(leading, apply, make_request, tokens, dump):
    request = logged(finish(make_request()), 1, tokens(7))
    await apply(
        leading,
        submitted=[request],
        appended=[Append("req-1", 1, 0, tokens(7))],
        moves=[QueueMove("req-1", None)],
        unleased=["req-1"],
        finished=[request],
    )
    stored = dump(leading.pool)
    assert "live" not in stored
    assert "journal" not in stored
    assert [name for name, _ in stored["finished"]] == ["req-1"]
    found = await leading.read_request("req-1")
    assert (found.state, found.output, found.finish_reason) == (
        RequestState.FINISHED,
        tokens(7),
        FinishReason.STOP,
    )
    await apply(leading, forgotten=["req-1"])
    assert set(dump(leading.pool)) == {"leader", "meta", "epochs"}


async def test_a_request_moves_between_levels_and_out(leading, apply, make_request, dump):
    await apply(leading, submitted=[make_request()], moves=[QueueMove("req-1", 0, 1.5)])
    await apply(leading, moves=[QueueMove("req-1", 3, 2.5)])
    stored = dump(leading.pool)
    assert "queue:0" not in stored
    assert [name for name, _ in stored["queue:3"]] == ["req-1"]
    assert (stored["request:req-1"]["level"], stored["request:req-1"]["rank"]) == ("3", "2.5")
    await apply(leading, moves=[QueueMove("req-1", None)])
    stored = dump(leading.pool)
    assert "queue:3" not in stored
    assert stored["request:req-1"]["queue"] == ""


async def test_only_what_changed_is_packed(leading, apply, make_request):
    request = make_request()
    await apply(leading, submitted=[request])
    await apply(leading, changed=[request])
    request.steps += 1
    small = leading.encode(Commit(changed=[request]), NOW_S)
    assert b"steps" in small
    assert b"worker_id" not in small
    await leading.commit(small)
    request.worker_id, request.acceptance_histogram = "w-1", [0, 2]
    await apply(leading, changed=[request])
    found = await leading.read_request("req-1")
    assert (found.steps, found.worker_id, found.acceptance_histogram) == (1, "w-1", [0, 2])


async def test_packing_takes_the_request_as_it_is_now(leading, make_request):
    request = make_request()
    await leading.commit(leading.encode(Commit(submitted=[request]), NOW_S))
    request.steps = 1
    encoded = leading.encode(Commit(changed=[request]), NOW_S)
    request.steps = 2
    await leading.commit(encoded)
    assert (await leading.read_request("req-1")).steps == 1


async def test_workers_come_and_go_and_are_not_kept_for_ever(leading, apply, dump):
    def worker(name, last_seen_s):
        return Worker(name, 2, StepCosts(0.001, 0.02), last_seen_s=last_seen_s)

    await apply(leading, workers=[(worker("a", NOW_S), NOW_S + 5), (worker("b", NOW_S), NOW_S + 5)])
    await apply(leading, workers_gone=["a"])
    assert [name for name, _ in dump(leading.pool)["workers"]] == ["b"]
    later_s = NOW_S + 2 * 3600
    await apply(leading, now_s=later_s, workers=[(worker("c", later_s), later_s + 5)])
    stored = dump(leading.pool)
    assert [name for name, _ in stored["workers"]] == ["c"]
    assert "worker:b" not in stored


async def test_events_are_capped(leading, apply, raw, pool):
    for _ in range(12):
        await apply(leading, events=[Event("tick", detail="x")] * 1000)
    assert await raw.xlen(f"laps:{{{pool}}}:events") <= 10_200


async def test_learnt_values_are_merged(leading, apply):
    await apply(leading, learnt={"a": "1", "b": "2"})
    await apply(leading, learnt={"b": "3"})
    assert (await leading.recover()).learnt == {"a": "1", "b": "3"}


async def test_a_record_is_right_after_a_move_that_wrote_level_and_rank_by_itself(
    leading, apply, make_request, raw
):
    request = make_request(level=1, rank=1.0)
    await apply(leading, submitted=[request])
    await apply(leading, changed=[request])
    await apply(leading, moves=[QueueMove("req-1", 2, 7.0)])
    # It came back to where it was when its record was last written.
    await apply(leading, changed=[request])
    stored = await raw.hmget(f"laps:{{{leading.pool}}}:request:req-1", "level", "rank")
    assert (int(stored[0]), float(stored[1])) == (1, 1.0)
